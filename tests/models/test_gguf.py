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
from fourbit.models.spec import Rope, Spec

# Kind -> values and bytes of a block, and where its fp16 scales lie.
BLOCKS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "Q4_0": (32, 18, (0,)), "Q4_1": (32, 20, (0, 2)), "Q5_0": (32, 22, (0,)), "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)), "IQ4_NL": (32, 18, (0,)), "MXFP4": (32, 17, ()), "Q2_K": (256, 84, (80, 82)),
    "Q3_K": (256, 110, (108,)), "Q4_K": (256, 144, (0, 2)), "Q5_K": (256, 176, (0, 2)), "Q6_K": (256, 210, (208,)),
}  # fmt: skip


def random_rows(kind: str, rows: int, size: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Rows of random blocks, every code and inner scale, with outer scales of a size that weights have."""
    values, length, scales = BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows * size // values, length), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(120, 128, len(blocks))
    return blocks.reshape(rows, -1)


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
            for shape in ((256,), (3, 256), (2, 5, 512), (2, 1, 3, 256)):
                name = f"{kind}{shape}"
                if kind in BLOCKS:
                    stored = random_rows(kind, int(np.prod(shape[:-1], dtype=int)), shape[-1], rng)
                    stored = stored.reshape(*shape[:-1], -1)
                else:
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
    values, length, _ = BLOCKS[kind]
    raw = np.random.default_rng(1).integers(0, 256, (100, 10 * length), dtype=np.uint8)
    with np.errstate(all="ignore"):  # gguf-py warns of infinite scales; ours must not
        theirs = gguf.quants.dequantize(raw, Kind[kind])
    assert same_bits(decode(raw.reshape(-1), kind, (100, 10 * values)), theirs)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_float_formats_keep_their_dtype_and_every_bit(kind: str, dtype: torch.dtype) -> None:
    raw = np.random.default_rng(2).integers(0, 256, 4096 * dtype.itemsize, dtype=np.uint8)
    ours = decode(raw, kind, (64, 64))
    assert ours.dtype == dtype
    assert ours.view(torch.uint8).numpy().tobytes() == raw.tobytes()


NL4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nibbles(packed: bytes) -> list[int]:
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def six_bits(packed: bytes) -> tuple[list[int], list[int]]:
    """The eight scales and eight minima of Q4_K and Q5_K: six bits each, the last four's upper two set apart."""
    scales = [packed[i] & 63 for i in range(4)] + [packed[8 + i] & 15 | packed[i] >> 6 << 4 for i in range(4)]
    lows = [packed[4 + i] & 63 for i in range(4)] + [packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4 for i in range(4)]
    return scales, lows


def by_hand(kind: str, block: bytes) -> list[float]:
    """One block, value by value, straight from the format's description (ggml-common.h), in double precision."""
    d, m = ([struct.unpack_from("<e", block, at)[0] for at in BLOCKS[kind][2]] + [0.0, 0.0])[:2]
    if kind == "Q8_0":
        return [d * code for code in struct.unpack_from("<32b", block, 2)]
    if kind in ("Q4_0", "Q4_1"):
        return [d * code + (m if kind == "Q4_1" else -8 * d) for code in nibbles(block[-16:])]
    if kind in ("Q5_0", "Q5_1"):
        high = int.from_bytes(block[-20:-16], "little")
        codes = [code | (high >> i & 1) << 4 for i, code in enumerate(nibbles(block[-16:]))]
        return [d * code + (m if kind == "Q5_1" else -16 * d) for code in codes]
    if kind == "IQ4_NL":
        return [d * NL4[code] for code in nibbles(block[2:])]
    if kind == "MXFP4":
        return [2.0 ** (block[0] - 127) * FP4[code & 7] * (-1 if code & 8 else 1) for code in nibbles(block[1:])]
    out = []
    for i in range(256):
        half, quarter, sixteenth, at = i // 128, i // 32 % 4, i // 16, i % 32  # of 256 values; place in a run of 32
        if kind == "Q2_K":
            code = block[16 + 32 * half + at] >> 2 * quarter & 3
            out.append(d * (block[sixteenth] & 15) * code - m * (block[sixteenth] >> 4))
        elif kind == "Q3_K":
            code = (block[32 + 32 * half + at] >> 2 * quarter & 3) - (0 if block[at] >> i // 32 & 1 else 4)
            low = block[96 + sixteenth % 8] >> (4 if sixteenth >= 8 else 0) & 15
            scale = (low | (block[104 + sixteenth % 4] >> 2 * (sixteenth // 4) & 3) << 4) - 32
            out.append(d * scale * code)
        elif kind in ("Q4_K", "Q5_K"):
            scales, lows = six_bits(block[4:16])
            code = block[-128 + 32 * (i // 64) + at] >> (4 if i // 32 % 2 else 0) & 15
            code |= (block[16 + at] >> i // 32 & 1) << 4 if kind == "Q5_K" else 0
            out.append(d * scales[i // 32] * code - m * lows[i // 32])
        else:  # Q6_K
            low = block[64 * half + i % 64] >> (4 if i // 64 % 2 else 0) & 15
            code = (low | (block[128 + 32 * half + at] >> 2 * quarter & 3) << 4) - 32
            out.append(d * struct.unpack_from("b", block, 192 + sixteenth)[0] * code)
    return out


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_decode_as_their_description_says(kind: str) -> None:
    raw = random_rows(kind, 20, BLOCKS[kind][0], np.random.default_rng(3))
    for block in raw:
        ours, expected = decode(block, kind, (BLOCKS[kind][0],)), by_hand(kind, block.tobytes())
        # Products are exact in float64 and rounded once or twice in fp32, relative to the larger addend.
        torch.testing.assert_close(ours.double(), torch.tensor(expected).double(), rtol=1e-6, atol=2e-4)


def test_decoding_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = gguf.quants.quantize(np.random.default_rng(4).standard_normal((24, 64), dtype=np.float32), Kind.Q8_0)
    whole = decode(flat.reshape(-1), "Q8_0", (24, 64))
    for chunk in (1, 64 * 8, 64 * 9, 64 * 16, 1 << 20):
        monkeypatch.setattr("fourbit.models.gguf.CHUNK_ELEMENTS", chunk)
        assert torch.equal(decode(flat.reshape(-1), "Q8_0", (24, 64)), whole), chunk


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "MXFP4"])
def test_a_large_tensor_is_decoded_in_little_memory_beside_its_output(kind: str) -> None:
    """NumPy's allocations are traced, torch's output is not: 32 MB of values come out of a few MB of temporaries."""
    values, length, _ = BLOCKS[kind]
    raw = np.zeros(2048 * 4096 // values * length, dtype=np.uint8)
    tracemalloc.start()
    out = decode(raw, kind, (2048, 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.nbytes == 32 << 20
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
        num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope=Rope(100000.0), vocab_size=49152,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
