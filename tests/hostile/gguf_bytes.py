"""GGUF files byte by byte: values of any type under any key, and a tiny Llama that loads."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACKED = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
Typed = tuple[int, Any]  # the type of a value, and the value; of an array (type of items, list)


def text(value: str | bytes) -> bytes:
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def payload(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(payload(inner, item) for item in items)
    return struct.pack("<" + PACKED[kind], value)


def gguf(pairs: Mapping[str, Typed], tensors: Mapping[str, tuple[list[int], int, bytes]] | None = None) -> bytes:
    """A file of version 3. tensors: name -> (dimensions, fastest first; type; bytes)."""
    tensors = tensors or {}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, (kind, value) in pairs.items():
        head += text(key) + struct.pack("<I", kind) + payload(kind, value)
    data = b""
    for name, (dims, kind, raw) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def tiny_pairs(vocabulary: list[str]) -> dict[str, Typed]:
    """The metadata of the tiny Llama."""
    config = {
        "block_count": 2,
        "context_length": 2048,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    pairs: dict[str, Typed] = {"general.architecture": (STRING, "llama")}
    pairs |= {f"llama.{key}": (U32, value) for key, value in config.items()}
    pairs |= {"llama.attention.layer_norm_rms_epsilon": (F32, 1e-5), "llama.rope.freq_base": (F32, 1e4)}
    types = [3 if token.startswith("<|") else 1 for token in vocabulary]
    return pairs | {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, vocabulary)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["h i"])),
        "tokenizer.ggml.eos_token_id": (U32, vocabulary.index("<|im_end|>")),
    }


def tiny_parts(weights: Mapping[str, Tensor], model: Path) -> tuple[dict[str, Typed], dict[str, Any]]:
    """Metadata and tensors of a Hugging Face folder's Llama; one token and its row are added, for a merge."""
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab(with_added_tokens=True)
    vocabulary = [*sorted(known, key=known.__getitem__), "hi"]
    tensors = {}
    for name, tensor in weights.items():
        if "embed_tokens" in name:
            tensor = torch.cat([tensor, tensor[:1]])
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = (list(reversed(tensor.shape)), 0, tensor.contiguous().numpy().tobytes())
    return tiny_pairs(vocabulary), tensors


def tiny_gguf(weights: Mapping[str, Tensor], model: Path) -> bytes:
    """The bytes of `m.gguf`."""
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    return gguf(*tiny_parts(weights, model))
