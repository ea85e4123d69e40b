"""Losses on answers that were judged one by one, good or bad: pure functions, one number an answer.

As trainer/losses.py, whose notation this shares: h(y) = log π(y) - log π_ref(y). Each returns [P], not reduced.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .scores import JudgedScores, RewardShift


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


def bco_unpaired(scores: JudgedScores, shift: RewardShift, *, beta: float = 0.1) -> tuple[Tensor, RewardShift]:
    """BCO: -log σ(βh(y) - δ) for good answers, -log σ(δ - βh(y)) for bad ones. Jung et al. 2024, arXiv 2404.04656.

    δ lies midway between the mean reward of good answers and that of bad ones, so it does not follow whichever are
    more. `shift` as in `losses.bco`: used as it is, returned with these rewards added.
    """
    rewards = beta * scores.ratio
    gain = rewards - shift.value
    return -logsigmoid(torch.where(scores.labels, gain, -gain)), shift.add(rewards, scores.labels)


def apo_zero_unpaired(
    scores: JudgedScores, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero taken apart: λ_D σ(-βh(y)) for good, λ_U σ(βh(y)) for bad. D'Oosterlinck et al. 2024, 2408.06266."""
    rewards = beta * scores.ratio
    return torch.where(scores.labels, desirable_weight * (-rewards).sigmoid(), undesirable_weight * rewards.sigmoid())
