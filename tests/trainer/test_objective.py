"""Mixtures of losses, what is carried between steps, what a loss sees of a batch, and what an objective refuses."""

import inspect
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.errors import InputError
from fourbit.trainer.losses import judged as judged_losses
from fourbit.trainer.losses import objective
from fourbit.trainer.losses import pairs as losses
from fourbit.trainer.losses.judged import JudgedScores, judged_scores, mismatch_kl
from fourbit.trainer.losses.objective import LOSSES, PAIR_LOSSES, UNPAIRED_LOSSES, Objective, parse_losses
from fourbit.trainer.losses.pairs import PairScores, answer_sums, pair_scores, reward_shift
from fourbit.trainer.losses.tokens import token_kl
from fourbit.trainer.preference import reward_metrics


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


def value_of(name: str, sample: PairScores, **settings: Any) -> Tensor:
    """sft is no objective of its own, so it is called by its function."""
    return losses.sft(sample) if name == "sft" else call(name, sample, **settings)


def pairs_of(chosen: Any, rejected: Any, *, dtype: torch.dtype = torch.float64) -> Any:
    """PairScores with these log-ratios: the reference is at -250, so that log-probabilities look like some."""
    ratios = [torch.tensor(side, dtype=dtype).reshape(-1).requires_grad_() for side in (chosen, rejected)]
    base = torch.zeros_like(ratios[0]).detach() - 250
    counts = [torch.full(base.shape, count) for count in (7, 4)]
    return PairScores(ratios[0] + base, ratios[1] + base, base, base.clone(), *counts), ratios


def test_mixtures_are_linear() -> None:
    sample = sampled()
    parts = {"sigmoid": 0.8, "bco": 0.5, "simpo": 0.25, "sft": 0.2}
    found = Objective(parts, {"beta": 0.3})(sample, {"shift": number(0.3)})
    wanted = sum(weight * value_of(name, sample, beta=0.3) for name, weight in parts.items())
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_the_split(name: str) -> None:
    """An answer's loss is its own: any micro-batches give the same numbers, and the same state after the step."""
    weights = {"sigmoid": 1.0, "sft": 1.0} if name == "sft" else {name: 1.0}
    whole: Any = judged(9) if name in UNPAIRED_LOSSES else sampled(9)
    aim, points = Objective(weights), {"shift": number(0.4), "kl": number(0.2)}
    fields = [getattr(whole, key) for key in whole.__dataclass_fields__]
    parts, seen = [], []
    for start, stop in ((0, 2), (2, 3), (3, 9)):
        part = type(whole)(*(f if f is None else f[start:stop] for f in fields))
        parts.append(aim(part, points))
        seen += [] if aim.shift_beta is None else [part.seen(aim.shift_beta)]
    assert torch.equal(torch.cat(parts), aim(whole, points))
    if seen:
        torch.testing.assert_close(sum(seen), whole.seen(aim.shift_beta), rtol=1e-14, atol=0)


def test_bco_carries_the_mean_of_all_rewards() -> None:
    first, second, aim = sampled(5, seed=1), sampled(8, seed=2), Objective({"sigmoid-norm": 1.0, "bco": 1.0})
    seen = sum(sample.seen(aim.shift_beta) for sample in (first, second))
    rewards = [0.1 * r for s in (first, second) for r in (s.chosen_ratio, s.rejected_ratio)]  # BCO's beta
    shift = reward_shift(seen)
    torch.testing.assert_close(shift, torch.cat(rewards).mean().detach(), rtol=1e-14, atol=0)
    assert not torch.allclose(losses.bco(first, shift), losses.bco(first, number(0.0)))
    assert not seen.requires_grad and reward_shift(torch.zeros(2, 2)) == 0


def test_unpaired_bco_stands_midway_between_good_and_bad() -> None:
    sample = judged()
    seen = sample.seen(Objective({"bco-unpaired": 1.0}, {"beta": 0.2}).shift_beta)
    good, bad = 0.2 * sample.ratio[sample.labels], 0.2 * sample.ratio[~sample.labels]
    assert seen[1].tolist() == [len(good), len(bad)] and len(good) != len(bad)
    torch.testing.assert_close(reward_shift(2 * seen), ((good.mean() + bad.mean()) / 2).detach(), rtol=1e-14, atol=0)


def test_mismatch_kl_is_a_mean_and_never_negative() -> None:
    answer = torch.tensor([-3.0, -5.0, -7.0], requires_grad=True)
    assert mismatch_kl(answer, torch.tensor([-4.0, -5.5, -9.0])).item() == pytest.approx(3.5 / 3)
    assert mismatch_kl(answer, torch.tensor([-2.0, -2.0, -2.0])) == 0
    assert not mismatch_kl(answer, torch.zeros(3)).requires_grad


def test_ktos_reference_point_gets_no_gradient() -> None:
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sample = judged()
    found = judged_losses.kto(sample, kl).sum()
    assert torch.autograd.grad(found, (kl, sample.answer), allow_unused=True)[0] is None


def ragged(seed: int = 0) -> tuple[Tensor, Tensor]:
    """logps [2, P, L], zero past the end, and lengths [2, P]."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[5, 1, 3, 7], [2, 6, 3, 7]])
    logps = -torch.rand(2, 4, 7, generator=make, dtype=torch.float64) - 0.01
    return logps * (torch.arange(7) < lengths.unsqueeze(-1)), lengths


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.25, 1.0])
def test_answer_sums(ld_alpha: float | None) -> None:
    logps, lengths = ragged()
    found = answer_sums(logps, lengths, ld_alpha=ld_alpha)
    for answer, pair in itertools.product(range(2), range(4)):
        shared, alpha = int(lengths[:, pair].min()), 1.0 if ld_alpha is None else ld_alpha
        tokens = logps[answer, pair, : lengths[answer, pair]].tolist()
        wanted = sum(tokens[:shared]) + alpha * sum(tokens[shared:])
        assert found[answer, pair].item() == pytest.approx(wanted, rel=1e-13)


def test_sft_terms_are_not_discounted() -> None:
    """LD-DPO is about comparing two answers; learning the chosen one goes on to its end."""
    logps, lengths = ragged()
    plain, discounted = (pair_scores(logps, lengths, 1.3 * logps, ld_alpha=alpha) for alpha in (None, 0.0))
    assert torch.equal(losses.sft(plain), losses.sft(discounted))
    assert not torch.allclose(losses.sigmoid(plain), losses.sigmoid(discounted))
    difference = losses.cpo(discounted, sft_weight=3.0) - losses.cpo(discounted, sft_weight=0.0)
    torch.testing.assert_close(difference, 3 * losses.sft(plain), rtol=1e-12, atol=1e-12)


def test_pair_scores_without_a_reference() -> None:
    logps, lengths = ragged()
    found = pair_scores(logps, lengths)
    assert not found.reference_chosen.any() and found.reference_rejected.dtype == logps.dtype
    assert torch.equal(found.chosen_ratio, logps[0].sum(-1)) and found.undiscounted is None


def test_reference_scores_carry_no_gradient() -> None:
    logps, lengths = ragged()
    policy, reference = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    for found in (
        losses.sigmoid(pair_scores(policy, lengths, reference)),
        judged_losses.apo_zero_unpaired(judged_scores(policy[:1], lengths[:1], torch.arange(4) < 2, reference[:1])),
    ):
        mine, theirs = torch.autograd.grad(found.sum(), (policy, reference), allow_unused=True)
        assert mine is not None and mine.any() and theirs is None


def test_token_kl_is_the_divergence_over_two_tokens_and_below_it_over_more() -> None:
    make = torch.Generator().manual_seed(0)
    policy, reference = (3 * torch.randn(2, 200, 2, generator=make, dtype=torch.float64)).log_softmax(-1)
    found = token_kl(policy[:, 0].requires_grad_(), reference[:, 0])
    wanted = (policy.exp() * (policy - reference)).sum(-1).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert not found.requires_grad
    policy, reference = (3 * torch.randn(2, 200, 50, generator=make, dtype=torch.float64)).log_softmax(-1)
    whole = (policy.exp() * (policy - reference)).sum(-1)
    found = token_kl(policy[:, 0], reference[:, 0])
    assert (found >= 0).all() and (found <= whole).all() and (found < 0.99 * whole).any()


def test_token_kl_at_its_ends() -> None:
    """Certain tokens, impossible ones, and what stands past an answer's end (0 and 0)."""
    sure, never = torch.tensor([0.0, 0.0, -1e4, -1e4]), torch.tensor([0.0, -1e4, 0.0, -1e4])
    found = token_kl(sure, never)
    assert found.isfinite().all() and (found >= 0).all() and found[0] == 0 and found[3] == 0
    assert found[1].item() == pytest.approx(1e4, rel=1e-6) and found[2].item() == pytest.approx(
        -math.log(1e-12), rel=1e-3
    )


def test_rewards_margins_and_accuracy() -> None:
    sample, _ = pairs_of([2.0, -1.0, 3.0], [1.0, 5.0, 3.0])
    aim = Objective({"sft": 0.3, "sigmoid": 0.4, "simpo": 1.0}, {"beta": 0.5})
    found = sample.rewards(aim.compared, aim.beta)
    assert found[0].tolist() == [1.0, -0.5, 1.5] and found[1].tolist() == [0.5, 2.5, 1.5]
    assert not any(part.requires_grad for part in found)
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
    other = PairScores(
        sample.chosen,
        sample.rejected,
        torch.full_like(sample.chosen, math.nan).detach(),
        torch.full_like(sample.chosen, math.nan).detach(),
        sample.chosen_tokens,
        sample.rejected_tokens,
    )
    assert value_of(name, other).isnan().any() == LOSSES[name].reference
    if name != "sft":
        assert Objective({name: 1.0, "sft": 1.0}).needs_reference == LOSSES[name].reference
        aim = Objective({name: 1.0})
        assert other.rewards(aim.compared, aim.beta)[0].isnan().any() == LOSSES[name].reference


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
    sample: Any = judged() if name in UNPAIRED_LOSSES else sampled()
    assert not torch.allclose(call(name, sample, **{key: OTHER_VALUES[key]}), call(name, sample))


def test_every_setting_has_a_rule() -> None:
    assert {key for loss in LOSSES.values() for key in loss.defaults} | {"divergence_alpha"} == set(objective.SETTINGS)


BETWEEN = "a number from 0 up to, but not including, 0.5"
REFUSED = [
    ({}, {}, "loss must name at least one of sigmoid, robust, "),
    ({"sigmiod": 1.0}, {}, "unknown loss 'sigmiod'; did you mean sigmoid?; there are sigmoid, robust"),
    ({"bco_pair": 1.0}, {}, "did you mean bco?"),
    ({"SPPO_hard": 1.0}, {}, "did you mean sppo-hard?"),
    ({"dpo": 1.0}, {}, "did you mean sigmoid?"),
    ({"zzz": 1.0}, {}, "unknown loss 'zzz'; there are"),
    ({"aot_unpaired": 1.0}, {}, "it sorts a whole batch"),
    ({"sft": 1.0}, {}, "loss sft alone is plain fine-tuning: use fourbit sft"),
    ({"sigmoid": 1.0, "kto": 1.0}, {}, "loss kto is for single judged answers and sigmoid for pairs"),
    ({"sigmoid": 0.0}, {}, "the weight of loss sigmoid must be a number above 0, got 0.0"),
    ({"sigmoid": -1}, {}, "above 0, got -1"),
    ({"sigmoid": math.nan}, {}, "above 0, got nan"),
    ({"sigmoid": math.inf}, {}, "above 0, got inf"),
    ({"sigmoid": True}, {}, "above 0, got True"),
    ({"sigmoid": "1"}, {}, "above 0, got '1'"),
    ({"sigmoid": 1.0}, {"beta": 0}, "beta must be a number above 0, got 0"),
    ({"sigmoid": 1.0}, {"beta": math.nan}, "beta must be a number above 0, got nan"),
    ({"sigmoid": 1.0}, {"beta": True}, "beta must be a number above 0, got True"),
    ({"kto": 1.0}, {"beta": -0.1}, "beta must be a number above 0, got -0.1"),
    ({"sigmoid": 1.0}, {"label_smoothing": 0.5}, f"label_smoothing must be {BETWEEN}, got 0.5"),
    ({"robust": 1.0}, {"label_smoothing": 0.5}, f"label_smoothing must be {BETWEEN}, got 0.5"),
    ({"robust": 1.0}, {"label_smoothing": -0.1}, f"label_smoothing must be {BETWEEN}, got -0.1"),
    ({"sigmoid": 1.0, "exo": 1.0}, {"label_smoothing": 0.0}, "label_smoothing of the loss exo must be above 0"),
    ({"simpo": 1.0}, {"gamma": -1.0}, "gamma must be a number of at least 0, got -1.0"),
    ({"discopop": 1.0}, {"tau": 0.0}, "tau must be a number above 0, got 0.0"),
    ({"cpo": 1.0}, {"sft_weight": -1.0}, "sft_weight must be a number of at least 0, got -1.0"),
    ({"kto": 1.0}, {"desirable_weight": 0.0}, "desirable_weight must be a number above 0, got 0.0"),
    ({"kto": 1.0}, {"undesirable_weight": "x"}, "undesirable_weight must be a number above 0, got 'x'"),
    ({"ipo": 1.0}, {"label_smoothing": 0.1}, "label_smoothing is not used by the loss ipo, got 0.1: leave it out, or"),
    ({"ipo": 1.0, "sft": 1.0}, {"label_smoothing": 0.0}, "not used by the loss ipo and sft, got 0.0"),
    ({"sigmoid": 1.0}, {"gamma": 0.5}, "or choose among simpo"),
    ({"bco": 1.0}, {"desirable_weight": 1.0}, "or choose among kto, apo-zero-unpaired"),
    ({"nca": 1.0}, {"divergence": "jsd"}, "divergence is not used by the loss nca, got 'jsd'"),
    ({"sigmoid": 1.0, "nca": 1.0}, {"divergence": "jsd"}, "divergence jsd has no meaning for the loss nca"),
    ({"sigmoid": 1.0}, {"divergence": "js_divergence"}, "divergence must be one of reverse-kl, forward-kl, jsd, alpha"),
    ({"sigmoid": 1.0}, {"divergence": "reverse_kl"}, "got 'reverse_kl'; did you mean reverse-kl?"),
    ({"sigmoid": 1.0}, {"divergence": 3}, "got 3"),
    ({"sigmoid": 1.0}, {"divergence_alpha": 0.5}, "divergence_alpha belongs to divergence alpha; got 0.5 without it"),
    (
        {"sigmoid": 1.0},
        {"divergence": "alpha", "divergence_alpha": 1.5},
        "divergence_alpha must be a number from 0 to 1, got 1.5",
    ),
    ({"sigmoid": 1.0}, {"bata": 0.1}, "there is no setting 'bata' of losses; did you mean beta?"),
    ({"sigmoid": 1.0}, {"zzz": 0.1}, "there is no setting 'zzz' of losses"),
]


@pytest.mark.parametrize(("weights", "settings", "message"), REFUSED)
def test_refusals(weights: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Objective(weights, settings)


@pytest.mark.parametrize(("value", "answers"), [(-0.1, 2), (1.1, 2), (math.nan, 2), ("x", 2), (True, 2), (0.5, 1)])
def test_ld_alpha_refusals(value: Any, answers: int) -> None:
    message = "stand alone" if answers == 1 else re.escape(f"from 0 to 1 (1 discounts nothing), got {value!r}")
    with pytest.raises(InputError, match=message):
        answer_sums(torch.zeros(answers, 3, 4), torch.ones(answers, 3), ld_alpha=value)


def test_parse_losses() -> None:
    assert parse_losses(["sigmoid"]) == {"sigmoid": 1.0}
    assert parse_losses(["sigmoid=0.8", "sft=.2", "ipo"]) == {"sigmoid": 0.8, "sft": 0.2, "ipo": 1.0}
    for entry in ("sigmoid=", "sigmoid=much", "sigmoid=1=2"):
        with pytest.raises(InputError, match=re.escape(f"NAME=WEIGHT with a number as weight, got {entry!r}")):
            parse_losses([entry])
    with pytest.raises(InputError, match="loss ipo is given twice"):
        parse_losses(["ipo", "ipo=2"])


def test_what_an_objective_asks_for() -> None:
    plain, free = Objective({"sigmoid": 1.0}), Objective({"simpo": 1.0, "sft": 0.1})
    points = lambda aim: {term.point for term in aim.terms()} - {None}  # noqa: E731
    asked = lambda aim: (aim.unpaired, aim.needs_reference, points(aim))  # noqa: E731
    assert asked(plain) == (False, True, set()) and asked(free) == (False, False, set())
    assert free.beta == 2.0
    kto, bco = Objective({"kto": 1.0, "bco-unpaired": 1.0}), Objective({"sigmoid": 1.0, "bco": 1.0}, {"beta": 0.4})
    assert asked(kto) == (True, True, {"kl", "shift"})
    assert asked(bco) == (False, True, {"shift"}) and bco.beta == 0.4
    assert Objective({"sigmoid": 1.0, "sppo-hard": 1.0}).settings_of("sppo-hard") == {"beta": 1e-3}
