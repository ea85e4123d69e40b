"""The counter-based mask: the published generator, its statistics, and one mask for a place, however it is reached."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.kernels import dropout as module
from fourbit.kernels.dropout import draw_seed, keep_level, keep_mask, keep_scale, uniform

LOW = (1 << 32) - 1
MULTIPLIERS, STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-7 as its authors write it, in Python's whole numbers."""
    for _ in range(7):
        a, b = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & LOW, a >> 32 ^ counter[3] ^ key[1], a & LOW]
        key = [(key[0] + STEPS[0]) & LOW, (key[1] + STEPS[1]) & LOW]
    return counter


def kept(row: int, column: int, p: float, seed: int) -> bool:
    words = philox([column // 8, row, 0, 0], [seed & LOW, seed >> 32 & LOW])
    draw = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
    signed = draw - (1 << 16) * (draw >> 15)
    return signed + (1 << 15) < keep_level(p)


def test_the_generator_is_the_published_one() -> None:
    """The known answers of the authors' library (Random123, kat_vectors, philox4x32 with 7 rounds)."""
    ones, digits = [LOW] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox([0] * 4, [0, 0]) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox(ones, ones[:2]) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    assert philox(digits, [0xA4093822, 0x299F31D0]) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


@given(st.integers(0, 9), st.integers(1, 20), st.floats(0.001, 0.999), st.integers(0, (1 << 62) - 1))
def test_every_place_follows_the_rule(rows: int, columns: int, p: float, seed: int) -> None:
    mask = keep_mask((rows, columns), p, torch.tensor(seed))
    assert mask.tolist() == [[kept(i, j, p, seed) for j in range(columns)] for i in range(rows)]


@given(st.lists(st.tuples(st.integers(0, 1 << 31), st.integers(-(1 << 63), (1 << 63) - 1)), min_size=1, max_size=9))
def test_uniform_numbers_are_the_first_53_bits_of_a_call(calls: list[tuple[int, int]]) -> None:
    numbers = [philox([counter, 0, 0, 0], [seed & LOW, seed >> 32 & LOW]) for counter, seed in calls]
    counters, seeds = torch.tensor(calls).t()
    assert uniform(counters, seeds).tolist() == [((a << 32 | b) >> 11) / 2**53 for a, b, *_ in numbers]


def test_places_keep_their_mask_whatever_the_size_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor(99)
    large = keep_mask((50, 131), 0.3, seed)
    assert torch.equal(keep_mask((7, 40), 0.3, seed), large[:7, :40])
    monkeypatch.setattr(module, "CHUNK", 17)
    assert torch.equal(keep_mask((50, 131), 0.3, seed), large)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_it_drops_as_often_as_said_and_neighbours_independently(p: float) -> None:
    """Six standard errors of a million draws, for the mean and for products with each neighbour."""
    mask = keep_mask((1000, 1000), p, torch.tensor(5)).double()
    keep = keep_level(p) / module.LEVELS
    centred = mask - keep
    error = 6 * math.sqrt(keep * (1 - keep) / mask.numel())
    assert abs(float(centred.mean())) <= error
    for pair in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred[:, 8:] * centred[:, :-8]):
        assert abs(float(pair.mean())) <= 6 * keep * (1 - keep) / math.sqrt(pair.numel())
    other = keep_mask((1000, 1000), p, torch.tensor(6)).double() - keep
    assert abs(float((centred * other).mean())) <= 6 * keep * (1 - keep) / 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (9, 30), (17, 515)])
def test_the_kernel_drops_what_the_mask_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Into a fresh tensor, from rows that lie apart, and in place."""
    drop = pytest.importorskip("fourbit.kernels.dropout_triton").drop  # where Triton is
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide, seed = torch.randn(shape[0], shape[1] + 3).to(device, dtype), torch.tensor(3 << 40, device=device)
    x = wide[:, : shape[1]]
    want = torch.where(keep_mask(shape, 0.3, seed), x, 0)
    assert torch.equal(drop(x, 0.3, seed), want)
    assert drop(x, 0.3, seed, x) is x and torch.equal(x, want)


def test_survivors_are_scaled_by_the_inverse_of_what_the_probability_became() -> None:
    assert keep_scale(0.3) == 65536 / 45875


def test_the_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(0)
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(0)
    assert first.dtype == torch.int64 and first.shape == () and first != second
    assert torch.equal(draw_seed(torch.device("cpu")), first)


def test_probabilities_at_the_ends() -> None:
    assert (keep_level(1e-9), keep_level(1 - 1e-9)) == (65535, 1)
    for p in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"dropout must lie between 0 and 1, got {p}"):
            keep_level(p)
