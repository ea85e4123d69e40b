"""8-bit blockwise quantisation: nearest by exact arithmetic, never worse than bitsandbytes, its codes read exactly."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import blockwise
from fourbit.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from fourbit.kernels.codes import dynamic_code
from fourbit.kernels.dispatch import force_path
from fourbit.nf4 import dequantize_absmax, quantize, quantize_absmax


@st.composite
def values(draw: st.DrawFn, largest: int = 60) -> Tensor:
    """fp32 vectors of many sizes and scales, half of them moved beside a midpoint of the signed map."""
    n = draw(st.integers(1, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    result = torch.randn(n, generator=generator) ** 3
    code = dynamic_code(True)
    middle = ((code[:-1] + code[1:]) / 2)[torch.randint(255, (n,), generator=generator)] * result.abs().max()
    middle = torch.nextafter(middle, torch.randint(2, (n,), generator=generator).float() * 18 - 9)
    moved = torch.rand(n, generator=generator) < 0.5
    moved[result.abs().argmax()] = False  # it sets the scale
    return torch.where(moved, middle, result) * 2.0 ** draw(st.integers(-60, 60))


@given(values(), st.booleans(), st.sampled_from([8, 64]))
def test_codes_are_the_nearest_in_exact_arithmetic(vector: Tensor, signed: bool, blocksize: int) -> None:
    vector = vector if signed else vector.abs()
    code = dynamic_code(signed)
    codes, absmax = quantize_blockwise(vector, code, blocksize)
    exact = [Fraction(c) for c in code.tolist()]
    for i, (value, index) in enumerate(zip(vector.tolist(), codes.tolist(), strict=True)):
        scale = Fraction(absmax[i // blocksize].item())
        near = range(max(index - 2, 0), min(index + 3, 256))  # distances grow away from the nearest: the map ascends
        distances = [abs(Fraction(value) - exact[j] * scale) for j in near]
        assert near[distances.index(min(distances))] == index  # the first minimum: a tie takes the lower code


def is_the_definitions(vector: Tensor, signed: bool, blocksize: int = 256) -> bool:
    code = dynamic_code(signed)
    with force_path("reference"):
        want, want_absmax = quantize_blockwise(vector, code, blocksize)
    with force_path("cpu"):
        codes, absmax = quantize_blockwise(vector, code, blocksize)
    pattern = lambda x: x.view(torch.int32)  # of NaN and -0.0 too
    whole = ~absmax.isnan()
    same = torch.equal(pattern(absmax[whole]), pattern(want_absmax[whole])) and torch.equal(whole, ~want_absmax.isnan())
    return torch.equal(codes, want) and same


ODD = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3e38, float("inf"), -float("inf"), float("nan")])
NUMBERS = st.lists(st.floats(width=32) | st.floats(-1, 1, width=32) | ODD, min_size=0, max_size=40)


@given(NUMBERS, st.booleans(), st.sampled_from([1, 8, 64]))
def test_the_quick_way_is_the_definition_for_any_numbers(numbers: list[float], signed: bool, blocksize: int) -> None:
    """Infinities, NaN, numbers of few bits, blocks of zeros; negative ones also where no code is negative."""
    assert is_the_definitions(torch.tensor(numbers), signed, blocksize)


@given(values(600), st.booleans())
def test_the_quick_way_is_the_definition_beside_midpoints(vector: Tensor, signed: bool) -> None:
    assert is_the_definitions(vector if signed else vector.abs(), signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 7.7, 1 / 3, 3e38, 1.2e-38, 3.3e-39, 5e-43])
def test_the_quick_way_is_the_definition_around_every_midpoint(signed: bool, scale: float) -> None:
    """Each midpoint times a scale and its neighbours in fp32, at scales up to the largest and with few bits left."""
    code = dynamic_code(signed)
    near = ((code[:-1].double() + code[1:].double()) / 2 * scale).float().view(torch.int32)
    near = torch.cat([near + step for step in range(-4, 5)]).view(torch.float32)
    near = near[near.abs() <= scale] if signed else near[(near >= 0) & (near <= scale)]
    rows = [torch.nn.functional.pad(part, (1, 255 - len(part)), value=scale) for part in near.split(255)]
    assert is_the_definitions(torch.cat(rows), signed)


@pytest.mark.parametrize("signed", [True, False])
def test_the_quick_way_in_several_chunks(signed: bool) -> None:
    vector = torch.randn(3 * blockwise.CHUNK + 77, generator=torch.Generator().manual_seed(1)) ** 3
    assert is_the_definitions(vector, signed)


@pytest.mark.parametrize("signed", [True, False])
def test_only_the_two_numbers_around_a_midpoint_are_unsure(signed: bool) -> None:
    """All 2^31 numbers from -1 to 1 (2^30 from 0 to 1), by the ends of each upper half and by the midpoints.

    Within a half, sums grow by one from number to number. So a code right at both ends is right between them but for
    the place of one midpoint, and a rest of 0 or 1 comes up once at most.
    """
    midpoints = blockwise.midpoints(dynamic_code(signed))
    edges = torch.arange(0x3F80, dtype=torch.int32) << 16
    positive = torch.cat([edges, edges | 0xFFFF, torch.tensor([0x3F800000], dtype=torch.int32)])
    ends = torch.cat([positive, positive | -(1 << 31)] if signed else [positive])
    below, above = blockwise._enclosing(midpoints)
    assert torch.equal(torch.nextafter(below.view(torch.float32), torch.ones(255)), above.view(torch.float32))
    assert bool((below.view(torch.float32) <= midpoints).all() and (above.view(torch.float32) > midpoints).all())
    unsure = torch.cat([below, above])
    beside = torch.cat([unsure - 1, unsure + 1])
    everything = torch.cat([ends, beside, unsure])
    bits = everything.clone()
    blockwise._ascend(bits, signed, torch.empty_like(bits))
    sums = blockwise._carries(signed)[bits >> 16] + bits
    flagged = (sums & (blockwise.ONE_CODE - 1)) <= 1
    assert torch.equal(flagged, torch.isin(everything, unsure))
    right = torch.bucketize(everything.view(torch.float32).double(), midpoints)
    assert torch.equal((sums >> 17)[~flagged], right.int()[~flagged])


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False])
def test_every_number_is_sure_and_right_or_unsure(signed: bool) -> None:
    """The same one by one. Codes are the definition's at both ends of every run of one code, unsure ones left out."""
    midpoints, carries, unsure = blockwise.midpoints(dynamic_code(signed)), blockwise._carries(signed), 0
    for start in range(0, 0x3F800001, 1 << 22):
        for sign in (0, -(1 << 31)) if signed else (0,):
            numbers = torch.arange(start, min(start + (1 << 22), 0x3F800001), dtype=torch.int32) | sign
            bits = numbers.clone()
            blockwise._ascend(bits, signed, torch.empty_like(bits))
            sums = torch.index_select(carries, 0, bits >> 16) + bits
            codes, flagged = sums >> 17, (sums & (blockwise.ONE_CODE - 1)) <= 1
            change = (codes[1:] != codes[:-1]).nonzero().view(-1)
            check = torch.cat([change, *(change + i for i in (1, 2, 3)), torch.tensor([0, len(codes) - 1])])
            check = check[check < len(codes)]
            right = torch.bucketize(numbers[check].view(torch.float32).double(), midpoints)
            assert bool(((codes[check] == right) | flagged[check]).all())
            unsure += int(flagged.sum())
    assert unsure == 2 * 255


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_exactly_between_two_codes_the_lower_wins(signed: bool, scale: float) -> None:
    code = dynamic_code(signed)
    midpoints = (code[:-1].double() + code[1:].double()) / 2
    tie = midpoints == midpoints.float()  # the others cannot occur in fp32 at these scales
    assert tie.sum() > 100
    vector = torch.cat([midpoints[tie].float(), torch.ones(1)]) * scale
    codes, _ = quantize_blockwise(vector, code, 256)
    assert codes[:-1].tolist() == tie.nonzero().squeeze(1).tolist()


@given(values(), st.sampled_from([8, 64]))
def test_absmax_is_each_blocks_largest_magnitude(vector: Tensor, blocksize: int) -> None:
    absmax = quantize_blockwise(vector, dynamic_code(), blocksize)[1]
    assert torch.equal(absmax, torch.stack([block.abs().max() for block in vector.split(blocksize)]))


@given(st.integers(1, 600), st.integers(0, 2**31), st.sampled_from([0.02, 1.0, 30.0]))
def test_bitsandbytes_is_farther_by_at_most_its_rounding(oracle: Any, n: int, seed: int, scale: float) -> None:
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    theirs, state = oracle.functional.quantize_blockwise(vector, blocksize=256)
    code = dynamic_code()
    ours, absmax = quantize_blockwise(vector, code, 256)
    assert torch.equal(absmax, state.absmax)
    scales = absmax.double().repeat_interleave(256)[:n]
    errors = [(code.double()[codes.long()] * scales - vector.double()).abs() for codes in (ours, theirs)]
    assert bool((errors[0] <= errors[1]).all())
    assert bool((errors[1] <= errors[0] + 2.0**-15 * scales).all())


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_stored_codes_decode_as_in_bitsandbytes(oracle: Any, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-n // 256), generator=generator)
    code = dynamic_code()
    want = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, code, 256, torch.float32)
    assert torch.equal(dequantize_blockwise(codes, absmax, code, 256), want)


@pytest.mark.parametrize("shape", [(96, 128), (192, 576), (333, 77)])
def test_double_quantisation_against_bitsandbytes(oracle: Any, shape: tuple[int, int]) -> None:
    """The offset within its last bits; ours at least as near to the scales; and their stored state read bit for bit."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    _, state = oracle.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    absmax = quantize(weight).absmax.flatten()
    codes, nested, offset = quantize_absmax(absmax)
    torch.testing.assert_close(offset, state.offset.view(1), rtol=2**-20, atol=0)
    torch.testing.assert_close(nested, state.state2.absmax, rtol=2**-18, atol=0)
    theirs = oracle.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(dequantize_absmax(state.absmax, state.state2.absmax, state.offset), theirs)
    extra = 2.0**-15 * nested.max()
    errors = [
        (decoded.double() - absmax.double()).abs() for decoded in (dequantize_absmax(codes, nested, offset), theirs)
    ]
    assert bool((errors[0] <= errors[1] + 2.0**-22 * absmax.max()).all())
    assert bool((errors[1] <= errors[0] + extra + 2.0**-22 * absmax.max()).all())


@given(st.integers(1, 1000), st.floats(1e-30, 1e30))
def test_equal_scales_survive_exactly(n: int, scale: float) -> None:
    absmax = torch.full((n,), scale)
    codes, nested, offset = quantize_absmax(absmax)
    assert codes.dtype == torch.uint8 and codes.shape == (n,)
    assert nested.shape == (-(-n // 256),) and offset.shape == (1,)
    assert torch.equal(dequantize_absmax(codes, nested, offset), absmax)


@given(st.integers(1, 1000), st.integers(0, 2**31))
def test_decoded_scales_err_by_at_most_half_the_widest_cell(n: int, seed: int) -> None:
    """The signed map's widest gap is 0.9 / 64, in its top decade; 2^-22 of the largest pays for the fp32 roundings."""
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.01
    codes, nested, offset = quantize_absmax(absmax)
    error = (dequantize_absmax(codes, nested, offset).double() - absmax.double()).abs()
    assert float(dynamic_code().diff().max()) == pytest.approx(0.9 / 64, rel=1e-5)
    bound = 0.9 / 128 * (1 + 1e-5) * nested.double().repeat_interleave(256)[:n]
    assert bool((error <= bound + 2.0**-22 * absmax.max()).all())


def test_nothing_becomes_nothing() -> None:
    codes, nested, offset = quantize_absmax(torch.empty(0))
    assert codes.shape == nested.shape == (0,) and offset == 0
    assert dequantize_absmax(codes, nested, offset).shape == (0,)


def test_scales_that_are_not_one_a_block_are_refused() -> None:
    codes, nested, offset = quantize_absmax(torch.rand(512, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="512 codes in blocks of 256 need 2 scales, got 1"):
        dequantize_absmax(codes, nested[:1], offset)


def test_shapes_are_kept() -> None:
    matrix = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantize_blockwise(matrix, dynamic_code(), 64)
    assert codes.shape == (3, 100) and absmax.shape == (5,)
    decoded = dequantize_blockwise(codes, absmax, dynamic_code(), 64)
    torch.testing.assert_close(decoded, matrix, rtol=0.1, atol=0.02)
