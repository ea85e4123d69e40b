"""NF4 and FP4: the bytes and values of bitsandbytes, the quick path against the reference, what quantising promises."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import codes, dequantize4bit, dispatch, quantize4bit
from fourbit.kernels.codes import code_for
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.weight4bit import flatten
from fourbit.nf4 import Weight4bit, dequantize, quantize

# Where there is a GPU kernels are compiled for it, and take no tensors of the CPU.
PATHS = [path for path in dispatch.PATHS if path != "triton" or not torch.cuda.is_available()]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = ("nf4", "fp4")
SHAPES = ((1,), (2,), (3,), (7, 9), (64,), (63,), (65,), (33, 31, 3), (96, 128), (4096,), (4095,), (4097,), (3, 4099))


def shapes_for(path: str) -> tuple[tuple[int, ...], ...]:
    """Fewer for kernels, which the interpreter runs slowly; files of their own hold those to the reference."""
    return SHAPES if path != "triton" else ((1,), (7, 9), (33, 31, 3), (96, 128), (4097,))


def random_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values with zeros, signed zeros, one outlier and repeated magnitudes among them."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(torch.Size(shape).numel(), generator=generator) * 0.05
    flat[::7] = 0.0
    flat[3::11] = -0.0
    flat[5::13] = 0.25
    flat[-1] = -1.5
    return flat.view(shape).to(dtype)


@st.composite
def awkward_values(draw: st.DrawFn) -> Tensor:
    """fp32 vectors that sit on the decisions: code values, midpoints and their neighbours, times a scale."""
    code = code_for(draw(st.sampled_from(TYPES))).sort().values
    points = torch.cat([code, (code[:-1] + code[1:]) / 2, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-3])])
    n = draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = points[torch.randint(len(points), (n,), generator=generator)]
    toward = torch.randint(-1, 2, (n,), generator=generator).float() * 9
    nudged = torch.where(toward == 0, values, torch.nextafter(values, toward))
    scale = draw(st.sampled_from([1.0, 0.1, 3e38, 1e-20, 1e-37, 1e-40, 0.0])) * draw(st.floats(0.25, 1))
    return nudged * scale


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bytes_and_scales_equal_bitsandbytes(oracle: Any, quant_type: str, blocksize: int, path: str) -> None:
    for shape in shapes_for(path):
        for dtype in DTYPES:
            weight = random_weight(shape, dtype)
            with force_path(path):
                made = quantize(weight, quant_type, blocksize)
            want_packed, want_absmax = oracle.quantize(weight, quant_type, blocksize)
            assert made.shape == shape and made.check() is made
            assert torch.equal(made.packed.view(-1, 1), want_packed), (shape, dtype)
            assert torch.equal(made.absmax.view(-1), want_absmax), (shape, dtype)


@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_of_whole_blocks_are_rows_of_what_is_stored(double_quant: bool) -> None:
    """So that cutting the packed bytes and the scales on rows is cutting the weight; other weights are flat."""
    made = quantize(random_weight((6, 128)), blocksize=32, double_quant=double_quant)
    assert made.packed.shape == (6, 64) and made.absmax.shape == (6, 4)
    assert (made.nested_offset is None) != double_quant and (
        made.nested_offset is None or made.nested_offset.shape == (1,)
    )
    part = made._replace(packed=made.packed[2:4], absmax=made.scales[2:4], nested_absmax=None, nested_offset=None)
    assert torch.equal(dequantize(part._replace(shape=(2, 128))), dequantize(made)[2:4])
    made = quantize(random_weight((2, 3, 128)), blocksize=32, double_quant=double_quant)
    assert made.packed.shape == (2, 3, 64) and made.absmax.shape == (2, 3, 4)
    for shape in ((6, 129), (6 * 128,), (2, 3, 7)):
        made = quantize(random_weight(shape), blocksize=32, double_quant=double_quant)
        assert made.packed.dim() == made.absmax.dim() == 1


@given(awkward_values(), st.sampled_from(TYPES), st.sampled_from(BLOCKSIZES))
@settings(max_examples=100)
def test_bytes_equal_bitsandbytes_on_ties(oracle: Any, weight: Tensor, quant_type: str, blocksize: int) -> None:
    want_packed, want_absmax = oracle.quantize(weight, quant_type, blocksize)
    for path in PATHS:
        with force_path(path):
            made = quantize(weight, quant_type, blocksize)
        assert torch.equal(made.packed, want_packed.view(-1)) and torch.equal(made.absmax, want_absmax), path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_values_equal_bitsandbytes(oracle: Any, quant_type: str, blocksize: int, path: str) -> None:
    for shape in shapes_for(path):
        made = quantize(random_weight(shape), quant_type, blocksize)
        packed, absmax = made.packed.view(-1, 1), made.absmax.view(-1)
        for dtype in DTYPES:
            with force_path(path):
                got = dequantize(made, dtype)
            want = oracle.dequantize(packed, absmax, got.numel(), quant_type, blocksize, dtype)
            assert got.shape == shape and torch.equal(got.view(-1), want), (shape, dtype)


def test_a_whole_matrix_equals_bitsandbytes_as_its_users_call_it(oracle: Any) -> None:
    weight = random_weight((128, 512), torch.bfloat16)
    packed, state = oracle.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    got = dequantize(Weight4bit(packed, state.absmax, None, None, (128, 512)), torch.bfloat16)
    assert torch.equal(got, oracle.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", TYPES)
def test_every_pattern_packs_as_the_reference_does(quant_type: str) -> None:
    """All upper halves of fp32 numbers up to 1, with the lower halves at which a decision can turn."""
    code = code_for(quant_type).sort().values
    midpoints = (code[:-1] + code[1:]) / 2
    near = torch.cat([midpoints, torch.nextafter(midpoints, code[1:]), torch.nextafter(midpoints, code[:-1])])
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).unsqueeze(1) << 16
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
    values = torch.cat([(patterns | lows).view(-1).view(torch.float32), near, near[:1]])
    values = values[values.abs() <= 1 + 2**-22]  # a scaled value can pass 1 by a rounding or two
    values = values[: values.numel() // 2 * 2]
    got, want = torch.empty(2, values.numel() // 2, dtype=torch.uint8)
    quantize4bit._pack_by_pattern(values, quant_type, got)
    quantize4bit.pack_reference(values, quant_type, want)
    assert torch.equal(got, want)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", [32, 4096])
@pytest.mark.parametrize("extra", [0, 1, 2, 3, 4099])
def test_paths_agree_across_chunks(
    monkeypatch: pytest.MonkeyPatch, quant_type: str, blocksize: int, extra: int
) -> None:
    """More than two chunks and a ragged end; the reference sees the same pieces whole."""
    n = 2 * 8192 + extra
    weight = random_weight((n,), seed=extra)
    with force_path("reference"):
        want = quantize(weight, quant_type, blocksize)
        want_values = dequantize(want)
    assert quantize4bit.CHUNK % 8192 == dequantize4bit.CHUNK % 8192 == 0, "chunks are whole blocks"
    monkeypatch.setattr(quantize4bit, "CHUNK", 8192)
    monkeypatch.setattr(dequantize4bit, "CHUNK", 8192)
    got = quantize(weight, quant_type, blocksize)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(dequantize(got, dtype), want_values.to(dtype)), dtype


@pytest.mark.parametrize("quant_type", TYPES)
def test_every_byte_decodes(quant_type: str) -> None:
    packed = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8).view(-1, 1)
    absmax = torch.rand(packed.numel() * 2 // 64, generator=torch.Generator().manual_seed(0)) + 0.01
    results = []
    for path in PATHS:
        with force_path(path):
            results.append(dequantize(Weight4bit(packed, absmax, None, None, (packed.numel() * 2,), quant_type)))
    assert all(torch.equal(result, results[0]) for result in results)


@given(st.integers(0, 700), st.integers(0, 3))
def test_packed_may_lie_anywhere(n: int, skip: int) -> None:
    made = quantize(random_weight((n + 1,))[:n])
    moved = made._replace(packed=torch.cat([made.packed.new_zeros(skip), made.packed])[skip:])
    assert torch.equal(dequantize(moved), dequantize(made))


def test_the_cpu_takes_the_quick_path_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def tripped(*_: object) -> None:
        raise AssertionError("quick path")

    monkeypatch.setattr(dequantize4bit, "_decode_pairs", tripped)
    monkeypatch.setattr(quantize4bit, "_pack_by_pattern", tripped)
    weight = random_weight((64,))
    with force_path("reference"):
        made = quantize(weight)
        dequantize(made)
    with pytest.raises(AssertionError, match="quick path"):
        quantize(weight)
    with pytest.raises(AssertionError, match="quick path"):
        dequantize(made)


@given(
    st.integers(1, 400),
    st.sampled_from([("nf4", 0.1519039), ("fp4", 0.1666670)]),
    st.sampled_from(BLOCKSIZES),
    st.floats(-30, 30),
    st.sampled_from(["normal", "uniform", "heavy"]),
    st.integers(0, 2**31),
)
@settings(max_examples=200)
def test_error_is_at_most_half_the_widest_gap(
    n: int, type_and_bound: tuple[str, float], blocksize: int, log2_scale: float, kind: str, seed: int
) -> None:
    """Half the gap from -1 to -0.696 is 0.1519036, from 2/3 to 1 is 1/6; the rest pays for the fp32 roundings."""
    quant_type, bound = type_and_bound
    weight = draw_weight(n, kind, seed) * 2.0**log2_scale
    made = quantize(weight, quant_type, blocksize)
    error = (dequantize(made).double() - weight.double()).abs()
    assert bool((error <= bound * made.absmax.double().repeat_interleave(blocksize)[:n]).all())


@given(st.integers(1, 400), st.sampled_from(TYPES), st.sampled_from(BLOCKSIZES), st.integers(0, 2**31))
def test_each_code_is_the_nearest(n: int, quant_type: str, blocksize: int, seed: int) -> None:
    """No other code is nearer by more than the roundings of scaling: 4 units of 2^-24 of absmax."""
    weight = draw_weight(n, "heavy", seed)
    packed, absmax, *_ = quantize(weight, quant_type, blocksize)
    scales = absmax.double().repeat_interleave(blocksize)[:n]
    candidates = code_for(quant_type).double() * scales.unsqueeze(1)  # [n, 16], exact
    nibbles = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:n].long()
    distances = (candidates - weight.double().unsqueeze(1)).abs()
    chosen = distances.gather(1, nibbles.unsqueeze(1)).squeeze(1)
    assert bool((chosen <= distances.amin(1) + 4 * 2.0**-24 * scales).all())


@given(st.integers(0, 2**31), st.sampled_from(TYPES), st.sampled_from(BLOCKSIZES), st.floats(1e-30, 1e30))
def test_code_values_times_a_scale_come_back_exactly(seed: int, quant_type: str, blocksize: int, scale: float) -> None:
    code = code_for(quant_type)
    weight = code[torch.randint(16, (3 * blocksize + 5,), generator=torch.Generator().manual_seed(seed))]
    weight[::blocksize] = 1.0  # each block then has absmax = scale
    weight = weight * torch.tensor(scale)
    assert torch.equal(dequantize(quantize(weight, quant_type, blocksize)), weight)


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_zero_blocks_stay_zero(quant_type: str, byte: int) -> None:
    made = quantize(torch.zeros(2, 50), quant_type)  # one whole block, one short one
    assert made.packed.unique().tolist() == [byte]
    assert made.absmax[0] == 0 and made.absmax[1] == torch.tensor(1e-38)
    assert not dequantize(made).any()


def test_relative_error_on_normal_weights_is_the_known_one() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    made = [dequantize(quantize(weight, double_quant=nested)) for nested in (False, True)]
    relative = [float((values - weight).norm() / weight.norm()) for values in made]
    assert relative[0] == pytest.approx(0.0920, abs=5e-4)
    assert abs(relative[1] - relative[0]) < 5e-4


def test_double_quantisation_costs_at_most_4_13_bits_a_parameter() -> None:
    """The linears of SmolLM2-135M (30 layers), from the bytes of what is stored, the two code tables counted once."""
    stored, parameters = (16 + 256) * 4, 0
    for shape, count in {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}.items():
        made = quantize(torch.ones(shape), double_quant=True)
        stored += count * sum(tensor.nbytes for tensor in made[:4])
        parameters += count * torch.Size(shape).numel()
    assert parameters == 106_168_320
    assert 8 * stored / parameters <= 4.13


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)])
def test_empty_tensors_quantise_to_nothing(shape: tuple[int, ...], path: str) -> None:
    with force_path(path):
        made = quantize(torch.empty(shape))
        assert made.packed.numel() == made.absmax.numel() == 0
        assert dequantize(made).shape == shape


@pytest.mark.parametrize("path", PATHS)
def test_other_layouts_and_fp64_are_the_same_weight(path: str) -> None:
    weight = random_weight((40, 24))
    want = quantize(weight)
    strided = torch.stack([weight, weight], dim=2).flatten(1)[:, ::2]
    for same in (weight.T.contiguous().T, strided, weight.double(), weight.clone().requires_grad_()):
        with force_path(path):
            got = quantize(same)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert not got[1].requires_grad
    assert quantize(torch.tensor(3.0))[1].tolist() == [3.0]  # 0-d is one value


@pytest.mark.parametrize("path", PATHS)
def test_defaults_of_the_caller_change_nothing(path: str) -> None:
    """A default dtype of bf16 and tables first made on the meta device, as a loader may have it."""
    weight = random_weight((30, 67))
    want = quantize(weight)
    values = dequantize(want)
    for cached in (quantize4bit._pattern_tables, codes._kept):
        cached.cache_clear()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with force_path(path), torch.device("meta"):
            got = quantize(weight)
            out = dequantize(got, torch.float16)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(out, values.half())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_memory_with_huge_pages_is_memory_all_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    made = quantize(random_weight((33, 35)))
    want = dequantize(made, dtype)
    monkeypatch.setattr(dequantize4bit, "HUGE_PAGES_FROM", 1)
    got = dequantize(made, dtype)
    assert torch.equal(got, want) and got.dtype == dtype and got.is_contiguous()
    got.add_(1)  # writable


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of Triton's interpreter: Inf * 0
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 63, 130, 4100])
@pytest.mark.parametrize("path", PATHS)
def test_non_finite_weights_are_refused(bad: float, where: int, path: str) -> None:
    weight = torch.ones(4101)
    weight[where] = bad
    with (
        force_path(path),
        pytest.raises(ValueError, match=rf"must be finite in fp32, got {bad} at flat index {where} of"),
    ):
        quantize(weight)


def test_fp64_beyond_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 1e\+300 at flat index 2 of a \(2, 2\) tensor \(1 of 1 blocks"):
        quantize(torch.tensor([[1.0, 2.0], [1e300, 3.0]], dtype=torch.float64))


@pytest.mark.parametrize("blocksize", [0, -64, 1, 16, 48, 100, 8192])
def test_other_block_sizes_are_refused(blocksize: int) -> None:
    made = quantize(torch.ones(64))
    rule = f"blocksize must be a power of two from 32 to 4096, got {blocksize}"
    with pytest.raises(ValueError, match=rule):
        quantize(torch.ones(64), blocksize=blocksize)
    with pytest.raises(ValueError, match=rule):
        dequantize(made._replace(blocksize=blocksize))


def test_unknown_types_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got 'int8'"):
        quantize(torch.ones(64), "int8")
    with pytest.raises(ValueError, match="only floating-point tensors can be quantised, got"):
        quantize(torch.ones(64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16, float16 or float64, got torch\.int8"):
        dequantize(quantize(torch.ones(64)), torch.int8)


def test_sizes_that_disagree_are_refused() -> None:
    made = quantize(torch.ones(10, 10))
    with pytest.raises(ValueError, match=r"102 values of shape \(102,\) need 51 packed uint8 bytes, got 50"):
        dequantize(made._replace(shape=(102,)))
    with pytest.raises(ValueError, match="100 values in blocks of 32 need 4 fp32 scales, got 2"):
        dequantize(made._replace(blocksize=32))


def draw_weight(n: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(n, generator=generator) * 2 - 1
    normal = torch.randn(n, generator=generator)
    return normal**3 if kind == "heavy" else normal


@pytest.mark.parametrize("nested", [False, True])
def test_decoding_is_one_node_for_torch_compile(nested: bool) -> None:
    made = quantize(torch.randn(6, 64), double_quant=nested)
    torch.library.opcheck(dequantize4bit._in_graph, (*flatten([made]), torch.bfloat16))

    def decode() -> Tensor:
        return dequantize(made)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), decode())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(6, 64), (3, 33), (7,)])
def test_quantising_is_one_node_for_torch_compile(shape: tuple[int, ...], double_quant: bool) -> None:
    weight = random_weight(shape).requires_grad_()
    torch.library.opcheck(quantize4bit._in_graph, (weight.detach(), "nf4", 64, double_quant))
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(weight, double_quant=double_quant), quantize(weight, double_quant=double_quant), strict=True
    ):
        assert torch.equal(got, want) if isinstance(want, Tensor) else got == want
