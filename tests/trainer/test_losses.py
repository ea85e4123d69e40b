"""Preference losses: formulas in 50 digits, extremes and limits, mixtures, and what they see of a batch.

What TRL also has is compared with TRL in test_losses_trl.py.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import exp, expm1, log, mp, mpf
from torch import Tensor

from fourbit import losses as public
from fourbit.trainer.losses import judged as judged_losses
from fourbit.trainer.losses import pairs as losses
from fourbit.trainer.losses.judged import mismatch_kl
from fourbit.trainer.losses.objective import LOSSES, PAIR_LOSSES, UNPAIRED_LOSSES, Objective
from fourbit.trainer.losses.pairs import DIVERGENCES, Scores, mixture, reward_shift, rewards_seen, scores_of
from fourbit.trainer.preference import reward_metrics

mp.dps = 50
EXACT = 1e-12  # of 1 + |value|: a few dozen roundings of float64
EXTREMES = list(itertools.product((-1e4, -40.0, 0.0, 40.0, 1e4), repeat=2))
POINTS = {"shift": torch.tensor(0.3, dtype=torch.float64), "kl": torch.tensor(0.7, dtype=torch.float64)}
numbers = st.floats(-300, 300, allow_nan=False)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def scores(policy: Tensor, reference: Tensor, tokens: Tensor, good: Tensor | None = None) -> Scores:
    first = torch.arange(2, device=policy.device).unsqueeze(1) == 0
    return Scores(policy, reference, tokens, first.expand(policy.shape) if good is None else good, policy[0])


def pairs_of(chosen: Any, rejected: Any, *, dtype: torch.dtype = torch.float64) -> tuple[Scores, Tensor]:
    """Scores with these log-ratios, and the ratios: the reference is at -250, so that log-probabilities look so."""
    ratios = torch.tensor([chosen, rejected], dtype=dtype).reshape(2, -1).requires_grad_()
    base = torch.full(ratios.shape, -250, dtype=dtype)
    return scores(ratios + base, base, torch.tensor([[7], [4]]).expand(ratios.shape)), ratios


def sampled(count: int = 9, seed: int = 0) -> Scores:
    make = torch.Generator().manual_seed(seed)
    reference = torch.tensor([[-60.0], [-50.0]]) + 9 * torch.randn(2, count, generator=make, dtype=torch.float64)
    moved = 5 * torch.randn(2, count, generator=make, dtype=torch.float64)
    tokens = torch.randint(1, 40, (2, count), generator=make)
    return scores((reference + moved).clamp(max=-0.5).requires_grad_(), reference, tokens)


def judged(count: int = 8, seed: int = 0) -> Scores:
    pairs = sampled(count, seed)
    policy = pairs.policy[:1].detach().requires_grad_()
    return scores(policy, pairs.reference[:1], pairs.tokens[:1], (torch.arange(count) % 3 > 0).unsqueeze(0))


def sample_for(name: str, count: int = 9) -> Scores:
    return judged(count) if name in UNPAIRED_LOSSES else sampled(count)


def value_of(name: str, sample: Scores, **settings: Any) -> Tensor:
    """One loss through an objective; sft is none of its own, so it is called by its function."""
    return losses.sft(sample) if name == "sft" else mixture(Objective({name: 1.0}, settings).terms, sample, POINTS)


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

    def __init__(self, pairs: Scores, i: int) -> None:
        (self.w, self.l), bases = ([mpf(x) for x in part[:, i].tolist()] for part in (pairs.policy, pairs.reference))
        self.a, self.b = self.w - bases[0], self.l - bases[1]
        self.n, self.m = pairs.tokens[:, i].tolist()


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


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_formula(name: str) -> None:
    settings, formula = FORMULAS[name]
    sample = sampled()
    rows = [Row(sample, i) for i in range(sample.policy.shape[1])]
    assert_exact(value_of(name, sample, **settings), [formula(row, *map(mpf, settings.values())) for row in rows])


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_unpaired_formula(name: str) -> None:
    settings, formula = JUDGED_FORMULAS[name]
    sample = judged()
    rows = zip(sample.policy[0].tolist(), sample.reference[0].tolist(), sample.good[0].tolist(), strict=True)
    wanted = [formula(mpf(a) - mpf(b), good, *map(mpf, settings.values())) for a, b, good in rows]
    assert_exact(value_of(name, sample, **settings), wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.999999, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_formula(name: str, alpha: float) -> None:
    limit = name == "alpha" and alpha == 1  # its own formula is 0 / 0 there
    derivative = DERIVATIVES["reverse-kl" if limit else name]
    ratios = torch.tensor([-3.0, -0.2, -1e-9, 0.0, 1e-9, 0.7, 4.0], dtype=torch.float64)
    found = losses.divergence_of(name, alpha)(ratios)
    assert_exact(found, [derivative(exp(mpf(ratio)), mpf(alpha)) for ratio in ratios.tolist()])


def divergences_of(name: str) -> list[str]:
    return list(DIVERGENCES) if "divergence" in LOSSES[name].defaults else ["reverse-kl"]


def settings_with(name: str, divergence: str) -> dict[str, Any]:
    """The settings of a formula above, with a divergence where the loss takes one."""
    settings = (FORMULAS | JUDGED_FORMULAS)[name][0]
    return settings | ({"divergence": divergence} if "divergence" in LOSSES[name].defaults else {})


CASES = [(name, divergence) for name in PAIR_LOSSES for divergence in divergences_of(name)]


@pytest.mark.parametrize(("name", "divergence"), [*CASES, *((name, "") for name in UNPAIRED_LOSSES)])
def test_gradcheck(name: str, divergence: str) -> None:
    sample, settings = sample_for(name, 6), settings_with(name, divergence)

    def value(policy: Tensor) -> Tensor:
        return value_of(name, replace(sample, policy=policy, undiscounted=policy[0]), **settings)

    assert torch.autograd.gradcheck(value, sample.policy, eps=1e-5, atol=1e-6, rtol=1e-5)


@dtypes
@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_extremes_are_finite(name: str, divergence: str, dtype: torch.dtype) -> None:
    """Log-ratios of ±1e4 on either side or both, with the settings above, with the defaults, and DiscoPOP's τ > 1."""
    variants = [settings_with(name, divergence), {}]
    variants += [{"tau": 3.0, "beta": 1.0, "divergence": divergence}] if name == "discopop" else []
    for settings in variants:
        sample, ratios = pairs_of(*zip(*EXTREMES, strict=True), dtype=dtype)
        found = value_of(name, sample, **settings)
        assert found.dtype == dtype and found.isfinite().all(), settings
        assert torch.autograd.grad(found.sum(), ratios)[0].isfinite().all(), settings


@dtypes
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_unpaired_extremes_are_finite(name: str, dtype: torch.dtype) -> None:
    policy = torch.tensor([[-1e4, 1e4, 0.0, -1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    sample = scores(
        policy, torch.zeros_like(policy), torch.ones(1, 6, dtype=torch.int64), torch.arange(6).unsqueeze(0) < 3
    )
    found = value_of(name, sample)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert found.dtype == dtype and found.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ipo", "hinge", "exo", "bco", "sppo-hard", "nca", "apo-zero"])
def test_extremes_are_exact(name: str) -> None:
    """Where no exponential is cut off, ±1e4 still gives the formula's value."""
    settings, formula = FORMULAS[name]
    sample, _ = pairs_of(*zip(*EXTREMES, strict=True))
    rows = [Row(sample, i) for i in range(len(EXTREMES))]
    with mp.workdps(2000):  # 1 - e^-4000 must not round to 1
        wanted = [formula(row, *map(mpf, settings.values())) for row in rows]
    assert_exact(value_of(name, sample, **settings), wanted)


@dtypes
def test_orpo_of_certain_answers(dtype: torch.dtype) -> None:
    """A probability of 1 has infinite odds; a sum that rounding took above zero has none at all."""
    sides = [[0.0, -1e-12, 1e-6, 0.0, -8.0], [-5.0, 0.0, -1e4, 0.0, 0.0]]
    policy = torch.tensor(sides, dtype=dtype, requires_grad=True)
    found = losses.orpo(scores(policy, policy.detach(), torch.ones(2, 5, dtype=torch.int64)))
    assert found.isfinite().all() and torch.autograd.grad(found.sum(), policy)[0].isfinite().all()


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
    logps, lengths = torch.empty(2, 4, 5, device="meta"), torch.empty(2, 4, dtype=torch.int64, device="meta")
    sample = scores_of(logps, lengths, logps, ld_alpha=0.5)
    if name in UNPAIRED_LOSSES:
        labels = torch.empty(4, dtype=torch.bool, device="meta")
        sample = scores_of(logps[:1], lengths[:1], logps[:1], labels=labels)
    objective = Objective({"sigmoid": 1.0, "sft": 1.0} if name == "sft" else {name: 1.0})
    found = mixture(objective.terms, sample, {name: torch.empty((), device="meta") for name in POINTS})
    assert found.shape == (4,) and found.dtype == torch.float32
    assert (objective.shift_beta is None) == ("bco" not in name)
    assert reward_shift(rewards_seen(sample.ratio, sample.good)).dtype == torch.float64


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
    sample = sample_for(name)
    points = dict.fromkeys(POINTS, torch.zeros(()))
    found = mixture(Objective({name: 1.0}).terms, replace(sample, reference=sample.policy.detach()), points)
    torch.testing.assert_close(found, torch.full_like(found, AT_START[name]), rtol=1e-13, atol=0)


def test_label_smoothing_of_zero_is_plain() -> None:
    sample = sampled()
    wanted = -torch.nn.functional.logsigmoid(0.1 * (sample.ratio[0] - sample.ratio[1]))
    assert torch.equal(losses.sigmoid(sample), wanted)
    assert torch.equal(losses.sigmoid(sample, label_smoothing=0.0), losses.robust(sample, label_smoothing=0.0))


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
def test_a_better_chosen_or_worse_rejected_answer_never_costs(name: str, chosen: float, rejected: float, by: float):
    settings = {"label_smoothing": 0.0} if name == "robust" else {}
    pairs = (chosen, rejected), (chosen + by, rejected), (chosen, rejected - by)
    before, *after = (value_of(name, pairs_of(*pair)[0], **settings).item() for pair in pairs)
    assert max(after) <= before


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_rise_with_the_ratio(divergence: str) -> None:
    ratios = torch.cat([torch.linspace(-1e4, 1e4, 2001), torch.linspace(-5, 5, 101)]).double().sort().values
    values = losses.divergence_of(divergence)(ratios)
    assert values.isfinite().all() and (values.diff() >= 0).all() and values.diff()[ratios[1:] < 5].min() > 0


def test_mixtures_are_linear() -> None:
    sample, parts = sampled(), {"sigmoid": 0.8, "bco": 0.5, "simpo": 0.25, "sft": 0.2}
    found = mixture(Objective(parts, {"beta": 0.3}).terms, sample, POINTS)
    wanted = sum(weight * value_of(name, sample, beta=0.3) for name, weight in parts.items())
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_the_split(name: str) -> None:
    """An answer's loss is its own: any micro-batches give the same numbers, and the same state after the step."""
    whole, parts, seen = sample_for(name), [], []
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        cut = Scores(*(getattr(whole, field.name)[..., part] for field in fields(Scores)))
        parts.append(value_of(name, cut))
        seen.append(rewards_seen(cut.ratio, cut.good))
    torch.testing.assert_close(torch.cat(parts), value_of(name, whole), rtol=1e-14, atol=0)
    torch.testing.assert_close(sum(seen), rewards_seen(whole.ratio, whole.good), rtol=1e-14, atol=0)


def test_bco_carries_the_mean_of_all_rewards() -> None:
    samples = [sampled(5, seed=1), sampled(8, seed=2)]
    seen = sum(rewards_seen(sample.ratio, sample.good) for sample in samples)
    shift = reward_shift(seen)
    mean = torch.cat([sample.ratio.flatten() for sample in samples]).mean().detach()
    torch.testing.assert_close(shift, mean, rtol=1e-14, atol=0)
    assert not torch.allclose(losses.bco(samples[0], shift), losses.bco(samples[0], torch.zeros(())))
    assert not seen.requires_grad and reward_shift(torch.zeros(2, 2)) == 0
    assert Objective({"sigmoid-norm": 1.0, "bco": 1.0}).shift_beta == 0.1, "BCO's own, not the first loss'"


def test_unpaired_bco_stands_midway_between_good_and_bad() -> None:
    sample = judged()
    seen = rewards_seen(sample.ratio, sample.good)
    good, bad = sample.ratio[sample.good], sample.ratio[~sample.good]
    assert seen[1].tolist() == [len(good), len(bad)] and len(good) != len(bad)
    torch.testing.assert_close(reward_shift(2 * seen), ((good.mean() + bad.mean()) / 2).detach(), rtol=1e-14, atol=0)


def test_mismatch_kl_is_a_mean_and_never_negative() -> None:
    answer = torch.tensor([-3.0, -5.0, -7.0], requires_grad=True)
    assert mismatch_kl(answer, torch.tensor([-4.0, -5.5, -9.0])).item() == pytest.approx(3.5 / 3)
    assert mismatch_kl(answer, torch.tensor([-2.0, -2.0, -2.0])) == 0
    assert not mismatch_kl(answer, torch.zeros(3)).requires_grad


def test_ktos_reference_point_gets_no_gradient() -> None:
    kl, sample = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), judged()
    found = judged_losses.kto(sample, kl).sum()
    assert torch.autograd.grad(found, (kl, sample.policy), allow_unused=True)[0] is None


def ragged(seed: int = 0) -> tuple[Tensor, Tensor]:
    """logps [2, P, L], zero past the end, and lengths [2, P]."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[5, 1, 3, 7], [2, 6, 3, 7]])
    logps = -torch.rand(2, 4, 7, generator=make, dtype=torch.float64) - 0.01
    return logps * (torch.arange(7) < lengths.unsqueeze(-1)), lengths


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.25, 1.0])
def test_answer_sums(ld_alpha: float | None) -> None:
    logps, lengths = ragged()
    found = scores_of(logps, lengths, 1.3 * logps, ld_alpha=ld_alpha)
    for answer, pair in itertools.product(range(2), range(4)):
        shared, alpha = int(lengths[:, pair].min()), 1.0 if ld_alpha is None else ld_alpha
        tokens = logps[answer, pair, : lengths[answer, pair]].tolist()
        wanted = sum(tokens[:shared]) + alpha * sum(tokens[shared:])
        assert found.policy[answer, pair].item() == pytest.approx(wanted, rel=1e-13)
        assert found.reference[answer, pair].item() == pytest.approx(1.3 * wanted, rel=1e-13)
    assert found.good.tolist() == [[True] * 4, [False] * 4] and torch.equal(found.tokens, lengths)


def test_sft_terms_are_not_discounted() -> None:
    """LD-DPO is about comparing two answers; learning the chosen one goes on to its end."""
    logps, lengths = ragged()
    plain, discounted = (scores_of(logps, lengths, 1.3 * logps, ld_alpha=alpha) for alpha in (None, 0.0))
    assert torch.equal(losses.sft(plain), losses.sft(discounted))
    assert not torch.allclose(losses.sigmoid(plain), losses.sigmoid(discounted))
    difference = losses.cpo(discounted, sft_weight=3.0) - losses.cpo(discounted, sft_weight=0.0)
    torch.testing.assert_close(difference, 3 * losses.sft(plain), rtol=1e-12, atol=1e-12)


def test_scores_without_a_reference() -> None:
    logps, lengths = ragged()
    found = scores_of(logps, lengths)
    assert not found.reference.any() and torch.equal(found.ratio, logps.sum(-1))


def test_reference_scores_carry_no_gradient() -> None:
    logps, lengths = ragged()
    policy, reference = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    single = scores_of(policy[:1], lengths[:1], reference[:1], labels=torch.arange(4) < 2)
    for found in (losses.sigmoid(scores_of(policy, lengths, reference)), judged_losses.apo_zero_unpaired(single)):
        mine, theirs = torch.autograd.grad(found.sum(), (policy, reference), allow_unused=True)
        assert mine is not None and mine.any() and theirs is None


def test_rewards_margins_and_accuracy() -> None:
    sample, _ = pairs_of([2.0, -1.0, 3.0], [1.0, 5.0, 3.0])
    aim = Objective({"sft": 0.3, "sigmoid": 0.4, "simpo": 1.0}, {"beta": 0.5})
    found = sample.rewards(aim.compared, aim.beta)
    assert found.tolist() == [[1.0, -0.5, 1.5], [0.5, 2.5, 1.5]] and not found.requires_grad
    metrics = reward_metrics(*found)
    assert metrics["reward_margin"].tolist() == [-2.5, 3] and metrics["reward_accuracy"].tolist() == [1, 3]


def test_every_loss_function_is_in_a_table() -> None:
    for module, table in ((losses, PAIR_LOSSES), (judged_losses, UNPAIRED_LOSSES)):
        takes = [
            function
            for key, function in vars(module).items()
            if inspect.isfunction(function)
            and function.__module__ == module.__name__
            and not key.startswith("_")
            and next(iter(inspect.signature(function).parameters)) == "scores"
        ]
        assert takes == [loss.function for loss in table.values()]
        assert list(table) == [function.__name__.replace("_", "-") for function in takes]
        for function in takes:
            assert function.__doc__ is not None
            assert "20" in function.__doc__ or function is losses.sft, f"{function.__name__} names no paper"


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_table_knows_who_needs_a_reference(name: str) -> None:
    """A loss without one is the same with any reference; a loss with one is not."""
    sample = sampled()
    other = replace(sample, reference=torch.full_like(sample.reference, math.nan))
    assert value_of(name, other).isnan().any() == LOSSES[name].reference
    if name != "sft":
        aim = Objective({name: 1.0, "sft": 1.0})
        assert aim.needs_reference == LOSSES[name].reference
        assert other.rewards(aim.compared, aim.beta).isnan().any() == LOSSES[name].reference


OTHER_VALUES = {
    "beta": 0.037,
    "label_smoothing": 0.23,
    "gamma": 0.41,
    "tau": 0.7,
    "sft_weight": 0.3,
    "desirable_weight": 1.4,
    "undesirable_weight": 0.6,
    "divergence": "jsd",
}


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, loss in LOSSES.items() for k in loss.defaults])
def test_every_setting_does_something(name: str, key: str) -> None:
    sample = sample_for(name)
    assert not torch.allclose(value_of(name, sample, **{key: OTHER_VALUES[key]}), value_of(name, sample))


def test_plain_tensors_are_enough() -> None:
    """The public way: `fourbit.losses`, stacked log-probabilities, and labels where answers are judged one by one."""
    sample = sampled()
    found = public.ipo(public.scores(sample.policy, sample.reference, sample.tokens), beta=0.3)
    assert torch.equal(found, value_of("ipo", sample, beta=0.3))
    single = judged()
    plain = public.scores(single.policy[0], single.reference[0], single.tokens[0], single.good[0])
    assert torch.equal(public.kto(plain, POINTS["kl"]), value_of("kto", single))
    alone = public.scores(sample.policy, None, sample.tokens)
    assert torch.equal(public.simpo(alone), value_of("simpo", sample)) and public.sigmoid(alone).isnan().all()


one, eight, many = torch.zeros(2, 1), torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: public.reward_loss(one[0], eight[0]), r"chosen torch.float32 \[1\], rejected torch.float32 \[8\]"),
        (lambda: public.scores(eight, one, many), r"policy torch.float32 \[2, 8\], reference torch.float32 \[2, 1\]"),
        (lambda: public.scores(eight, eight, many[:1]), r"tokens \(int64\) \[2, P\].* got policy \[2, 8\]"),
        (lambda: public.scores(eight, eight, many.float()), "torch.float32"),
        (lambda: public.scores(eight[0], eight[0], many[0]), "got policy"),
        (lambda: public.scores(eight[0], eight[0], many[0], many[0]), "good"),
        (lambda: public.scores(eight[0], eight[0], many[0], torch.ones(1, dtype=torch.bool)), "good"),
        (lambda: public.scores(many, many, many), "floating-point"),
        (lambda: public.token_kl(eight, one), "one shape"),
        (lambda: public.mismatch_kl(eight, one), "one shape"),
    ],
)
def test_nothing_is_broadcast(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_parts_of_losses_broadcast_nothing() -> None:
    with pytest.raises(ValueError, match="rewards_seen takes"):
        public.rewards_seen(torch.zeros(1), torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="divergence is one of reverse-kl, forward-kl, jsd, alpha"):
        public.divergence_of("js")
