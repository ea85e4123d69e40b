"""What a preference loss sees: the log-probabilities of whole answers, and the few numbers that outlive a batch.

Per-token log-probabilities become one number an answer here, whole (`answer_sums`) or with the longer answer's tail
discounted (LD-DPO). Everything stays on its device and nothing waits for it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

NEVER_SURE = 1e-12  # a probability of 1 - 1e-12 is the largest that `token_kl` works with: log(1 - p) stays finite
STEEPEST = 30.0  # exp goes on along its tangent past this: its square times 1e4 is still far below the largest fp32


@dataclass(frozen=True)
class PairScores:
    """P pairs. All [P], fp32 or float64; the policy's carry the gradient, the reference's none.

    chosen, rejected: the policy's log-probability of each whole answer given its prompt.
    reference_chosen, reference_rejected: the reference model's; zeros where no loss asks for a reference.
    chosen_tokens, rejected_tokens: how many tokens each answer was scored on, at least 1.
    undiscounted: chosen before `ld_alpha` discounted its tail, for SFT terms; None where nothing was discounted.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    undiscounted: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """log π(chosen) - log π_ref(chosen), [P]."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """Log-probability a token, [P]."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        return self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class JudgedScores:
    """P answers, each judged good or bad on its own. All [P].

    answer, reference: log-probability of each whole answer under the policy (with gradient) and the reference.
    labels: bool, True where the answer is a good one.
    """

    answer: Tensor
    reference: Tensor
    labels: Tensor

    @property
    def ratio(self) -> Tensor:
        return self.answer - self.reference


class RewardShift(NamedTuple):
    """BCO's running mean: the middle between the mean reward of good answers and that of bad ones, all so far.

    value: 0-d, what losses subtract; fixed within an optimizer step, so that a step's loss does not depend on how it
    was split into micro-batches. totals, counts: [2], rewards added so far of good and of bad answers. All float64.
    A side without answers counts as 0, the reward that every answer starts with.
    """

    value: Tensor
    totals: Tensor
    counts: Tensor

    @classmethod
    def start(cls, device: torch.device | str = "cpu") -> "RewardShift":
        zeros = torch.zeros(2, dtype=torch.float64, device=device)
        return cls(zeros[0].clone(), zeros, zeros.clone())

    def add(self, rewards: Tensor, labels: Tensor) -> "RewardShift":
        """With more rewards counted. rewards: any shape; labels: bool, same shape, True for good answers."""
        sides = torch.stack([labels, ~labels]).to(torch.float64)  # [2, ...]
        totals = (sides * rewards.detach().to(torch.float64)).flatten(1).sum(1)
        return RewardShift(self.value, self.totals + totals, self.counts + sides.flatten(1).sum(1))

    def settle(self) -> "RewardShift":
        """After an optimizer step: `value` becomes the mean of everything added."""
        return self._replace(value=(self.totals / self.counts.clamp(min=1)).mean())


def answer_sums(logps: Tensor, lengths: Tensor, *, ld_alpha: float | None = None) -> Tensor:
    """Log-probability of each whole answer.

    logps: [A, P, L] per token, zero past an answer's end. lengths: [A, P] int64. Returns [A, P].
    ld_alpha: LD-DPO (Liu et al. 2024, arXiv 2409.06411) with α in [0, 1]: tokens of an answer past the length of its
    pair's shortest answer, l_p, count α times, Σ_{t <= l_p} log π(y_t) + α Σ_{t > l_p} log π(y_t); a long answer then
    wins less by being long. α = 1 discounts nothing.
    Raises InputError for an α outside [0, 1], or answers that have nothing to be compared with.
    """
    if ld_alpha is not None:
        check_ld_alpha(ld_alpha)
        if len(lengths) < 2:
            raise InputError("ld_alpha compares the two answers of a pair, and these answers stand alone: leave it out")
        tail = torch.arange(logps.shape[-1], device=logps.device) >= lengths.amin(0).unsqueeze(-1)  # [P, L]
        logps = torch.where(tail, ld_alpha * logps, logps)
    return logps.sum(-1)


def check_ld_alpha(value: object) -> None:
    """InputError for an alpha of LD-DPO that is no number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"ld_alpha must be a number from 0 to 1 (1 discounts nothing), got {value!r}")


def pair_scores(
    logps: Tensor, lengths: Tensor, reference: Tensor | None = None, *, ld_alpha: float | None = None
) -> PairScores:
    """PairScores of P pairs.

    logps, reference: [2, P, L], the policy's and the reference's per-token log-probabilities, chosen first, zero past
    an answer's end; without a reference its sums are zeros. lengths: [2, P]. ld_alpha: as in `answer_sums`, for both.
    """
    chosen, rejected = answer_sums(logps, lengths, ld_alpha=ld_alpha)
    base = _reference_sums(logps, lengths, reference, ld_alpha)
    undiscounted = None if ld_alpha is None else logps[0].sum(-1)
    return PairScores(chosen, rejected, base[0], base[1], lengths[0], lengths[1], undiscounted)


def judged_scores(logps: Tensor, lengths: Tensor, labels: Tensor, reference: Tensor | None = None) -> JudgedScores:
    """JudgedScores of P answers. logps, reference: [1, P, L] as in `pair_scores`. lengths: [1, P]. labels: [P] bool."""
    base = _reference_sums(logps, lengths, reference, None)
    return JudgedScores(answer_sums(logps, lengths)[0], base[0], labels)


def _reference_sums(logps: Tensor, lengths: Tensor, reference: Tensor | None, ld_alpha: float | None) -> Tensor:
    if reference is None:
        return torch.zeros_like(lengths, dtype=logps.dtype)
    return answer_sums(reference.detach(), lengths, ld_alpha=ld_alpha)


def token_kl(logps: Tensor, reference: Tensor) -> Tensor:
    """How far the policy has moved at each token of an answer: a lower bound of KL(policy || reference), in nats.

    It is the divergence of "this token or another one", p log(p/q) + (1-p) log((1-p)/(1-q)), which is at most that of
    the whole distributions and equal to it over two tokens. It needs no samples of the policy, which the answers of
    preference data are not; the usual estimates from samples (k1, k3) are negative or without bound there.
    Any shape, returns the same, fp32 or float64, never negative; no gradient.
    """
    p, q = (x.detach().double().clamp(max=-NEVER_SURE) for x in (logps, reference))
    not_p, not_q = ((-x.expm1()).log() for x in (p, q))
    return (p.exp() * (p - q) + not_p.exp() * (not_p - not_q)).clamp(min=0).to(logps.dtype)


def safe_exp(x: Tensor) -> Tensor:
    """exp, going on along its tangent past STEEPEST: finite, rising, and with a gradient for any x of fp32's range."""
    return x.clamp(max=STEEPEST).exp() * (1 + (x - STEEPEST).relu())


def safe_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, exact near zero, going on along its tangent as `safe_exp` does."""
    low = x.clamp(max=STEEPEST)
    return low.expm1() + low.exp() * (x - STEEPEST).relu()
