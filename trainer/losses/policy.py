"""Losses of reinforcement: pure functions on the log-probabilities of sampled answers, one number a token.

Notation: π the policy as it is now, π_old the same policy before the first update on this batch of rollouts, μ what
sampled the answers, A an advantage, r = π / π_old, |y| an answer's tokens. A surrogate takes `Rollouts` and its own
settings by name and returns [N, L], not reduced: `mean_weights` says what each token counts, over a whole optimizer
step, so no loss depends on how the step was split into micro-batches. Gradients at r = 1 are those of -A log π.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .pairs import STEEPEST, alike, safe_exp, safe_expm1

Level = Literal["token", "mean", "answer"]  # of ratios: each token's own; or one an answer, its geometric mean, or it
Mean = Literal["token", "answer", "sum", "length"]
Estimator = Literal["k1", "k2", "k3"]
Baseline = Literal["group", "leave-one-out", "batch", "none"]
Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Rollouts:
    """N sampled answers of at most L tokens.

    logps: [N, L] fp32 or float64, of each token under π, with its gradient. old: the same under π_old, without one.
    advantages: [N, L], or [N, 1] of whole answers. counts: [N, L] bool, the tokens that are trained. reference: [N, L]
    log-probabilities under the reference, or None. Raises ValueError for other shapes: nothing else is broadcast."""

    logps: Tensor
    old: Tensor
    advantages: Tensor
    counts: Tensor
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        alike(
            "rollouts", logps=self.logps, old=self.old, reference=self.old if self.reference is None else self.reference
        )
        shape = self.logps.shape
        if len(shape) != 2 or self.counts.shape != shape or self.advantages.shape not in (shape, (shape[0], 1)):
            got = f"logps {[*shape]}, counts {[*self.counts.shape]}, advantages {[*self.advantages.shape]}"
            raise ValueError(f"rollouts take logps and counts [N, L] and advantages [N, L] or [N, 1], got {got}")

    def log_ratio(self, level: Level = "token") -> Tensor:
        """log r: [N, L], or of whole answers [N, 1]."""
        each = torch.where(self.counts, self.logps - self.old, 0.0)
        if level == "token":
            return each
        whole = each.sum(1, keepdim=True)
        return whole / self.counts.sum(1, keepdim=True).clamp(min=1) if level == "mean" else whole


def clipped(
    rollouts: Rollouts,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = None,
    clip_most: float | None = None,
    level: Level = "token",
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO, Schulman et al. 2017, arXiv 1707.06347, equation 7.
    high: by default low; above it, DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476). Both None: no clip, so with
    one update a batch plain REINFORCE. most: r is at most this where A is negative (dual clip, Ye et al. 2020,
    arXiv 1912.09729). level "mean": GSPO, r = (π(y) / π_old(y))^(1/|y|) (Zheng et al. 2025, arXiv 2507.18071);
    "answer": RLOO, r = π(y) / π_old(y) (Ahmadian et al. 2024, arXiv 2402.14740)."""
    ratio = safe_exp(rollouts.log_ratio(level))
    loss = -ratio * rollouts.advantages
    clip_high = clip_low if clip_high is None else clip_high
    if clip_high is not None:
        inside = ratio.clamp(None if clip_low is None else 1 - clip_low, 1 + clip_high)
        loss = torch.maximum(loss, -inside * rollouts.advantages)
    if clip_most is not None:
        most = torch.minimum(loss, -clip_most * rollouts.advantages)
        loss = torch.where(rollouts.advantages < 0, most, loss)
    return loss.expand_as(rollouts.logps)


def outside(surrogate: Callable[..., Tensor], rollouts: Rollouts) -> Tensor | None:
    """[N, L] bool: tokens whose gradient `clipped` takes away. None of a surrogate that is another."""
    if "clip_most" not in signature(surrogate).parameters:
        return None
    return surrogate(rollouts) != surrogate(rollouts, clip_low=None, clip_high=None, clip_most=None)


def cispo(rollouts: Rollouts, *, clip_low: float | None = None, clip_high: float = 5.0) -> Tensor:
    """-sg(clip(r, 1 - low, 1 + high)) A log π: weights are clipped and every token keeps its gradient. MiniMax 2025,
    arXiv 2506.13585, equation 4; low None: no lower bound, as there."""
    weight = safe_exp(rollouts.log_ratio()).clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return -weight.detach() * rollouts.advantages * rollouts.logps


def sapo(rollouts: Rollouts, *, positive: float = 1.0, negative: float = 1.05) -> Tensor:
    """-(4 / τ) σ(τ (r - 1)) A, with τ by the sign of A: a soft gate instead of a clip. Gao et al. 2025, arXiv
    2511.20347."""
    gained, lost = (rollouts.logps.new_tensor(side) for side in (positive, negative))
    tau = torch.where(rollouts.advantages > 0, gained, lost)
    return -(4 / tau) * (tau * safe_expm1(rollouts.log_ratio())).sigmoid() * rollouts.advantages


def vespo(
    rollouts: Rollouts, *, positive: tuple[float, float] = (2.0, 3.0), negative: tuple[float, float] = (3.0, 2.0)
) -> Tensor:
    """-sg(w^k e^(λ (1 - w))) A log π, with w = π(y) / π_old(y) and (k, λ) by the sign of A: answers far from what
    sampled them fade out. VESPO, 2026, arXiv 2602.10693."""
    gained, lost = (rollouts.logps.new_tensor(side) for side in (positive, negative))
    power, rate = torch.where(rollouts.advantages[..., None] >= 0, gained, lost).unbind(-1)
    log_ratio = rollouts.log_ratio("answer").clamp(max=STEEPEST)
    weight = (power * log_ratio - rate * safe_expm1(log_ratio)).exp()
    return -weight.detach() * rollouts.advantages * rollouts.logps


def mean_weights(counts: Tensor, mean: Mean = "token", max_length: int = 1) -> tuple[Tensor, Tensor]:
    """What each token's loss is multiplied with, [N, L], and this batch's share of the number that the sum over all
    batches of a step is divided by, 0-d float64. counts: [N, L] bool.

    "token": all tokens of a step weigh the same (DAPO, and the clipped loss of PPO). "answer": all answers do, each a
    mean over its tokens (GRPO, Shao et al. 2024, arXiv 2402.03300); one without a token that counts adds 0. "length":
    a sum over tokens divided by `max_length` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). "sum": that sum itself, so
    that long answers weigh more (with level "mean": LUSPO, 2026, arXiv 2602.05261)."""
    each = counts.to(torch.float64)
    if mean == "token":
        return each, each.sum().clamp(
            min=torch.finfo(torch.float32).tiny
        )  # where nothing counts the mean is 0, not NaN
    divisor = each.sum(1, keepdim=True).clamp(min=1) if mean == "answer" else max_length if mean == "length" else 1
    return each / divisor, each.new_tensor(float(len(each)))


def kl_estimate(logps: Tensor, reference: Tensor, estimator: Estimator = "k3") -> Tensor:
    """KL(π || π_ref) at each token that π sampled, from log-probabilities of one shape. Schulman 2020, "Approximating
    KL divergence": with x = log π - log π_ref, k1 = x (unbiased), k2 = x^2 / 2, k3 = e^-x + x - 1 (unbiased, never
    below 0). As a loss k2 has the gradient of the KL in the mean; k1's is 0 in the mean, so it belongs in a reward."""
    alike("kl_estimate", logps=logps, reference=reference)
    log_ratio = logps - reference
    if estimator == "k1":
        return log_ratio
    return log_ratio.square() / 2 if estimator == "k2" else safe_expm1(-log_ratio) + log_ratio


def importance(trained: Tensor, sampled: Tensor, most: float = 2.0) -> Tensor:
    """Truncated weights min(π_old / μ, most) of tokens whose sampling rounded otherwise, [N, L], without gradient.
    trained, sampled: log-probabilities of one shape. Espeholt et al. 2018 (IMPALA), arXiv 1802.01561."""
    alike("importance", trained=trained, sampled=sampled)
    return safe_exp((trained - sampled).detach()).clamp(max=most)


def strayed(rollouts: Rollouts, sampled: Tensor, most: float) -> Tensor:
    """[N, L] bool, or [N, 1] as the advantages are: those below 0 of answers whose mean log(μ / π) a token is above
    `most`, which then teach nothing. DeepSeek-V3.2, 2025, arXiv 2512.02556."""
    gap = torch.where(rollouts.counts, sampled - rollouts.logps.detach(), 0.0).sum(1, keepdim=True)
    far = gap / rollouts.counts.sum(1, keepdim=True).clamp(min=1) > most
    return far & (rollouts.advantages < 0)


def uncertain(entropy: Tensor, counts: Tensor, share: float) -> Tensor:
    """[N, L] bool: the `share` of the tokens that count at which the policy was least sure. Wang et al. 2025, arXiv
    2506.01939. entropy: [N, L] of all rollouts of a step, for the threshold is theirs."""
    return counts & (entropy >= torch.quantile(entropy[counts].float(), 1 - share)) if counts.any() else counts


def advantages(rewards: Tensor, baseline: Baseline = "group", scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """[P, G] of rewards [P, G], G answers to each of P prompts; NaN, as of a reward that failed, has the advantage 0
    and no part in the others'. Of tokens' own numbers, with baseline and scale "batch", they are whitened.

    baseline: what is taken off, a group's mean (GRPO), the mean of the group's other answers (RLOO: unbiased), the mean
    of all, or nothing. scale: divided by the standard deviation (of n - 1) of the group or of all, plus eps; "none": as
    it is (Dr. GRPO). ValueError for a leave-one-out of single answers."""
    there, values = ~rewards.isnan(), rewards.nan_to_num()
    number, total = there.sum(1, keepdim=True), values.sum(1, keepdim=True)
    if baseline == "leave-one-out":
        if rewards.shape[1] < 2:
            raise ValueError(f"leave-one-out needs 2 answers a prompt or more, got rewards {[*rewards.shape]}")
        base = torch.where(number > 1, (total - values) / (number - 1).clamp(min=1), values)
    elif baseline == "group":
        base = total / number.clamp(min=1)
    else:
        base = values.sum() / there.sum().clamp(min=1) if baseline == "batch" else values.new_zeros(())
    found = values - base
    if scale != "none":
        found = found / (deviation(values, there, 1 if scale == "group" else None) + eps)
    return torch.where(there, found, 0.0)


def deviation(values: Tensor, there: Tensor, dim: int | None) -> Tensor:
    """Of n - 1, over what is there; 0 of fewer than two."""
    dims = [dim] if dim is not None else [*range(values.ndim)]
    number = there.sum(dims, keepdim=True)
    mean = torch.where(there, values, 0.0).sum(dims, keepdim=True) / number.clamp(min=1)
    squares = torch.where(there, values - mean, 0.0).square().sum(dims, keepdim=True)
    return (squares / (number - 1).clamp(min=1)).sqrt()


def gae(
    rewards: Tensor, values: Tensor, counts: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that values are trained to, [N, L] each. Schulman et al. 2015, arXiv
    1506.02438, equation 16: A_t = Σ_k (γλ)^k δ_(t+k), δ_t = r_t + γ V_(t+1) - V_t; the return is A_t + V_t.

    rewards: [N, L] of each token, an answer's own on its last one. values: [N, L], of the state before the token.
    counts: [N, L] bool, an answer's tokens, from its first on; after the last the value is 0."""
    alike("gae", rewards=rewards, values=values)
    found = torch.zeros_like(values)
    following, ahead = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        here, value = counts[:, t], values[:, t]
        ahead = torch.where(here, rewards[:, t] + gamma * following - value + gamma * lam * ahead, 0.0)
        following = torch.where(here, value, 0.0)
        found[:, t] = ahead
    return found, torch.where(counts, found + values, 0.0)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """max((V - R)^2, (clip(V, V_old ± clip) - R)^2) / 2 at each token, as in the PPO of Ziegler et al. 2019, arXiv
    1909.08593. One shape; returns the same."""
    alike("value_loss", values=values, old=old, returns=returns)
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


class Policy(NamedTuple):
    """A way to reinforce: its surrogate, what tokens weigh, and how rewards become advantages ("ppo": `gae`)."""

    surrogate: Callable[..., Tensor]
    mean: Mean
    baseline: Baseline = "group"
    scale: Scale = "group"


POLICIES = {
    "grpo": Policy(clipped, "answer"),
    "dr-grpo": Policy(clipped, "length", "group", "none"),
    "dapo": Policy(partial(clipped, clip_high=0.28), "token"),
    "gspo": Policy(partial(clipped, clip_low=3e-4, clip_high=4e-4, level="mean"), "answer"),
    "luspo": Policy(partial(clipped, level="mean"), "sum"),
    "cispo": Policy(cispo, "token"),
    "sapo": Policy(sapo, "answer"),
    "vespo": Policy(vespo, "token"),
    "rloo": Policy(partial(clipped, level="answer"), "answer", "leave-one-out", "none"),
    "reinforce": Policy(partial(clipped, clip_low=None), "sum", "batch", "none"),
    "ppo": Policy(clipped, "token", "none", "none"),
}
SPREADS: dict[Baseline, tuple[Scale, ...]] = {
    "group": ("group", "batch", "none"),
    "leave-one-out": ("group", "batch", "none"),
    "batch": ("batch", "none"),
    "none": ("none",),
}
"""By baseline the scales that it may have: where the deviation is 0, so is what is left of each reward."""


def way_of(name: str, baseline: Baseline | None = None, scale: Scale | None = None, **clips: float | None) -> Policy:
    """The policy of that name, with what of it is said otherwise. Raises ValueError for a scale that would divide by
    nearly 0 what another mean has left."""
    own = POLICIES[name]
    surrogate = partial(own.surrogate, **{clip: value for clip, value in clips.items() if value is not None})
    spreads = SPREADS[baseline := baseline or own.baseline]
    scale = scale or (own.scale if own.scale in spreads else spreads[0])
    if scale not in spreads:
        raise ValueError(
            f"scale_rewards {scale} divides by a deviation that is 0 where rewards are equal, and a baseline of "
            f"{baseline} leaves them above 0 there: give {' or '.join(spreads)}, or none of them"
        )
    return Policy(surrogate, own.mean, baseline, scale)
