"""GGUF files against their oracles: gguf-py's writer and decoder, and blocks decoded by hand."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor

from fourbit.models.gguf import READABLE, GGUFFile, decode
from fourbit.models.gguf_model import iter_tensors, read_spec
from fourbit.models.spec import Spec

BLOCKS = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


# ---- the container


VALUES: dict[str, tuple[str, Any]] = {
    "u8": ("uint8", 255), "i8": ("int8", -128), "u16": ("uint16", 65535), "i16": ("int16", -32768),
    "u32": ("uint32", 2**32 - 1), "i32": ("int32", -(2**31)), "u64": ("uint64", 2**64 - 1), "i64": ("int64", -(2**63)),
    "f32": ("float32", float(np.float32(0.1))), "f64": ("float64", 0.1), "yes": ("bool", True), "no": ("bool", False),
    "string": ("string", "naïve 日本 😀\n\0"), "strings": ("array", ["", "a", "é"]),
    "integers": ("array", [-1, 0, 2**31 - 1]), "floats": ("array", [0.5, -2.0]), "truths": ("array", [True, False]),
}  # fmt: skip


def test_every_kind_of_value_survives_the_writer(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(lambda w: [getattr(w, f"add_{kind}")(key, value) for key, (kind, value) in VALUES.items()])
    expected = {key: value for key, (_, value) in VALUES.items()} | {"general.architecture": "llama"}
    found = GGUFFile(path).metadata
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}
    assert plain == expected
    assert {key: type(value) for key, value in plain.items()} == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_tensors_of_every_format_lie_where_the_writer_put_them(alignment: int, write_gguf: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray[Any, Any]] = {}

    def fill(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        for kind in READABLE:
            for shape in ((64,), (3, 32), (2, 5, 96), (2, 1, 3, 32)):
                name = f"{kind}{shape}"
                stored = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), Kind[kind])
                values[name] = gguf.quants.dequantize(stored, Kind[kind])
                writer.add_tensor(name, stored, raw_dtype=Kind[kind])

    opened = GGUFFile(write_gguf(fill))
    assert list(opened.tensors) == list(values)
    for name, expected in values.items():
        ours = opened.tensor(name)
        assert ours.shape == expected.shape, name
        assert torch.equal(ours.float(), torch.from_numpy(expected)), name


# ---- decoding


def same_bits(ours: Tensor, theirs: np.ndarray[Any, Any]) -> bool:
    return np.array_equal(ours.float().numpy().view(np.int32), theirs.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_decode_bit_for_bit_as_gguf_py_does(kind: str) -> None:
    """Random bytes, so every code and every sort of scale occurs: subnormal, infinite, NaN."""
    raw = np.random.default_rng(1).integers(0, 256, (100, 40 * BLOCKS[kind]), dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # gguf-py warns of infinite scales; ours must not
        theirs = gguf.quants.dequantize(raw, Kind[kind])
    assert same_bits(decode(raw.reshape(-1), kind, (100, 40 * 32)), theirs)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_float_formats_keep_their_dtype_and_every_bit(kind: str, dtype: torch.dtype) -> None:
    raw = np.random.default_rng(2).integers(0, 256, 4096 * dtype.itemsize, dtype=np.uint8)
    ours = decode(raw, kind, (64, 64))
    assert ours.dtype == dtype
    assert ours.view(torch.uint8).numpy().tobytes() == raw.tobytes()


def by_hand(kind: str, block: bytes) -> list[float]:
    """One block, straight from the format's description: scale d (fp16), minimum m (fp16, Q4_1), 32 codes."""
    d = struct.unpack_from("<e", block)[0]
    if kind == "Q8_0":
        return [d * code for code in struct.unpack_from("<32b", block, 2)]
    m = struct.unpack_from("<e", block, 2)[0] if kind == "Q4_1" else -8 * d
    packed = block[-16:]
    return [d * code + m for code in [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]]


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_decode_as_their_description_says(kind: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        block = bytearray(rng.integers(0, 256, BLOCKS[kind], dtype=np.uint8).tobytes())
        block[:2] = np.float16(rng.normal()).tobytes()
        if kind == "Q4_1":
            block[2:4] = np.float16(rng.normal()).tobytes()
        ours = decode(np.frombuffer(bytes(block), np.uint8), kind, (32,))
        # d * code is exact in float64 and rounded once or twice in fp32: at most 2 ulp of the larger addend.
        torch.testing.assert_close(ours.double(), torch.tensor(by_hand(kind, bytes(block))).double(), rtol=0, atol=1e-4)


def test_decoding_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they change the order of rotary rows: in each of 3 heads pairs side by side become two halves."""
    raw = gguf.quants.quantize(np.random.default_rng(4).standard_normal((24, 64), dtype=np.float32), Kind.Q8_0)
    flat = raw.reshape(-1)
    pairs = decode(flat, "Q8_0", (24, 64))
    halves = pairs.view(3, 4, 2, 64).transpose(1, 2).reshape(24, 64)
    for chunk in (1, 64 * 8, 64 * 9, 64 * 16, 1 << 20):
        monkeypatch.setattr("fourbit.models.gguf.CHUNK_ELEMENTS", chunk)
        assert torch.equal(decode(flat, "Q8_0", (24, 64), interleaved_heads=3), halves), chunk
        assert torch.equal(decode(flat, "Q8_0", (24, 64)), pairs), chunk


def test_a_large_tensor_is_decoded_in_little_memory_beside_its_output() -> None:
    """NumPy's allocations are traced, torch's output is not: 64 MB of values come out of a few MB of temporaries."""
    raw = np.zeros(4096 * 4096 // 32 * 34, dtype=np.uint8)
    tracemalloc.start()
    out = decode(raw, "Q8_0", (4096, 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.nbytes == 64 << 20
    assert peak < 32 << 20


def test_smollm2_values_are_those_of_its_raw_blocks(smollm2: Path) -> None:
    """A head of the first query projection, decoded and reordered by hand."""
    opened = GGUFFile(smollm2)
    info = opened.tensors["blk.0.attn_q.weight"]
    assert (info.format, info.shape) == ("Q4_1", (576, 576))
    rows = np.fromfile(smollm2, np.uint8, info.nbytes, offset=info.start).reshape(576, -1)
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = next(tensor for found, tensor in iter_tensors(opened, read_spec(opened)) if found == name)
    head, size = 5, 64
    for i in (0, 1, 31, 32, 33, 63):  # row i of a head lies at 2i in the file (first half) or 2(i - 32) + 1 (second)
        row = rows[head * size + (2 * i if i < 32 else 2 * (i - 32) + 1)].tobytes()
        expected = [value for start in range(0, len(row), 20) for value in by_hand("Q4_1", row[start : start + 20])]
        torch.testing.assert_close(ours[head * size + i], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_smollm2_describes_itself(smollm2: Path) -> None:
    assert read_spec(GGUFFile(smollm2)) == Spec(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=100000.0, vocab_size=49152,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
