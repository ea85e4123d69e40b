"""Losses on answers that were judged one by one, good or bad: pure functions, one number an answer.

As `pairs`, whose notation this shares: h(y) = log π(y) - log π_ref(y). Each returns [P], not reduced.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .pairs import Scores, alike


def mismatch_kl(answer: Tensor, reference: Tensor) -> Tensor:
    """KTO's reference point z0: max(0, mean of h(y')) over answers y' set against prompts they do not belong to.
    answer, reference: any shape, log-probabilities of such answers under the policy and the reference. Returns 0-d,
    without gradient. One number must serve a whole optimizer step, so give it the answers of all its micro-batches."""
    alike("mismatch_kl", answer=answer, reference=reference)
    return (answer - reference).detach().mean().clamp(min=0)


def kto(
    scores: Scores, kl: Tensor, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """KTO: λ_D σ(-β(h(y) - z0)) for good answers, λ_U σ(-β(z0 - h(y))) for bad. Ethayarajh et al. 2024, 2402.01306.
    kl: z0, 0-d, from `mismatch_kl`; it carries no gradient. σ(-x) stands for 1 - σ(x). The authors advise weights with
    λ_D · n_good / (λ_U · n_bad) between 1 and 4/3."""
    gain = beta * (scores.ratio - kl.detach())
    return _weighed(scores, gain, desirable_weight, undesirable_weight)


def bco_unpaired(scores: Scores, shift: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO: -log σ(βh(y) - δ) for good answers, -log σ(δ - βh(y)) for bad ones. Jung et al. 2024, arXiv 2404.04656.
    shift: δ, 0-d, from `reward_shift`: it lies midway, so it does not follow whichever side has more answers."""
    gain = beta * scores.ratio - shift
    return -logsigmoid(torch.where(scores.good, gain, -gain)).squeeze(0)


def apo_zero_unpaired(
    scores: Scores, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero taken apart: λ_D σ(-βh(y)) for good, λ_U σ(βh(y)) for bad. D'Oosterlinck et al. 2024, 2408.06266."""
    return _weighed(scores, beta * scores.ratio, desirable_weight, undesirable_weight)


def _weighed(scores: Scores, gain: Tensor, desirable: float, undesirable: float) -> Tensor:
    """λ_D σ(-x) for good answers, λ_U σ(x) for bad ones."""
    return torch.where(scores.good, desirable * (-gain).sigmoid(), undesirable * gain.sigmoid()).squeeze(0)
