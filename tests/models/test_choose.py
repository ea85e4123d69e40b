"""How a token is chosen of logits: the softmax's shares, cut by top-k and top-p, whatever the numbers are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.models.generate import NOT_FINITE, Sampling, choose


def draws(logits: list[float], sampling: Sampling, count: int = 20000) -> torch.Tensor:
    """How often each token is chosen, as a share."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor(logits).expand(count, -1)
    return choose(rows, sampling, drawn).bincount(minlength=len(logits)) / count


LOGITS = [2.0, -1.0, 1.0, 0.0, -30.0, 1.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax(temperature: float) -> None:
    expected = (torch.tensor(LOGITS) / temperature).softmax(0)
    # 5 standard deviations of a share over 20,000 draws, at most 5 * sqrt(0.25 / 20000)
    torch.testing.assert_close(draws(LOGITS, Sampling(temperature)), expected, rtol=0, atol=0.018)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0, top_k=1), {0}),
        (Sampling(1.0, top_k=3), {0, 5, 2}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 5}),  # token 4 has probability 1e-14
        (Sampling(1.0, top_p=0.4), {0}),  # the first holds 0.46
        (Sampling(1.0, top_p=0.47), {0, 5}),
        (Sampling(1.0, top_p=0.75), {0, 5, 2}),
        (Sampling(1.0, top_k=2, top_p=0.99), {0, 5}),
        (Sampling(1e-9), {0}),
    ],
)
def test_top_k_and_top_p_cut_and_rescale(sampling: Sampling, allowed: set[int]) -> None:
    shares = draws(LOGITS, sampling)
    assert set(shares.nonzero().squeeze(1).tolist()) == allowed
    kept = torch.tensor([x if i in allowed else -torch.inf for i, x in enumerate(LOGITS)])
    torch.testing.assert_close(shares, kept.softmax(0), rtol=0, atol=0.018)


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    temperature=st.floats(5e-324, 1.7e308),
    top_k=st.integers(0, 15) | st.just(2**31 - 1),
    top_p=st.floats(5e-324, 1.0),
    drawn=st.floats(0, 1, exclude_max=True),
)
def test_any_logits_give_a_token_that_may_be_chosen(
    logits: list[float], temperature: float, top_k: int, top_p: float, drawn: float
) -> None:
    row = torch.tensor([logits])
    token = int(choose(row, Sampling(temperature, top_k, top_p), torch.tensor([drawn], dtype=torch.float64)))
    better = sum(x > logits[token] for x in logits)
    assert better < (top_k or len(logits))
    mass = ((row.double() - row.max()) / temperature).softmax(-1)[0]
    assert mass[token] > 0 and mass[row[0] > logits[token]].sum() <= top_p + 1e-9


@given(
    bad=st.sampled_from([float("nan"), float("inf")]),
    temperature=st.sampled_from([0.0, 5e-324, 1.0]),
    top=st.booleans(),
)
def test_logits_that_are_no_numbers_choose_nothing(bad: float, temperature: float, top: bool) -> None:
    """And the rows beside them, one with a token that can never come, do."""
    rows = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [-torch.inf, -torch.inf, 3.0], [-torch.inf] * 3])
    sampling = Sampling(temperature, top_k=2, top_p=0.9) if top and temperature else Sampling(temperature)
    chosen = choose(rows, sampling, torch.full((4,), 0.99, dtype=torch.float64)).tolist()
    assert chosen == [2, NOT_FINITE, 2, NOT_FINITE]
