"""Losses of reinforcement against their formulas, and the policy gradient against the exact one."""

from collections.abc import Callable
from inspect import signature
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.trainer.losses import policy
from fourbit.trainer.losses.policy import POLICIES, Policy, Rollouts
from fourbit.trainer.losses.tokens import Tempered, token_entropy, token_scores

ROLLOUTS = 20_000


def gae_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 as it stands: a sum over what follows, for each token anew."""
    ahead = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * v1 - v for r, v1, v in zip(rewards, ahead, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip
def test_gae_is_the_plain_loop_on_answers_of_any_length(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    width = max(1, *lengths)
    rewards, values = (torch.randn(len(lengths), width, generator=draw, dtype=torch.float64) for _ in range(2))
    counts = torch.arange(width) < torch.tensor(lengths)[:, None]
    values = torch.where(counts, values, torch.nan)  # what is past an answer's end is never read
    found, returns = policy.gae(rewards, values, counts, gamma=gamma, lam=lam)
    for i, length in enumerate(lengths):
        wanted = torch.tensor(
            gae_loop(rewards[i, :length].tolist(), values[i, :length].tolist(), gamma, lam), dtype=torch.float64
        )
        torch.testing.assert_close(found[i, :length], wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(returns[i, :length], wanted + values[i, :length], rtol=1e-9, atol=1e-9)
        assert not found[i, length:].any() and not returns[i, length:].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.sampled_from(["token", "answer", "sum", "length"]))
def test_a_step_does_not_depend_on_how_it_is_split(lengths: list[int], mean: policy.Mean) -> None:
    draw = torch.Generator().manual_seed(len(lengths))
    counts = torch.arange(5) < torch.tensor(lengths)[:, None]
    losses = torch.randn(counts.shape, generator=draw, dtype=torch.float64)

    def whole(parts: list[slice]) -> Tensor:
        each = [policy.mean_weights(counts[part], mean, 7) for part in parts]
        total = sum((losses[part] * w).sum() for part, (w, _) in zip(parts, each, strict=True))
        return total / torch.stack([divisor for _, divisor in each]).sum().clamp(min=1)

    alone = [slice(i, i + 1) for i in range(len(lengths))]
    torch.testing.assert_close(whole([slice(None)]), whole(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [policy.clipped, policy.cispo, policy.sapo, policy.vespo])
def test_gradients_at_the_start_are_the_policy_gradient_and_far_ratios_stay_finite(
    loss: Callable[[Rollouts], Tensor],
) -> None:
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    advantages, counts = torch.tensor([[2.0], [-3.0]]), torch.ones(2, 3, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(loss(Rollouts(logps, logps.detach(), advantages, counts)).sum(), logps)
    torch.testing.assert_close(gradient, -advantages.expand(2, 3))
    for far in (-1e4, 1e4):
        losses = loss(Rollouts(logps, logps.detach() + far, advantages, counts))
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        assert losses.isfinite().all() and gradient.isfinite().all()


class Toy:
    """Two tokens of three kinds, one softmax for the first and one for the second by what the first was; every answer
    has a reward of its own."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.theta = (0.5 * torch.randn(4, 3, generator=draw, dtype=torch.float64)).requires_grad_()
        self.rewards = torch.randn(3, 3, generator=draw, dtype=torch.float64)

    def logps(self, answers: Tensor) -> Tensor:
        first, second = answers.unbind(1)
        table = self.theta.log_softmax(1)
        return torch.stack([table[0, first], table[1 + first, second]], 1)

    def exact(self) -> Tensor:
        """The gradient of the expected reward."""
        every = torch.tensor([*product(range(3), repeat=2)])
        value = (self.logps(every).sum(1).exp() * self.rewards.flatten()).sum()
        return torch.autograd.grad(value, self.theta)[0]

    def sample(self, number: int, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        probs = self.theta.detach().softmax(1)
        first = torch.multinomial(probs[0].expand(number, 3), 1, generator=draw).squeeze(1)
        return torch.stack([first, torch.multinomial(probs[1 + first], 1, generator=draw).squeeze(1)], 1)


GROUP, STEP = 4, 8  # answers to a prompt, and of a step: two prompts
BIAS = {"none": 1.0, "leave-one-out": 1.0, "group": 1 - 1 / GROUP, "batch": 1 - 1 / STEP}  # of a baseline


def estimate(toy: Toy, way: Policy, answers: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the steps' gradients by a loss as it is shipped, each divided by what a token weighs there, and its
    standard error. advantages: [answers, 1 or L]."""
    logps = toy.logps(answers)
    counts = torch.ones_like(logps, dtype=torch.bool)
    weights, number = policy.mean_weights(counts, way.mean, max_length=2)
    losses = (way.surrogate(Rollouts(logps, logps.detach(), advantages, counts)) * weights).sum(1) / number
    whole = signature(way.surrogate).parameters.get("level")
    each = weights[0, 0] / number * (2 if whole is not None and whole.default == "answer" else 1)
    chunks = (losses / each).split(25 * STEP)
    grads = torch.stack([torch.autograd.grad(chunk.mean(), toy.theta, retain_graph=True)[0] for chunk in chunks])
    return -grads.mean(0), grads.std(0) / len(grads) ** 0.5


def agrees(found: tuple[Tensor, Tensor], wanted: Tensor) -> bool:
    """Within 3 standard errors in each of the 12 places."""
    return bool(((found[0] - wanted).abs() <= 3 * found[1]).all())


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "ppo"])
def test_the_policy_gradient_is_the_exact_one(name: str) -> None:
    """Of every loss with its own baseline, rewards not divided by their deviation, in the mean over 20,000 rollouts in
    steps of 8: exactly where the baseline knows nothing of the answer (leave-one-out, none), else less by the answer's
    own part in the mean that is taken off it, 1/4 of a group and 1/8 of a step."""
    toy, way = Toy(), POLICIES[name]
    answers = toy.sample(ROLLOUTS, seed=7)
    rewards = toy.rewards[answers[:, 0], answers[:, 1]].view(-1, STEP // GROUP, GROUP)
    advantages = torch.stack([policy.advantages(step, way.baseline, "none") for step in rewards]).view(-1, 1)
    found, exact, bias = estimate(toy, way, answers, advantages), toy.exact(), BIAS[way.baseline]
    assert agrees(found, bias * exact)
    assert (bias == 1) == (name == "rloo")
    assert bias == 1 or not agrees(found, exact)  # the bias is seen, so the test can tell
    assert (found[1] < 0.02).all() and exact.abs().max() > 0.1


@pytest.mark.parametrize("lam, values", [(1.0, "any"), (0.95, "right"), (0.0, "right")])
def test_ppos_gradient_is_the_exact_one_under_fixed_values(lam: float, values: str) -> None:
    """Under any values with lambda 1, under the right ones with every lambda; not under others with lambda 0. Whitening
    divides by a number, and what it takes off all is without effect in the mean over many answers."""
    toy, way = Toy(), POLICIES["ppo"]
    answers = toy.sample(ROLLOUTS, seed=7)
    rewards = torch.stack([torch.zeros(ROLLOUTS), toy.rewards[answers[:, 0], answers[:, 1]]], 1).double()
    counts = torch.ones_like(rewards, dtype=torch.bool)
    after = (toy.theta.detach()[1:].softmax(1) * toy.rewards).sum(1)  # [3] what is to come after each first token
    start = (toy.theta.detach()[0].softmax(0) * after).sum()
    for shift, holds in ((0.0, True), (torch.tensor([1.0, -2.0, 0.5]).double(), lam == 1)):
        if values == "right" or holds:
            known = torch.stack([start.expand(ROLLOUTS), (after + shift)[answers[:, 0]]], 1)
            advantages, _ = policy.gae(rewards, known, counts, gamma=1.0, lam=lam)
            assert agrees(estimate(toy, way, answers, advantages), toy.exact()) == holds
            white = policy.advantages(advantages, "batch", "batch", 1e-8) * advantages.std()
            assert agrees(estimate(toy, way, answers, white), toy.exact()) == holds


def test_estimates_of_the_kl_are_right_in_the_mean_and_k2_has_its_gradient() -> None:
    toy, other = Toy(), torch.randn(4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.3
    answers = toy.sample(ROLLOUTS, seed=11)[:, :1]
    mine, theirs = toy.theta.log_softmax(1)[0], (toy.theta.detach() + other).log_softmax(1)[0]
    exact = (mine.exp() * (mine - theirs)).sum()
    (gradient,) = torch.autograd.grad(exact, toy.theta, retain_graph=True)
    logps, reference = mine[answers], theirs[answers]
    unbiased: tuple[policy.Estimator, ...] = ("k1", "k3")
    for name in unbiased:
        each = policy.kl_estimate(logps, reference, name).detach()
        assert (each.mean() - exact).abs() < 3 * each.std() / ROLLOUTS**0.5
    as_losses: tuple[policy.Estimator, ...] = ("k1", "k2")
    means = [policy.kl_estimate(logps, reference, name).mean() for name in as_losses]
    k1, k2 = (torch.autograd.grad(mean, toy.theta, retain_graph=True)[0] for mean in means)
    assert (k2 - gradient).abs().max() < 0.01 < gradient.abs().max()
    assert k1.abs().max() < 0.01  # so as a loss k1 does nothing


def test_values_are_clipped_and_whitened() -> None:
    old, returns = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    values = torch.tensor([[0.1, 0.5, 0.5]], requires_grad=True)
    loss = policy.value_loss(values, old, returns, clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([[0.81, 0.64, 2.25]]) / 2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([[-0.9, 0.0, 1.5]]))  # past the clip, towards the return: none
    given = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.nan, torch.nan]])
    made = policy.advantages(given, "batch", "batch", 1e-8)
    torch.testing.assert_close(made, torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))


def test_weights_of_what_was_sampled_otherwise_are_cut_off() -> None:
    trained, sampled = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -3.0]])
    torch.testing.assert_close(policy.importance(trained, sampled), torch.tensor([[0.5, 2.0]]).exp().clamp(max=2.0))


def test_shapes_are_not_broadcast() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"advantages \[N, L\] or \[N, 1\]"):
        Rollouts(ones, ones, torch.ones(2), ones.bool())
    with pytest.raises(ValueError, match="one shape"):
        Rollouts(ones, ones[:, :1], torch.ones(2, 1), ones.bool())


def test_the_entropy_has_its_gradient_through_any_head() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 5, generator=draw, dtype=torch.float64)
    head = torch.nn.Linear(5, 11, dtype=torch.float64).requires_grad_(False)
    scale = torch.arange(1.0, 8, dtype=torch.float64)
    for one, logits in (
        (weight, hidden @ weight.T), (head, head(hidden)), (Tempered(head, 0.5), head(hidden) / 0.5),
    ):  # fmt: skip
        wanted = torch.distributions.Categorical(logits=logits).entropy()
        got = token_entropy(one, hidden)
        torch.testing.assert_close(got, wanted)
        gradients = [torch.autograd.grad((values * scale).sum(), hidden)[0] for values in (got, wanted)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(token_scores(one, hidden, torch.zeros(7, dtype=torch.int64)).entropy, got)


def test_a_token_that_is_banned_has_no_part_in_the_entropy() -> None:
    hidden = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(2, 4, dtype=torch.float64).requires_grad_(False)
    head.bias[2] = -torch.inf
    got, wanted = token_entropy(head, hidden), head(hidden)[:, [0, 1, 3]]
    wanted = torch.distributions.Categorical(logits=wanted).entropy()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.sum(), hidden, retain_graph=True)[0] for each in (got, wanted))
    )
