"""The flat state: everything is covered once, nothing is shared, and pages cut between chunks; what 8 bits keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fourbit.kernels.codes import dynamic_code
from fourbit.optim.state import BLOCK, CHUNK, Entry, FlatState, Moment, decode, encode, fields
from fourbit.optim.update import round_stochastically

SIZES = st.lists(st.one_of(st.integers(0, 600), st.integers(4000, 20000)), max_size=12)
MOMENTS = [Moment("mean", True), Moment("square", False)]
VALUES = st.lists(st.floats(-(2.0**66), 2.0**66, width=32, allow_subnormal=False), min_size=1, max_size=600)


def join(state: FlatState, sizes: list[int]) -> None:
    state.join([Entry(nn.Parameter(torch.empty(size)), 0, 0) for size in sizes], len(state.entries))


def flat(sizes: list[int], bits: int = 32) -> FlatState:
    state = FlatState(0, torch.float32, bits, MOMENTS)
    state.tensors = state.grown(sizes, torch.device("cpu"))
    join(state, sizes)
    return state


@given(SIZES)
def test_chunks_cover_every_element_once(sizes: list[int]) -> None:
    state = flat(sizes)
    seen, last = [0] * len(sizes), 0
    for row, start, length, offset in state.chunks().tolist():
        assert start == seen[row] and 0 < length <= CHUNK
        assert offset == state.entries[row].start + start >= last
        assert offset // CHUNK == (offset + length - 1) // CHUNK  # in one window, so no page cuts it
        assert start % BLOCK == offset % BLOCK == 0
        seen[row] += length
        last = offset + length
    assert seen == sizes


@given(SIZES, SIZES)
def test_spans_are_whole_blocks_and_disjoint_and_never_move(sizes: list[int], more: list[int]) -> None:
    """Those that join later begin at a chunk, so on pages of their own."""
    state, end = flat(sizes), 0
    for entry in state.entries:
        assert entry.start == end and entry.start % BLOCK == 0
        end = -(-(entry.start + entry.size) // BLOCK) * BLOCK
    assert end == state.total
    before, grown = [entry.start for entry in state.entries], state.grown(more, torch.device("cpu"))
    join(state, more)
    assert [entry.start for entry in state.entries][: len(sizes)] == before
    assert state.total == len(grown["mean"])
    later = [entry.start for entry in state.entries[len(sizes) :]]
    assert not later or (later[0] % CHUNK == 0 and end <= later[0] < end + CHUNK)


@given(SIZES, st.data())
def test_segments_of_pages_add_up(sizes: list[int], data: st.DataObject) -> None:
    state, page = flat(sizes), data.draw(st.integers(1, 4)) * CHUNK
    seen = [0] * len(sizes)
    for first in range(0, state.total, page):
        for entry, start, length, offset in state.segments(first, min(first + page, state.total)):
            assert start == seen[entry.row] and first <= offset and offset + length <= first + page
            assert offset == entry.start + start
            seen[entry.row] += length
    assert seen == sizes


@given(st.sampled_from(MOMENTS), VALUES)
def test_a_value_moves_at_most_half_its_bucket(moment: Moment, numbers: list[float]) -> None:
    """The bucket of a value is the gap between its two neighbours in the map, times the scale of its block."""
    values = torch.tensor(numbers)
    values = values if moment.signed else values.abs()
    tensors = flat([len(values)], bits=8).tensors
    encode(moment, values, tensors, 0)
    back = decode(moment, tensors, 0, len(values)).double()
    scale = tensors[f"{moment.name}_absmax"].double().repeat_interleave(BLOCK)[: len(values)]
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    assert torch.equal(tensors[f"{moment.name}_absmax"], blocks.abs().amax(dim=1))
    code = dynamic_code(moment.signed).double()
    relative = values.double() / scale.where(scale > 0, 1)
    above = torch.searchsorted(code, relative).clamp(1, 255)
    half = (code[above] - code[above - 1]) / 2
    # Below the lowest entry (-0.993; 0 for the unsigned map) there is only that one.
    bound = torch.maximum(half, code[0] - relative) * scale
    assert ((back - values.double()).abs() <= bound * (1 + 2**-22) + 2**-23 * back.abs()).all()


@pytest.mark.parametrize("moment", MOMENTS)
def test_entries_of_the_map_come_back_exactly(moment: Moment) -> None:
    values = dynamic_code(moment.signed) * 0.375
    tensors = flat([256], bits=8).tensors
    encode(moment, values, tensors, 0)
    assert torch.equal(decode(moment, tensors, 0, 256), values)
    assert tensors[moment.name].tolist() == list(range(256))


@pytest.mark.parametrize("bits", [8, 32])
def test_fresh_state_is_zero_and_growing_keeps_it(bits: int) -> None:
    state = flat([512], bits=bits)
    values = torch.randn(512, generator=torch.Generator().manual_seed(0)).abs()
    for moment in MOMENTS:
        assert not decode(moment, state.tensors, 0, 512).any()
        encode(moment, values, state.tensors, 0)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    grown = state.grown([300], torch.device("cpu"))
    for name, old in before.items():
        assert torch.equal(grown[name][: len(old)], old) and not grown[name][len(old) :].any()


def test_fp64_moments_are_never_cut() -> None:
    assert fields(MOMENTS, 32, torch.float64)["mean"].dtype == torch.float64


def test_stochastic_rounding_to_fp16_goes_to_a_neighbour_and_is_unbiased() -> None:
    """Down to its subnormals, and below them: 2^16 draws of one value, five standard deviations and 2^-16."""
    n = 1 << 16
    for value in (1.0, 1 + 2**-10, 0.3, -3.1e-3, 60000.5, 2**-15 * 1.3, -(2**-20) * 1.7, 2**-24 * 0.2, -1e-9, 0.0):
        x = torch.full((n,), value)
        rounded = round_stochastically(x, torch.float16, 0, 1.0, 3).double()
        nearest = x[0].half()
        around = [torch.nextafter(nearest, torch.tensor(s * torch.inf, dtype=torch.float16)) for s in (-1, 0, 1)]
        around[1] = nearest
        low = max(v for v in map(float, around) if v <= float(x[0]))
        high = min(v for v in map(float, around) if v >= float(x[0]))
        assert ((rounded == low) | (rounded == high)).all()
        off, gap = abs(float(rounded.mean()) - float(x.double()[0])), high - low
        fraction = (float(x.double()[0]) - low) / gap if gap else 0.0
        assert off <= gap * (5 * (fraction * (1 - fraction) / n) ** 0.5 + 2**-16)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -0.0])
    assert str(round_stochastically(odd, torch.float16, 0, 1.0, 3).tolist()) == "[nan, inf, -inf, inf, -0.0]"


def test_stochastic_rounding_goes_to_a_neighbour() -> None:
    x = torch.randn(4099, generator=torch.Generator().manual_seed(0)) * 1e3
    for step in range(4):
        rounded = round_stochastically(x, torch.bfloat16, 0, float(step), 3)
        low = (x.view(torch.int32) & -65536).view(torch.float32)
        high = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
        assert ((rounded.float() == low) | (rounded.float() == high)).all()
    exact = x.bfloat16().float()
    assert torch.equal(round_stochastically(exact, torch.bfloat16, 0, 1.0, 3).float(), exact)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    assert torch.equal(round_stochastically(odd, torch.bfloat16, 0, 1.0, 3).isnan(), odd.isnan())
    assert round_stochastically(odd, torch.bfloat16, 0, 1.0, 3)[1:].tolist() == odd[1:].tolist()


def test_stochastic_rounding_is_unbiased_and_varies() -> None:
    """2^20 draws: the mean of a fraction f lies within five standard deviations, sqrt(f (1 - f) / n), of f."""
    n = 1 << 20
    for fraction in (0.01, 0.3, 0.5, 0.9):
        x = torch.full((n,), 1 + fraction / 128)  # bf16 has 1 and 1 + 1 / 128
        up = (round_stochastically(x, torch.bfloat16, 0, 7.0, 1).float() - 1) * 128
        exact = float((x.double()[0] - 1) * 128)
        assert abs(float(up.double().mean()) - exact) <= 5 * (exact * (1 - exact) / n) ** 0.5
        for step, number in ((8.0, 1), (7.0, 2)):
            other = (round_stochastically(x, torch.bfloat16, 0, step, number).float() - 1) * 128
            both = float((up * other).double().mean())  # independent draws agree as often as chance has it
            assert abs(both - exact**2) <= 5 * (exact**2 * (1 - exact**2) / n) ** 0.5


@given(st.integers(0, 60).map(lambda i: 8 * i), st.integers(1, 300))
def test_stochastic_rounding_does_not_see_the_cuts(start: int, length: int) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    whole = round_stochastically(x, torch.bfloat16, 0, 3.0, 5)
    part = round_stochastically(x[start : start + length], torch.bfloat16, start, 3.0, 5)
    assert torch.equal(part, whole[start : start + length])
