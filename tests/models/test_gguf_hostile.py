"""A hostile or damaged GGUF ends in InputError at once and in little memory, whatever byte is wrong."""

import math
import os
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf  # here, before time and memory are counted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit.errors import EnvironmentProblem, InputError, visible
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_tokenizer import gguf_tokenizer
from fourbit.models.load import load_decoder

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + payload)


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def file(
    pairs: list[bytes] = [],  # noqa: B006 - never changed
    tensors: list[bytes] = [],  # noqa: B006 - never changed
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    align: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data


def one(value: int) -> bytes:
    return struct.pack("<I", value)


ALIGNMENT = "general.alignment"
FOUR = bytes(16)  # four fp32 zeros
BIG = 1 << 63

# name -> (bytes, words of the message)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "magic alone": (b"GGUF", "has 4 bytes"),
    "other magic": (file(magic=b"GGML"), "starts with b'GGML'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 0": (file(version=0), "GGUF version 0"),
    "version 1": (file(version=1), "GGUF version 1"),
    "version 4": (file(version=4), "GGUF version 4"),
    "2^63 tensors": (file(n_tensors=BIG), "number of tensors is 9223372036854775808, more than the limit of 1000000"),
    "more tensors than bytes": (file(n_tensors=999_999), "but the file ends"),
    "2^64 - 1 keys": (file(n_pairs=(1 << 64) - 1), "number of metadata keys"),
    "more keys than bytes": (file(n_pairs=99_999), "but the file ends"),
    "key of 2^63 bytes": (file([struct.pack("<Q", BIG)]), "length of a metadata key is 9223372036854775808"),
    "key of 65536 bytes": (file([pair("k" * 65536, U8, b"\0")]), "more than the limit of 65535"),
    "key not UTF-8": (file([pair(b"\xff\xfe", U8, b"\0")]), "a metadata key is not UTF-8"),
    "key twice": (file([pair("a", U8, b"\0"), pair("a", U8, b"\1")]), "'a' occurs twice"),
    "value of unknown type": (file([pair("a", 13, b"\0" * 8)]), "unknown type 13"),
    "value of type -1": (file([pair("a", 0xFFFFFFFF, b"\0" * 8)]), "unknown type 4294967295"),
    "string of 2^24 + 1 bytes": (file([pair("a", STRING, struct.pack("<Q", (1 << 24) + 1))]), "limit of 16777216"),
    "string past the end": (file([pair("a", STRING, struct.pack("<Q", 1 << 20) + b"x")]), "needs 1048576 bytes"),
    "string not UTF-8": (file([pair("a", STRING, text(b"\xc3("))]), "the value of 'a' is not UTF-8"),
    "truth value of 2": (file([pair("a", BOOL, b"\2")]), "is a truth value but holds 2"),
    "51 bytes, an array of 2^63 u8": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("abc") + struct.pack("<IIQ", ARRAY, U8, BIG),
        "length of array 'abc' is 9223372036854775808",
    ),
    "array of 2^63 strings": (file([array("a", STRING, BIG, b"")]), "more than the limit of 16777216"),
    "array of 2^24 u64, none there": (file([array("a", U64, 1 << 24, b"")]), "needs 134217728 bytes"),
    "array of 2^24 strings, none there": (file([array("a", STRING, 1 << 24, b"")]), "does not fit"),
    "array of 2^24 + 1 bytes": (file([array("a", U8, (1 << 24) + 1, b"")]), "more than the limit of 16777216"),
    "array of arrays": (file([array("a", ARRAY, 1, struct.pack("<IQ", U8, 1) + b"\0")]), "an array of arrays"),
    "array of unknown items": (file([array("a", 13, 1, bytes(8))]), "key 'a' is of the unknown item type 13"),
    "alignment 0": (file([pair(ALIGNMENT, U32, one(0))]), "general.alignment is 0; it must be a power of two"),
    "alignment 3": (
        file([pair(ALIGNMENT, U32, one(3)), pair("z", U8, b"\0")]),
        "general.alignment is 3; it must be a power of two, near byte 57.",
    ),
    "alignment -32": (file([pair(ALIGNMENT, I32, struct.pack("<i", -32))]), "general.alignment is -32"),
    "alignment a string": (file([pair(ALIGNMENT, STRING, text("32"))]), "general.alignment is '32'"),
    "alignment true": (file([pair(ALIGNMENT, BOOL, b"\1")]), "general.alignment is True"),
    "alignment 2^62": (file([pair(ALIGNMENT, U64, struct.pack("<Q", 1 << 62))], [tensor("t", [4])], FOUR), "ends at"),
    "tensor name not UTF-8": (file([], [tensor(b"\x80", [4])], FOUR), "a tensor name is not UTF-8"),
    "tensor name of 65536 bytes": (file([], [tensor("t" * 65536, [4])], FOUR), "length of a tensor name"),
    "tensor twice": (file([], [tensor("t", [4]), tensor("t", [4], offset=32)], FOUR * 4), "'t' occurs twice"),
    "no dimension": (file([], [tensor("t", [])], FOUR), "has 0 dimensions"),
    "five dimensions": (file([], [tensor("t", [1] * 5)], FOUR), "has 5 dimensions"),
    "2^32 - 1 dimensions": (file([], [tensor("t", [4], n_dims=0xFFFFFFFF)], FOUR), "has 4294967295 dimensions"),
    "a dimension of 0": (file([], [tensor("t", [4, 0])], FOUR), "dimensions [4, 0]"),
    "size 2^64 = 0 in 64 bits": (file([], [tensor("t", [1 << 32, 1 << 30])], FOUR), "but the file has"),
    "size 2^64 + 16 = 16 in 64 bits": (file([], [tensor("t", [(1 << 62) + 4])], FOUR), "but the file has"),
    "four dimensions of 2^63": (file([], [tensor("t", [BIG] * 4)], FOUR), "but the file has"),
    "type -1": (file([], [tensor("t", [4], kind=0xFFFFFFFF)], FOUR), "the unknown type 4294967295"),
    "removed type 4": (file([], [tensor("t", [32], kind=4)], FOUR * 4), "the unknown type 4"),
    "IQ2_XS": (file([], [tensor("t", [256], kind=17)], bytes(74)), "tensor 't' is stored as IQ2_XS; only F32"),
    "IQ4_XS": (file([], [tensor("t", [256], kind=23)], bytes(136)), "tensor 't' is stored as IQ4_XS; only F32"),
    "TQ1_0": (file([], [tensor("t", [256], kind=34)], bytes(54)), "tensor 't' is stored as TQ1_0"),
    "I8": (file([], [tensor("t", [32], kind=24)], bytes(32)), "tensor 't' is stored as I8"),
    **{
        f"{name} with a short last block": (
            file([], [tensor("t", [size], kind=kind)], bytes(512)),
            f"rows of {name} hold a multiple of {block}",
        )
        for name, kind, size, block in (
            ("Q4_0", 2, 33, 32),
            ("Q4_1", 3, 31, 32),
            ("Q8_0", 8, 48, 32),
            ("Q5_0", 6, 16, 32),
            ("Q5_1", 7, 63, 32),
            ("IQ4_NL", 20, 65, 32),
            ("MXFP4", 39, 8, 32),
            ("Q2_K", 10, 255, 256),
            ("Q3_K", 11, 32, 256),
            ("Q4_K", 12, 288, 256),
            ("Q5_K", 13, 128, 256),
            ("Q6_K", 14, 257, 256),
        )
    },
    **{
        f"{name} one byte short": (file([], [tensor("t", [256, 2], kind=kind)], bytes(2 * size - 1)), "ends at byte")
        for name, kind, size in (
            ("Q2_K", 10, 84),
            ("Q3_K", 11, 110),
            ("Q4_K", 12, 144),
            ("Q5_K", 13, 176),
            ("Q6_K", 14, 210),
        )
    },
    "offset unaligned": (
        file([], [tensor("t", [4], offset=8)], FOUR * 2),
        "offset 8, which is no multiple of 32, near",
    ),
    "offset unaligned before others": (
        file([], [tensor("t", [4], offset=8), tensor("u", [4])], FOUR * 2),
        "no multiple of 32, near byte 57.",
    ),
    "offset 2^63": (file([], [tensor("t", [4], offset=BIG)], FOUR), "but the file has"),
    "offset 2^64 - 32": (file([], [tensor("t", [4], offset=(1 << 64) - 32)], FOUR), "but the file has"),
    "one byte short": (file([], [tensor("t", [4])], FOUR[:-1]), "ends at byte"),
    "overlapping": (file([], [tensor("a", [16]), tensor("b", [16], offset=32)], bytes(96)), "'a' and 'b' overlap"),
    "same place": (file([], [tensor("a", [4]), tensor("b", [4])], FOUR), "overlap"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_header_is_refused_at_once(name: str, tmp_path: Path) -> None:
    raw, words = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        GGUFFile(path)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 1000
    assert seconds < 1 and peak < 2_000_000


def test_an_empty_container_and_every_legal_corner_are_read(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(file())
    assert GGUFFile(path).metadata == {} and GGUFFile(path).tensors == {}
    # Version 2, alignment 1 (so the floats lie at an odd byte), four dimensions, an empty array, trailing bytes.
    pairs = [pair(ALIGNMENT, U32, one(1)), array("none", STRING, 0, b""), pair("", U8, b"\7")]
    values = struct.pack("<4f", 1, 2, 3, 4)
    for pad in range(4):
        padded, dims = [*pairs, pair("p" * (pad + 1), U8, b"\0")], [2, 1, 2, 1]
        path.write_bytes(file(padded, [tensor("t", dims)], values + b"tail", version=2, align=1))
        opened = GGUFFile(path)
        assert opened.metadata["none"] == [] and opened.metadata[""] == 7
        assert opened.tensor("t").tolist() == [[[[1.0, 2.0]], [[3.0, 4.0]]]]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        GGUFFile(tmp_path / "x.gguf")


def test_the_package_gguf_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's fault, and not the file's; also where its header alone was read before."""
    (tmp_path / "m.gguf").write_bytes(MODEL)
    opened = GGUFFile(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for ask in (lambda: GGUFFile(tmp_path / "m.gguf"), lambda: opened.tensor("blk.0.attn_q.weight")):
        with pytest.raises(EnvironmentProblem, match="GGUF files need the package gguf: pip install gguf"):
            ask()


@pytest.mark.parametrize("path", ["/absent.gguf", "a\0b.gguf"])
def test_a_missing_file_and_an_impossible_path_are_named(path: str) -> None:
    with pytest.raises(InputError, match=r"cannot open .*\.gguf: (No such file|embedded null).*\. Check") as caught:
        GGUFFile(path)
    assert str(caught.value).count(visible(path)) == 1


LETTERS = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]  # of bytes
TOKENS = [*LETTERS, "he", "Ġhe", "<|im_end|>", "<|x|>"]


def small_model() -> bytes:
    """A one-layer Llama of 32 units with a tokenizer; every part of the format is used."""
    hidden, inner, vocab = 32, 32, len(TOKENS)
    shapes: dict[str, tuple[list[int], int]] = {
        "token_embd.weight": ([hidden, vocab], 1),
        "output_norm.weight": ([hidden], 0),
        "blk.0.attn_norm.weight": ([hidden], 0),
        "blk.0.ffn_norm.weight": ([hidden], 0),
        **{f"blk.0.attn_{part}.weight": ([hidden, hidden], 2) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": ([hidden, inner], 8) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": ([inner, hidden], 3),
    }
    tensors, data = [], b""
    for name, (dims, kind) in shapes.items():
        tensors.append(tensor(name, dims, kind, len(data)))
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        total = math.prod(dims) // block * size
        data += (bytes(range(1, 60)) * (total // 59 + 1))[:total]
        data += bytes(-len(data) % 32)
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": hidden, "feed_forward_length": inner}
    numbers |= {"attention.head_count": 1}
    pairs = [
        pair("general.architecture", STRING, text("llama")),
        *(pair(f"llama.{key}", U32, one(value)) for key, value in numbers.items()),
        pair("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        pair("tokenizer.ggml.model", STRING, text("gpt2")),
        pair("tokenizer.ggml.pre", STRING, text("smollm")),
        array("tokenizer.ggml.tokens", STRING, vocab, b"".join(map(text, TOKENS))),
        array("tokenizer.ggml.token_type", I32, vocab, struct.pack(f"<{vocab}i", *[1] * (vocab - 2), 3, 4)),
        array("tokenizer.ggml.merges", STRING, 2, text("h e") + text("Ġ he")),
        pair("tokenizer.ggml.eos_token_id", U32, one(vocab - 2)),
        pair("tokenizer.ggml.add_bos_token", BOOL, b"\0"),
    ]
    return file(pairs, tensors, data)


MODEL = small_model()
HEADER = MODEL.index(b"blk.0.ffn_down.weight") + 60
PLACES = st.integers(0, HEADER) | st.integers(0, len(MODEL) - 1)


def use(path: Path) -> int:
    """Everything that a GGUF can be asked for; returns how many tensors came out."""
    opened = GGUFFile(path)
    tokenizer = gguf_tokenizer(opened.metadata)
    ids, _ = tokenizer.encode_with_offsets("he said 12 <|x|>\n<|im_end|>é")
    tokenizer.decode(ids)
    return len(load_decoder(path).state_dict())


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Cut at every byte of the header (the long list of tokens at each 20th) and all along the data."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(MODEL)
    assert use(path) == 12  # the tied head is counted twice
    tokens, types = MODEL.index(b"ggml.tokens"), MODEL.index(b"ggml.token_type")
    merges = MODEL.index(b"ggml.merges")
    sizes = {*range(tokens + 60), *range(tokens, types, 20), *range(types, types + 60), *range(types, merges, 7)}
    sizes |= {*range(merges, HEADER), *range(HEADER, len(MODEL) - 31, 500), len(MODEL) - 32}
    for size in sorted(sizes):
        path.write_bytes(MODEL[:size])
        with pytest.raises(InputError, match=r"has \d+ bytes|the file ends|does not fit|cut short"):
            GGUFFile(path)


CHANGES = st.lists(st.tuples(PLACES, st.binary(min_size=1, max_size=9), st.booleans()), min_size=1, max_size=5)


def read_or_refused(factory: pytest.TempPathFactory, changes: list[tuple[int, bytes, bool]]) -> None:
    raw = MODEL
    for at, run, insert in changes:
        raw = raw[:at] + run + raw[at + (0 if insert else len(run)) :]
    path = factory.getbasetemp() / "changed.gguf"
    path.write_bytes(raw)
    began = time.process_time()
    try:
        use(path)
    except InputError as error:
        assert len(str(error)) < 2000
    assert time.process_time() - began < 2


@settings(max_examples=800)
@given(CHANGES)
def test_changed_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    """No other exception, no hang, no large allocation, whatever bytes are overwritten or put in."""
    read_or_refused(tmp_path_factory, changes)


@pytest.mark.slow
@settings(max_examples=20_000)
@given(CHANGES)
def test_20000_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    read_or_refused(tmp_path_factory, changes)
