"""Losses on answers that were judged one by one, good or bad: pure functions, one number an answer.

As `pairs`, whose notation this shares: h(y) = log π(y) - log π_ref(y). Each returns [P], not reduced.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .pairs import answer_sums, rewards_seen


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

    def seen(self, beta: float) -> Tensor:
        """`rewards_seen` of these answers."""
        return rewards_seen(beta * self.ratio, self.labels)


def judged_scores(logps: Tensor, lengths: Tensor, labels: Tensor, reference: Tensor | None = None) -> JudgedScores:
    """JudgedScores of P answers. logps, reference: [1, P, L] as in `pairs.pair_scores`. lengths: [1, P]. labels: [P]
    bool."""
    reference = torch.zeros_like(logps) if reference is None else reference
    return JudgedScores(answer_sums(logps, lengths)[0], answer_sums(reference.detach(), lengths)[0], labels)


def mismatch_kl(answer: Tensor, reference: Tensor) -> Tensor:
    """KTO's reference point z0: max(0, mean of h(y')) over answers y' set against prompts they do not belong to.

    answer, reference: any shape, log-probabilities of such answers under the policy and the reference. Returns 0-d,
    without gradient. One number must serve a whole optimizer step, so give it the answers of all its micro-batches.
    """
    return (answer - reference).detach().mean().clamp(min=0)


def kto(
    scores: JudgedScores,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: λ_D σ(-β(h(y) - z0)) for good answers, λ_U σ(-β(z0 - h(y))) for bad. Ethayarajh et al. 2024, 2402.01306.

    kl: z0, 0-d, from `mismatch_kl`; it carries no gradient. σ(-x) stands for 1 - σ(x). The authors advise weights
    with λ_D · n_good / (λ_U · n_bad) between 1 and 4/3.
    """
    gain = beta * (scores.ratio - kl.detach())
    return torch.where(scores.labels, desirable_weight * (-gain).sigmoid(), undesirable_weight * gain.sigmoid())


def bco_unpaired(scores: JudgedScores, shift: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO: -log σ(βh(y) - δ) for good answers, -log σ(δ - βh(y)) for bad ones. Jung et al. 2024, arXiv 2404.04656.

    shift: δ, 0-d, from `pairs.reward_shift`: it lies midway, so it does not follow whichever side has more answers.
    """
    gain = beta * scores.ratio - shift
    return -logsigmoid(torch.where(scores.labels, gain, -gain))


def apo_zero_unpaired(
    scores: JudgedScores, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero taken apart: λ_D σ(-βh(y)) for good, λ_U σ(βh(y)) for bad. D'Oosterlinck et al. 2024, 2408.06266."""
    rewards = beta * scores.ratio
    return torch.where(scores.labels, desirable_weight * (-rewards).sigmoid(), undesirable_weight * rewards.sigmoid())
