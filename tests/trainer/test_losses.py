"""Preference losses against their formulas in 50 digits, at extremes and at their limits.

What TRL also has is compared with TRL in test_losses_trl.py.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import exp, expm1, log, mp, mpf
from torch import Tensor

from fourbit.trainer.losses import pairs as losses
from fourbit.trainer.losses.judged import JudgedScores
from fourbit.trainer.losses.objective import LOSSES, PAIR_LOSSES, UNPAIRED_LOSSES, Objective
from fourbit.trainer.losses.pairs import DIVERGENCES, PairScores, answer_sums, reward_shift

mp.dps = 50
EXACT = 1e-12  # of 1 + |value|: a few dozen roundings of float64
EXTREMES = list(itertools.product((-1e4, -40.0, 0.0, 40.0, 1e4), repeat=2))
numbers = st.floats(-300, 300, allow_nan=False)


def pairs_of(chosen: Any, rejected: Any, *, dtype: torch.dtype = torch.float64) -> Any:
    """PairScores with these log-ratios: the reference is at -250, so that log-probabilities look like some."""
    ratios = [torch.tensor(side, dtype=dtype).reshape(-1).requires_grad_() for side in (chosen, rejected)]
    base = torch.zeros_like(ratios[0]).detach() - 250
    counts = [torch.full(base.shape, count) for count in (7, 4)]
    return PairScores(ratios[0] + base, ratios[1] + base, base, base.clone(), *counts), ratios


def sampled(count: int = 9, seed: int = 0) -> PairScores:
    make = torch.Generator().manual_seed(seed)
    draw = lambda scale: scale * torch.randn(count, generator=make, dtype=torch.float64)  # noqa: E731
    reference = [-60 + draw(9.0), -50 + draw(9.0)]
    policy = [(base + draw(5.0)).clamp(max=-0.5).requires_grad_() for base in reference]
    lengths = torch.randint(1, 40, (2, count), generator=make)
    return PairScores(*policy, *reference, *lengths)


def judged(count: int = 8, seed: int = 0) -> JudgedScores:
    pairs = sampled(count, seed)
    return JudgedScores(pairs.chosen, pairs.reference_chosen, torch.arange(count) % 3 > 0)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def call(name: str, sample: Any, **settings: Any) -> Tensor:
    """One loss through an objective."""
    return Objective({name: 1.0}, settings)(sample, {"shift": number(0.3), "kl": number(0.7)})


def log_sigma(x: Any) -> Any:
    return -log(1 + exp(-x))


def sigma(x: Any) -> Any:
    return 1 / (1 + exp(-x))


def log_odds(mean: Any) -> Any:
    return log(exp(mean) / (1 - exp(mean)))


def relative_entropy(p: Any, q: Any) -> Any:
    return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))


class Row:
    """One pair in 50 digits: w, l log-probabilities, a, b log-ratios, n, m lengths."""

    def __init__(self, pairs: PairScores, i: int) -> None:
        self.w, self.l = mpf(pairs.chosen[i].item()), mpf(pairs.rejected[i].item())
        self.a = self.w - mpf(pairs.reference_chosen[i].item())
        self.b = self.l - mpf(pairs.reference_rejected[i].item())
        self.n, self.m = int(pairs.chosen_tokens[i]), int(pairs.rejected_tokens[i])


def smoothed(x: Any, e: Any) -> Any:
    return -(1 - e) * log_sigma(x) - e * log_sigma(-x)


def discopop(x: Any, tau: Any) -> Any:
    return (1 - sigma(x / tau)) * log(1 + exp(-x)) + sigma(x / tau) * exp(-x)


FORMULAS: dict[str, tuple[dict[str, float], Callable[..., Any]]] = {
    "sigmoid": ({"beta": 0.2, "label_smoothing": 0.1}, lambda r, b, e: smoothed(b * (r.a - r.b), e)),
    "robust": (
        {"beta": 0.2, "label_smoothing": 0.2},
        lambda r, b, e: (-(1 - e) * log_sigma(b * (r.a - r.b)) + e * log_sigma(-b * (r.a - r.b))) / (1 - 2 * e),
    ),
    "sigmoid-norm": ({"beta": 4.0}, lambda r, b: -log_sigma(b * (r.a / r.n - r.b / r.m))),
    "ipo": ({"beta": 0.3}, lambda r, b: (r.a / r.n - r.b / r.m - 1 / (2 * b)) ** 2),
    "hinge": ({"beta": 0.2}, lambda r, b: max(mpf(0), 1 - b * (r.a - r.b))),
    "exo": (
        {"beta": 0.2, "label_smoothing": 0.01},
        lambda r, b, e: relative_entropy(sigma(b * (r.a - r.b)), 1 - e),
    ),
    "discopop": ({"beta": 0.2, "tau": 0.3}, lambda r, b, t: discopop(b * (r.a - r.b), t)),
    "bco": ({"beta": 0.2}, lambda r, b: -log_sigma(b * r.a - mpf(0.3)) - log_sigma(mpf(0.3) - b * r.b)),
    "sppo-hard": ({"beta": 0.05}, lambda r, b: (r.a - 1 / (2 * b)) ** 2 + (r.b + 1 / (2 * b)) ** 2),
    "nca": (
        {"beta": 0.2},
        lambda r, b: -log_sigma(b * r.a) - log_sigma(-b * r.a) / 2 - log_sigma(-b * r.b) / 2,
    ),
    "apo-zero": ({"beta": 0.2}, lambda r, b: (1 - sigma(b * r.a)) + sigma(b * r.b)),
    "apo-down": ({"beta": 0.2}, lambda r, b: sigma(b * r.a) + (1 - sigma(b * (r.a - r.b)))),
    "simpo": (
        {"beta": 1.5, "gamma": 0.6, "label_smoothing": 0.1},
        lambda r, b, g, e: smoothed(b * r.w / r.n - b * r.l / r.m - g, e),
    ),
    "cpo": (
        {"beta": 0.2, "label_smoothing": 0.1, "sft_weight": 0.5},
        lambda r, b, e, s: smoothed(b * (r.w - r.l), e) - s * r.w / r.n,
    ),
    "orpo": ({"beta": 0.4}, lambda r, b: -r.w / r.n - b * log_sigma(log_odds(r.w / r.n) - log_odds(r.l / r.m))),
    "sft": ({}, lambda r: -r.w / r.n),
}
JUDGED_FORMULAS: dict[str, tuple[dict[str, float], Callable[..., Any]]] = {
    "kto": (
        {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.9},
        lambda h, good, b, d, u: d * (1 - sigma(b * (h - mpf(0.7)))) if good else u * (1 - sigma(b * (mpf(0.7) - h))),
    ),
    "bco-unpaired": ({"beta": 0.2}, lambda h, good, b: -log_sigma((b * h - mpf(0.3)) * (1 if good else -1))),
    "apo-zero-unpaired": (
        {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.9},
        lambda h, good, b, d, u: d * (1 - sigma(b * h)) if good else u * sigma(b * h),
    ),
}
DERIVATIVES = {  # f'(t) with a constant chosen freely
    "reverse-kl": lambda t, a: log(t),
    "forward-kl": lambda t, a: 1 - 1 / t,
    "jsd": lambda t, a: log(2 * t / (1 + t)),
    "alpha": lambda t, a: (t ** (a - 1) - 1) / (a - 1),
}


def assert_exact(found: Tensor, wanted: list[Any]) -> None:
    assert found.dtype == torch.float64 and found.shape == (len(wanted),)
    for value, exact in zip(found.tolist(), wanted, strict=True):
        assert abs(mpf(value) - exact) <= EXACT * (1 + abs(exact)), f"{value} instead of {mp.nstr(exact, 17)}"


def value_of(name: str, sample: PairScores, **settings: Any) -> Tensor:
    """sft is no objective of its own, so it is called by its function."""
    return losses.sft(sample) if name == "sft" else call(name, sample, **settings)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_formula(name: str) -> None:
    settings, formula = FORMULAS[name]
    sample = sampled()
    rows = [Row(sample, i) for i in range(len(sample.chosen))]
    assert_exact(value_of(name, sample, **settings), [formula(row, *map(mpf, settings.values())) for row in rows])


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_unpaired_formula(name: str) -> None:
    settings, formula = JUDGED_FORMULAS[name]
    sample = judged()
    ratios = [mpf(a) - mpf(b) for a, b in zip(sample.answer.tolist(), sample.reference.tolist(), strict=True)]
    both = zip(ratios, sample.labels.tolist(), strict=True)
    assert_exact(call(name, sample, **settings), [formula(h, good, *map(mpf, settings.values())) for h, good in both])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.999999, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_formula(name: str, alpha: float) -> None:
    limit = name == "alpha" and alpha == 1  # its own formula is 0 / 0 there
    derivative = DERIVATIVES["reverse-kl" if limit else name]
    ratios = torch.tensor([-3.0, -0.2, -1e-9, 0.0, 1e-9, 0.7, 4.0], dtype=torch.float64)
    found = losses.divergence_of(name, alpha)(ratios)
    assert_exact(found, [derivative(exp(mpf(ratio)), mpf(alpha)) for ratio in ratios.tolist()])


def test_alpha_divergence_is_forward_kl_at_zero_and_reverse_kl_at_one() -> None:
    ratios = torch.linspace(-6, 6, 41, dtype=torch.float64)
    assert torch.equal(losses.alpha_divergence(ratios, 0.0), losses.forward_kl(ratios))
    assert torch.equal(losses.alpha_divergence(ratios, 1.0), losses.reverse_kl(ratios))
    torch.testing.assert_close(losses.alpha_divergence(ratios, 1 - 1e-9), ratios, rtol=1e-8, atol=1e-8)


def divergences_of(name: str) -> list[str]:
    return list(DIVERGENCES) if "divergence" in LOSSES[name].defaults else ["reverse-kl"]


def settings_with(name: str, divergence: str) -> dict[str, Any]:
    """The settings of a formula above, with a divergence where the loss takes one."""
    settings = (FORMULAS | JUDGED_FORMULAS)[name][0]
    return settings | ({"divergence": divergence} if "divergence" in LOSSES[name].defaults else {})


CASES = [(name, divergence) for name in PAIR_LOSSES for divergence in divergences_of(name)]


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_gradcheck(name: str, divergence: str) -> None:
    sample = sampled(6, seed=2)
    rest = (sample.reference_chosen, sample.reference_rejected, sample.chosen_tokens, sample.rejected_tokens)

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        return value_of(name, PairScores(chosen, rejected, *rest), **settings_with(name, divergence))

    assert torch.autograd.gradcheck(value, (sample.chosen, sample.rejected), eps=1e-5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_gradcheck_unpaired(name: str) -> None:
    sample = judged()
    assert torch.autograd.gradcheck(
        lambda answer: call(name, JudgedScores(answer, sample.reference, sample.labels)), (sample.answer,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_extremes_are_finite(name: str, divergence: str, dtype: torch.dtype) -> None:
    """Log-ratios of ±1e4 on either side or both, with the settings above, with the defaults, and DiscoPOP's τ > 1."""
    variants = [settings_with(name, divergence), {}]
    variants += [{"tau": 3.0, "beta": 1.0, "divergence": divergence}] if name == "discopop" else []
    for settings in variants:
        sample, ratios = pairs_of(*zip(*EXTREMES, strict=True), dtype=dtype)
        found = value_of(name, sample, **settings)
        assert found.dtype == dtype and found.isfinite().all(), settings
        gradients = torch.autograd.grad(found.sum(), ratios, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients), settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_unpaired_extremes_are_finite(name: str, dtype: torch.dtype) -> None:
    answer = torch.tensor([-1e4, 1e4, 0.0, -1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    found = call(name, JudgedScores(answer, torch.zeros(6, dtype=dtype), torch.arange(6) < 3))
    (gradient,) = torch.autograd.grad(found.sum(), answer)
    assert found.dtype == dtype and found.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ipo", "hinge", "exo", "bco", "sppo-hard", "nca", "apo-zero"])
def test_extremes_are_exact(name: str) -> None:
    """Where no exponential is cut off, ±1e4 still gives the formula's value."""
    settings, formula = FORMULAS[name]
    sample, _ = pairs_of(*zip(*EXTREMES, strict=True))
    rows = [Row(sample, i) for i in range(len(EXTREMES))]
    with mp.workdps(2000):  # 1 - e^-4000 must not round to 1
        wanted = [formula(row, *map(mpf, settings.values())) for row in rows]
    assert_exact(call(name, sample, **settings), wanted)


def test_orpo_of_certain_answers() -> None:
    """A probability of 1 has infinite odds; a sum that rounding took above zero has none at all."""
    for dtype in (torch.float32, torch.float64):
        sure = torch.tensor([0.0, -1e-12, 1e-6, 0.0, -8.0], dtype=dtype, requires_grad=True)
        other = torch.tensor([-5.0, 0.0, -1e4, 0.0, 0.0], dtype=dtype, requires_grad=True)
        one = torch.ones(5, dtype=torch.int64)
        found = losses.orpo(PairScores(sure, other, sure.detach(), other.detach(), one, one))
        gradients = torch.autograd.grad(found.sum(), (sure, other))
        assert found.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_exponentials_go_on_along_their_tangent() -> None:
    x = torch.tensor([-700.0, -1.0, 0.0, 30.0, 31.0, 1e4], dtype=torch.float64, requires_grad=True)
    wanted = [exp(mpf(v)) for v in (-700, -1, 0, 30)] + [exp(mpf(30)) * 2, exp(mpf(30)) * (1 + 9970)]
    assert_exact(losses.safe_exp(x), wanted)
    assert_exact(losses.safe_expm1(x), [expm1(mpf(-700)), expm1(mpf(-1)), mpf(0), *(w - 1 for w in wanted[3:])])
    for function in (losses.safe_exp, losses.safe_expm1):
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        assert slope[-1].item() == pytest.approx(math.exp(30), rel=1e-12) and slope[-2] == slope[-1]
    assert losses.safe_expm1(torch.tensor(1e-12, dtype=torch.float64)).item() == pytest.approx(1e-12, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_read(name: str) -> None:
    """Tensors without values: a loss that looked at one, and so made a GPU wait, would raise here."""
    bare = lambda dtype=torch.float32: torch.empty(4, dtype=dtype, device="meta")  # noqa: E731
    points = {"shift": torch.empty((), device="meta"), "kl": torch.empty((), device="meta")}
    if name in UNPAIRED_LOSSES:
        sample: Any = JudgedScores(bare(), bare(), bare(torch.bool))
    else:
        sample = PairScores(bare(), bare(), bare(), bare(), bare(torch.int64), bare(torch.int64))
    weights = {"sigmoid": 1.0, "sft": 1.0} if name == "sft" else {name: 1.0}
    objective = Objective(weights)
    found = objective(sample, points)
    assert found.shape == (4,) and found.dtype == torch.float32
    beta = objective.shift_beta
    assert (beta is None) == ("bco" not in name)
    assert beta is None or reward_shift(sample.seen(beta)).dtype == torch.float64
    logps, lengths = torch.empty(2, 4, 5, device="meta"), torch.empty(2, 4, device="meta")
    assert answer_sums(logps, lengths, ld_alpha=0.5).shape == (2, 4)


AT_START = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "sigmoid-norm": math.log(2),
    "ipo": 25.0,
    "hinge": 1.0,
    "exo": 0.5 * math.log(0.25 / (0.999 * 0.001)),
    "discopop": 0.5 * (1 + math.log(2)),
    "bco": 2 * math.log(2),
    "sppo-hard": 2 * 500.0**2,
    "nca": 2 * math.log(2),
    "apo-zero": 1.0,
    "apo-down": 1.0,
    "kto": 0.5,
    "bco-unpaired": math.log(2),
    "apo-zero-unpaired": 0.5,
}


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reference])
def test_at_the_reference(name: str) -> None:
    """With the policy at its reference a loss is one number, whatever the data: what the first step must show."""
    sample = sampled()
    same: Any = PairScores(
        sample.chosen,
        sample.rejected,
        sample.chosen.detach(),
        sample.rejected.detach(),
        sample.chosen_tokens,
        sample.rejected_tokens,
    )
    if name in UNPAIRED_LOSSES:
        same = JudgedScores(sample.chosen, sample.chosen.detach(), torch.arange(len(sample.chosen)) % 2 == 0)
    found = Objective({name: 1.0})(same, {"shift": torch.zeros(()), "kl": torch.zeros(())})
    torch.testing.assert_close(found, torch.full_like(found, AT_START[name]), rtol=1e-13, atol=0)


def test_label_smoothing_of_zero_is_plain() -> None:
    sample = sampled()
    wanted = -torch.nn.functional.logsigmoid(0.1 * (sample.chosen_ratio - sample.rejected_ratio))
    assert torch.equal(losses.sigmoid(sample), wanted)
    assert torch.equal(losses.sigmoid(sample, label_smoothing=0.0), losses.robust(sample, label_smoothing=0.0))


@given(numbers, numbers)
def test_swapping_the_answers_adds_the_margin(chosen: float, rejected: float) -> None:
    """-log σ(-x) + log σ(x) = x."""
    there, _ = pairs_of(chosen, rejected)
    back, _ = pairs_of(rejected, chosen)
    margin = 0.1 * (there.chosen_ratio - there.rejected_ratio)
    difference = losses.sigmoid(back, beta=0.1) - losses.sigmoid(there, beta=0.1)
    torch.testing.assert_close(difference, margin, rtol=1e-12, atol=1e-12)


@given(numbers, numbers, st.floats(0.01, 0.49))
def test_robust_is_unbiased(chosen: float, rejected: float, flips: float) -> None:
    """Its mean over labels flipped with probability ε is the loss on the labels that were right."""
    there, back = pairs_of(chosen, rejected)[0], pairs_of(rejected, chosen)[0]
    right, wrong = (losses.robust(side, label_smoothing=flips) for side in (there, back))
    wanted = losses.sigmoid(there)
    torch.testing.assert_close((1 - flips) * right + flips * wrong, wanted, rtol=1e-9, atol=1e-9)


FALLING = ["sigmoid", "robust", "sigmoid-norm", "hinge", "bco", "apo-zero", "simpo"]


@given(numbers, numbers, st.floats(0.01, 100))
@pytest.mark.parametrize("name", FALLING)
def test_a_better_chosen_answer_never_costs(name: str, chosen: float, rejected: float, more: float) -> None:
    settings = {"label_smoothing": 0.0} if name == "robust" else {}
    low, high = (call(name, pairs_of(value, rejected)[0], **settings) for value in (chosen, chosen + more))
    assert high.item() <= low.item()


@given(numbers, numbers, st.floats(0.01, 100))
@pytest.mark.parametrize("name", FALLING)
def test_a_worse_rejected_answer_never_costs(name: str, chosen: float, rejected: float, less: float) -> None:
    settings = {"label_smoothing": 0.0} if name == "robust" else {}
    low, high = (call(name, pairs_of(chosen, value)[0], **settings) for value in (rejected - less, rejected))
    assert low.item() <= high.item()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_rise_with_the_ratio(divergence: str) -> None:
    ratios = torch.cat([torch.linspace(-1e4, 1e4, 2001), torch.linspace(-5, 5, 101)]).double().sort().values
    values = losses.divergence_of(divergence)(ratios)
    assert values.isfinite().all() and (values.diff() >= 0).all() and values.diff()[ratios[1:] < 5].min() > 0
