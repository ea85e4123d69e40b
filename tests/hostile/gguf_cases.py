"""GGUF: damaged headers, every key with a value of another type, tokenizers and tensors that contradict it."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_bytes import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, gguf, text, tiny_parts
from harness import Case, Make
from makes import ESCAPES, LONG, all_of, edit, folder, link, pipe, put, sparse
from safetensors.torch import load_file

ARGV = ("chat", "--model", "m.gguf")
BIG = 1 << 63
Parts = tuple[dict[str, Any], dict[str, Any]]


def changed(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Make:
    """`m.gguf` with its metadata and tensors changed."""

    def make(here: Path) -> None:
        pairs, tensors = tiny_parts(load_file(here / "m" / "model.safetensors"), here / "m")
        change(pairs, tensors)
        (here / "m.gguf").write_bytes(gguf(pairs, tensors))

    return make


def key(name: str, kind: int, value: Any) -> Make:
    return changed(lambda pairs, tensors: pairs.update({name: (kind, value)}))


def without(name: str) -> Make:
    return changed(lambda pairs, tensors: (pairs.pop(name, None), tensors.pop(name, None)))


def tensor(name: str, change: Callable[[list[int], int, bytes], tuple[list[int], int, bytes]]) -> Make:
    return changed(lambda pairs, tensors: tensors.update({name: change(*tensors[name])}))


def new_tensor(name: str, dims: list[int], kind: int = 0, raw: bytes = bytes(4096)) -> Make:
    return changed(lambda pairs, tensors: tensors.update({name: (dims, kind, raw)}))


def head(tensors: int, pairs: int, rest: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> Make:
    return put("m.gguf", magic + struct.pack("<IQQ", version, tensors, pairs) + rest)


def cut(share: float) -> Make:
    return edit("m.gguf", lambda raw: raw[: int(len(raw) * share)])


HEADERS: dict[str, Make] = {
    "empty": put("m.gguf", b""),
    "the magic alone": put("m.gguf", b"GGUF"),
    "another magic": head(0, 0, bytes(100), magic=b"GGML"),
    "version 1": head(0, 0, bytes(100), version=1),
    "version 4": head(0, 0, bytes(100), version=4),
    "big-endian": put("m.gguf", b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100)),
    "2^63 tensors": head(BIG, 0),
    "999,999 tensors, none there": head(999_999, 0),
    "100,000 keys, none there": head(0, 100_000),
    "a key of 2^63 bytes": head(0, 1, struct.pack("<Q", BIG)),
    "an array of 2^63 bytes": head(0, 1, text("abc") + struct.pack("<IIQ", ARRAY, U8, BIG)),
    "an array of 2^24 texts, none there": head(0, 1, text("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 24)),
    "an array of arrays": head(0, 1, text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(16)),
    "a text that is not UTF-8": key("general.name", STRING, b"\xc3("),
    "a key that is not UTF-8": head(0, 1, text(b"\xff\xfe") + bytes(12)),
    "a key twice": head(0, 2, (text("a") + struct.pack("<IB", U8, 0)) * 2),
    "a key of escapes": head(0, 1, text(ESCAPES) + struct.pack("<I", 99) + bytes(8)),
    "a key of 60,000 characters": head(0, 1, text(LONG[:60_000]) + struct.pack("<I", 99) + bytes(8)),
    "cut in the metadata": cut(0.02),
    "cut in the list of tensors": cut(0.08),
    "cut in the tensors": cut(0.6),
    "without its last byte": edit("m.gguf", lambda raw: raw.rstrip(b"\0")[:-1]),
    "40 GB of nothing after the magic": sparse("m.gguf", 40 << 30, b"GGUF" + struct.pack("<I", 3)),
    "40 GB of nothing": sparse("m.gguf", 40 << 30),
    "a folder": folder("m.gguf"),
    "a pipe": pipe("m.gguf"),
    "a link to itself": link("m.gguf", "m.gguf"),
    "a link to /dev/zero": link("m.gguf", "/dev/zero"),
}
KEYS = (  # that hold a number, with values of other types
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.context_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.eos_token_id",
)
VALUES = {
    "an array of one": (ARRAY, (U32, [2])),
    "an empty array": (ARRAY, (U32, [])),
    "a text": (STRING, "32"),
    "NaN": (F32, math.nan),
    "2^64 - 1": (U64, (1 << 64) - 1),
}
OTHERS: dict[str, tuple[str, int, Any]] = {  # keys that hold something else, or must not be there
    "architecture an array": ("general.architecture", ARRAY, (STRING, ["llama"])),
    "architecture a number": ("general.architecture", U32, 1),
    "architecture of escapes": ("general.architecture", STRING, ESCAPES),
    "architecture of 100,000 characters": ("general.architecture", STRING, LONG),
    "type an array": ("general.type", ARRAY, (STRING, ["model", "x"])),
    "type an array of numbers": ("general.type", ARRAY, (U32, [1, 2])),
    "alignment an array": ("general.alignment", ARRAY, (U32, [32])),
    "alignment 3": ("general.alignment", U32, 3),
    "alignment 2^62": ("general.alignment", U64, 1 << 62),
    "split count an array": ("split.count", ARRAY, (U32, [1, 2])),
    "experts an array": ("llama.expert_count", ARRAY, (U32, [0, 0])),
    "experts an array of one": ("llama.expert_count", ARRAY, (U32, [0])),
    "causal an array of one": ("llama.attention.causal", ARRAY, (BOOL, [1])),
    "experts a text": ("llama.expert_count", STRING, "8"),
    "experts 8": ("llama.expert_count", U32, 8),
    "causal an array": ("llama.attention.causal", ARRAY, (BOOL, [1, 1])),
    "causal false": ("llama.attention.causal", BOOL, 0),
    "scale NaN": ("llama.attention.scale", F32, math.nan),
    "logit scale an array": ("llama.logit_scale", ARRAY, (F32, [0.0, 1.0])),
    "rope type an array": ("llama.rope.scaling.type", ARRAY, (STRING, ["linear"])),
    "rope type an array of numbers": ("llama.rope.scaling.type", ARRAY, (U32, [1, 2])),
    "rope type yarn": ("llama.rope.scaling.type", STRING, "yarn"),
    "rope factor a text": ("llama.rope.scaling.factor", STRING, "8"),
    "rope scale of old of two numbers": ("llama.rope.scale_linear", ARRAY, (F32, [4.0, 4.0])),
    "rope attention factor": ("llama.rope.scaling.attn_factor", F32, 2.0),
    "rope base of windows": ("llama.rope.freq_base_swa", F32, 1e4),
    "soft caps": ("llama.attn_logit_softcapping", F32, 50.0),
    "a key that no llama has": ("llama.full_attention_interval", U32, 4),
    "a sliding window": ("llama.attention.sliding_window", U32, 4),
    "a vocabulary of another size": ("llama.vocab_size", U32, 7),
    "head count 3": ("llama.attention.head_count", U32, 3),
    "head count 0": ("llama.attention.head_count", U32, 0),
    "key-value heads 3": ("llama.attention.head_count_kv", U32, 3),
    "heads of 7": ("llama.rope.dimension_count", U32, 7),
    "keys longer than values": ("llama.attention.key_length", U32, 16),
    "block count 1,000,000": ("llama.block_count", U32, 1_000_000),
    "block count 3": ("llama.block_count", U32, 3),
    "epsilon 0": ("llama.attention.layer_norm_rms_epsilon", F32, 0.0),
    "epsilon infinite": ("llama.attention.layer_norm_rms_epsilon", F64, math.inf),
    "base -1": ("llama.rope.freq_base", F32, -1.0),
    "block count true": ("llama.block_count", BOOL, 1),
    "tokenizer a number": ("tokenizer.ggml.model", U32, 1),
    "tokenizer llama": ("tokenizer.ggml.model", STRING, "llama"),
    "pre an array": ("tokenizer.ggml.pre", ARRAY, (STRING, ["gpt-2"])),
    "pre unknown": ("tokenizer.ggml.pre", STRING, "none such"),
    "tokens of numbers": ("tokenizer.ggml.tokens", ARRAY, (U32, [1, 2])),
    "tokens a text": ("tokenizer.ggml.tokens", STRING, "abc"),
    "tokens none": ("tokenizer.ggml.tokens", ARRAY, (STRING, [])),
    "tokens too few": ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "<|im_end|>"])),
    "tokens twice the same": ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a"] * 260)),
    "tokens twice the same, of escapes": ("tokenizer.ggml.tokens", ARRAY, (STRING, [ESCAPES * 100] * 260)),
    "types too few": ("tokenizer.ggml.token_type", ARRAY, (I32, [1])),
    "types of floats": ("tokenizer.ggml.token_type", ARRAY, (F32, [math.nan] * 260)),
    "types that are none": ("tokenizer.ggml.token_type", ARRAY, (I32, [7] * 260)),
    "types below 0": ("tokenizer.ggml.token_type", ARRAY, (I32, [-1] * 260)),
    "types of texts": ("tokenizer.ggml.token_type", ARRAY, (STRING, ["1"] * 260)),
    "types a number": ("tokenizer.ggml.token_type", U32, 1),
    "merges none": ("tokenizer.ggml.merges", ARRAY, (STRING, [])),
    "merges of numbers": ("tokenizer.ggml.merges", ARRAY, (U32, [1])),
    "merges without a blank": ("tokenizer.ggml.merges", ARRAY, (STRING, ["hi"])),
    "merges of no tokens": ("tokenizer.ggml.merges", ARRAY, (STRING, ["zz qq"])),
    "merges of escapes": ("tokenizer.ggml.merges", ARRAY, (STRING, [ESCAPES])),
    "eos outside": ("tokenizer.ggml.eos_token_id", U32, 100_000),
    "eos true": ("tokenizer.ggml.eos_token_id", BOOL, 1),
    "eos -1": ("tokenizer.ggml.eos_token_id", I32, -1),
    "padding an array": ("tokenizer.ggml.padding_token_id", ARRAY, (U32, [1])),
    "template an array": ("tokenizer.chat_template", ARRAY, (STRING, ["{{ messages }}"])),
    "template a number": ("tokenizer.chat_template", U32, 1),
}
TENSORS: dict[str, Make] = {
    "a weight of NaN": tensor("output_norm.weight", lambda d, k, raw: (d, k, struct.pack("<f", math.nan) * 32)),
    "a weight of infinity": tensor("blk.0.attn_q.weight", lambda d, k, raw: (d, k, struct.pack("<f", math.inf) * 1024)),
    "Q8_0 with infinite scales": tensor("blk.1.attn_q.weight", lambda d, k, raw: (d, 8, b"\x00\x7c" * 17 * 32)),
    "Q4_0 in rows of 31": tensor("blk.0.attn_q.weight", lambda d, k, raw: ([31, 32], 2, raw)),
    "type 4": tensor("blk.0.attn_q.weight", lambda d, k, raw: (d, 4, raw)),
    "type Q6_K": tensor("blk.0.attn_q.weight", lambda d, k, raw: ([256, 4], 14, bytes(840))),
    "type I32": tensor("blk.0.attn_q.weight", lambda d, k, raw: (d, 26, raw)),
    "type F64": tensor("blk.0.attn_q.weight", lambda d, k, raw: (d, 28, raw * 2)),
    "turned round": tensor("blk.0.ffn_up.weight", lambda d, k, raw: (d[::-1], k, raw)),
    "of one dimension more": tensor("blk.0.ffn_up.weight", lambda d, k, raw: ([*d, 1], k, raw)),
    "of no dimension": tensor("output_norm.weight", lambda d, k, raw: ([], k, raw)),
    "of a dimension of 0": tensor("output_norm.weight", lambda d, k, raw: ([0], k, b"")),
    "of a dimension of 2^63": tensor("output_norm.weight", lambda d, k, raw: ([BIG], k, raw)),
    "of four dimensions of 2^32": tensor("output_norm.weight", lambda d, k, raw: ([1 << 32] * 4, k, raw)),
    "missing": without("blk.1.ffn_down.weight"),
    "missing: the embedding": without("token_embd.weight"),
    "missing: all of them": changed(lambda pairs, tensors: tensors.clear()),
    "unknown": new_tensor("blk.0.ffn_gate_inp.weight", [32, 32]),
    "unknown, of escapes": new_tensor(ESCAPES, [32, 32]),
    "unknown, of 60,000 characters": new_tensor(LONG[:60_000], [32, 32]),
    "a layer of 10^8": new_tensor("blk.100000000.attn_q.weight", [32, 32]),
    "a bias on one layer": new_tensor("blk.1.attn_q.bias", [32]),
    "a bias of a norm": new_tensor("output_norm.bias", [32]),
    "rope factors of two dimensions": new_tensor("rope_freqs.weight", [2, 2]),
    "rope factors of NaN": new_tensor("rope_freqs.weight", [4], 0, struct.pack("<f", math.nan) * 4),
    "rope factors of nothing known": new_tensor("rope_freqs.weight", [4], 0, struct.pack("<4f", 1, 7, 2, 9)),
    "rope factors in Q8_0": new_tensor("rope_freqs.weight", [32], 8, b"\xff" * 34),
    "30,000 tensors": changed(lambda p, tensors: tensors.update({f"t{i}": ([1], 0, bytes(4)) for i in range(30_000)})),
}

CASES = [
    *[Case(f"gguf: {name}", make, ARGV) for name, make in HEADERS.items()],
    *[
        Case(f"gguf: {name} = {what}", key(name, *value), ARGV)
        for name in KEYS
        for what, value in VALUES.items()
        if not (what == "2^64 - 1" and "rope.freq" in name) and (what != "a text" or "llama.a" in name)
    ],
    *[Case(f"gguf: {name}", key(*entry), ARGV) for name, entry in OTHERS.items()],
    Case("gguf: rope factor without a type", key("llama.rope.scaling.factor", F32, 8.0), ARGV, ends="done"),
    Case("gguf: rope scale of old", key("llama.rope.scale_linear", F32, 4.0), ARGV, ends="done"),
    *[Case(f"gguf tensor: {name}", make, ARGV) for name, make in TENSORS.items()],
    *[
        Case(f"gguf without {name}", without(name), ARGV)
        for name in ("general.architecture", "llama.block_count", "tokenizer.ggml.model", "tokenizer.ggml.merges")
    ],
    Case(
        "gguf: a token that is empty and of control",
        changed(lambda pairs, _: pairs["tokenizer.ggml.tokens"][1][1].__setitem__(-4, "")),
        ARGV,
    ),
    Case(
        "gguf: rows are read before the weights",
        all_of(cut(0.6), put("d.jsonl", "{")),
        ("sft", "--model", "m.gguf", "--data", "d.jsonl", "--out", "o"),
    ),
    Case("gguf: a folder of a model that is called .gguf", link("x.gguf", "m"), ("chat", "--model", "x.gguf")),
    Case(
        "gguf: safetensors that are called .gguf", link("x.gguf", "m/model.safetensors"), ("chat", "--model", "x.gguf")
    ),
]
