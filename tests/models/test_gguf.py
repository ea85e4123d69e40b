"""GGUF files against their oracles: gguf-py's writer and decoder, and blocks decoded by hand."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor

from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_tensors import decode, halves_from_pairs
from fourbit.models.spec import Spec

FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
BLOCKS = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


# ---- the container


def test_every_kind_of_value_survives_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("string", "naïve 日本 😀\n\0")
    writer.add_array("strings", ["", "a", "é"])
    writer.add_array("integers", [-1, 0, 2**31 - 1])
    writer.add_array("floats", [0.5, -2.0])
    writer.add_array("truths", [True, False])
    finish(writer)
    expected: dict[str, Any] = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "u64": 2**64 - 1,
        "i64": -(2**63), "f32": float(np.float32(0.1)), "f64": 0.1, "yes": True, "no": False,
        "string": "naïve 日本 😀\n\0", "strings": ["", "a", "é"], "integers": [-1, 0, 2**31 - 1], "floats": [0.5, -2.0],
        "truths": [True, False], "general.architecture": "llama",
    }  # fmt: skip
    found = GGUFFile(path).metadata
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}
    assert plain == expected
    assert {key: type(value) for key, value in plain.items()} == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_tensors_of_every_format_lie_where_the_writer_put_them(alignment: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "tensors.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    values: dict[str, np.ndarray[Any, Any]] = {}
    for kind in FORMATS:
        for shape in ((64,), (3, 32), (2, 5, 96), (2, 1, 3, 32)):
            name = f"{kind}{shape}"
            stored = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), Kind[kind])
            values[name] = gguf.quants.dequantize(stored, Kind[kind])
            writer.add_tensor(name, stored, raw_dtype=Kind[kind])
    finish(writer)
    opened = GGUFFile(path)
    assert list(opened.tensors) == list(values)
    for name, expected in values.items():
        ours = opened.tensor(name)
        assert ours.shape == expected.shape, name
        assert torch.equal(ours.float(), torch.from_numpy(expected)), name


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    raw = gguf.quants.quantize(np.random.default_rng(4).standard_normal((24, 64), dtype=np.float32), Kind.Q8_0)
    flat = raw.reshape(-1)
    whole = decode(flat, "Q8_0", (24, 64), interleaved_heads=3)
    pairs = decode(flat, "Q8_0", (24, 64))
    assert torch.equal(whole, halves_from_pairs(pairs, 3)) and not torch.equal(whole, pairs)
    for chunk in (1, 64 * 8, 64 * 9, 64 * 16):
        monkeypatch.setattr("fourbit.models.gguf_tensors.CHUNK_ELEMENTS", chunk)
        assert torch.equal(decode(flat, "Q8_0", (24, 64), interleaved_heads=3), whole), chunk
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
    ours = next(tensor for name, tensor in opened.iter_tensors() if name == "model.layers.0.self_attn.q_proj.weight")
    head, size = 5, 64
    for i in (0, 1, 31, 32, 33, 63):  # row i of a head lies at 2i in the file (first half) or 2(i - 32) + 1 (second)
        row = rows[head * size + (2 * i if i < 32 else 2 * (i - 32) + 1)].tobytes()
        expected = [value for start in range(0, len(row), 20) for value in by_hand("Q4_1", row[start : start + 20])]
        torch.testing.assert_close(ours[head * size + i], torch.tensor(expected), rtol=1e-6, atol=1e-6)


# ---- the order of rotary rows


def llama_cpp_rows(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's converter: the two rotary halves of each head interleaved."""
    count, *rest = weight.shape
    return weight.reshape(heads, 2, count // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 4), (5, 6), (7, 64)])
def test_rows_are_put_back_by_the_inverse_of_the_converters_order(heads: int, size: int) -> None:
    weight = torch.arange(heads * size * 3.0).view(heads * size, 3)
    forward = llama_cpp_rows(weight, heads)
    assert torch.equal(halves_from_pairs(forward, heads), weight)
    if size > 2:
        assert not torch.equal(forward, weight)  # else the test shows nothing


def test_a_head_count_that_does_not_divide_is_a_programmers_error() -> None:
    with pytest.raises(ValueError, match="30 rows cannot be split into 4 heads"):
        decode(np.zeros(30 * 4, dtype=np.uint8), "F32", (30, 1), interleaved_heads=4)


def test_smollm2_describes_itself(smollm2: Path) -> None:
    assert GGUFFile(smollm2).spec() == Spec(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=100000.0, vocab_size=49152,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
