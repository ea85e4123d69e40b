"""Losses on pairs of answers: pure functions on log-probabilities, one number a pair.

Each takes PairScores and its own settings by name, and returns [P], not reduced: the trainer averages over all pairs
of an optimizer step, so no loss depends on how the step was split into micro-batches. Notation: π the policy, π_ref
the reference, y+ the chosen answer, y- the rejected one, h(y) = log π(y) - log π_ref(y) the log-ratio,
Δ = h(y+) - h(y-), σ the logistic function, |y| a number of tokens. `objective` checks settings and has the table of
names. A loss must stay finite, with finite gradients, for log-ratios of ±1e4 in fp32: hence log σ instead of log of σ,
and exponentials that go on along their tangent past e^30.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log, log1p
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...errors import InputError

STEEPEST = 30.0  # exp goes on along its tangent past this: its square times 1e4 is still far below the largest fp32
Compared = Literal["ratio", "sum", "mean"]  # what β multiplies in an implicit reward
Divergence = Callable[[Tensor], Tensor]  # log-ratios -> f'(ratio), up to a constant


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

    def rewards(self, compared: Compared, beta: float) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen answers and of the rejected ones, [P] each, without gradient.

        β times the log-ratio; of losses without a reference, β times what they compare, as TRL reports them: the
        log-probability of the answer ("sum", CPO), or a token's mean of it ("mean", SimPO and ORPO).
        """
        sides = {
            "ratio": (self.chosen_ratio, self.rejected_ratio),
            "sum": (self.chosen, self.rejected),
            "mean": (self.chosen_mean, self.rejected_mean),
        }[compared]
        return (beta * sides[0]).detach(), (beta * sides[1]).detach()

    def seen(self, beta: float) -> Tensor:
        """`rewards_seen` of both sides."""
        rewards = beta * torch.stack([self.chosen_ratio, self.rejected_ratio])
        good = torch.arange(2, device=rewards.device) == 0
        return rewards_seen(rewards, good.unsqueeze(1).expand_as(rewards))


class Term(NamedTuple):
    """One loss of a weighted sum, its settings bound. point: the name of the number that it is given besides."""

    weight: float
    function: Callable[..., Tensor]
    point: str | None


def mixture(terms: Sequence[Term], scores: object, points: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of losses, [P], not reduced. points: the 0-d numbers that terms need, by name."""
    parts = [t.weight * t.function(scores, *([] if t.point is None else [points[t.point]])) for t in terms]
    return torch.stack(parts).sum(0)


def rewards_seen(rewards: Tensor, labels: Tensor) -> Tensor:
    """[2, 2] float64: the sum of the rewards of good answers and of bad ones, and below how many there are of each.

    rewards: any shape; labels: bool, same shape, True for good answers. Those of several batches add up.
    """
    sides = torch.stack([labels, ~labels]).to(torch.float64)  # [2, ...]
    return torch.stack([(sides * rewards.detach().to(torch.float64)).flatten(1).sum(1), sides.flatten(1).sum(1)])


def reward_shift(seen: Tensor) -> Tensor:
    """BCO's δ from `rewards_seen` of all steps so far: midway between the mean reward of good answers and of bad ones.

    0-d. A side without answers counts as 0, the reward that every answer starts with.
    """
    return (seen[0] / seen[1].clamp(min=1)).mean()


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
    reference = torch.zeros_like(logps) if reference is None else reference
    sums = [answer_sums(each, lengths, ld_alpha=ld_alpha) for each in (logps, reference.detach())]
    undiscounted = None if ld_alpha is None else logps[0].sum(-1)
    (chosen, rejected), (base_chosen, base_rejected) = sums
    return PairScores(chosen, rejected, base_chosen, base_rejected, lengths[0], lengths[1], undiscounted)


def reverse_kl(ratio: Tensor) -> Tensor:
    """f'(t) = log t: DPO as it was published, KL(π || π_ref)."""
    return ratio


def forward_kl(ratio: Tensor) -> Tensor:
    """f'(t) = 1 - 1/t, of KL(π_ref || π). Falls off exponentially where the policy deserts an answer."""
    return -safe_expm1(-ratio)


def jsd(ratio: Tensor) -> Tensor:
    """f'(t) = log(2t / (1 + t)), of the Jensen-Shannon divergence. Never above log 2."""
    return log(2) + logsigmoid(ratio)


def alpha_divergence(ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """f'(t) = (t^(α-1) - 1) / (α - 1), α in [0, 1]: forward KL at 0, reverse KL at 1 (as the limit)."""
    return ratio if alpha == 1 else safe_expm1((alpha - 1) * ratio) / (alpha - 1)


def divergence_of(name: str, alpha: float = 0.5) -> Divergence:
    """f-DPO (Wang et al. 2023, arXiv 2309.16240): h(y) becomes f'(π(y) / π_ref(y)) in losses that are made of Δ."""
    return partial(alpha_divergence, alpha=alpha) if name == "alpha" else DIVERGENCES[name]


DIVERGENCES: dict[str, Divergence] = {
    "reverse-kl": reverse_kl,
    "forward-kl": forward_kl,
    "jsd": jsd,
    "alpha": alpha_divergence,
}


def _delta(scores: PairScores, divergence: Divergence) -> Tensor:
    return divergence(scores.chosen_ratio) - divergence(scores.rejected_ratio)


def _mean_delta(scores: PairScores, divergence: Divergence) -> Tensor:
    """Each answer's score divided by its own length, then the difference."""
    chosen, rejected = divergence(scores.chosen_ratio), divergence(scores.rejected_ratio)
    return chosen / scores.chosen_tokens - rejected / scores.rejected_tokens


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1-ε) log σ(x) - ε log σ(-x): cross-entropy with labels that are wrong with probability ε."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def sigmoid(
    scores: PairScores, *, beta: float = 0.1, label_smoothing: float = 0.0, divergence: Divergence = reverse_kl
) -> Tensor:
    """DPO: -log σ(βΔ). Rafailov et al. 2023, arXiv 2305.18290. ln 2 where the policy still is the reference.

    label_smoothing ε: conservative DPO, -(1-ε) log σ(βΔ) - ε log σ(-βΔ), for labels that are wrong with probability
    ε (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO"; no arXiv number).
    """
    return _smoothed(beta * _delta(scores, divergence), label_smoothing)


def robust(
    scores: PairScores, *, beta: float = 0.1, label_smoothing: float = 0.1, divergence: Divergence = reverse_kl
) -> Tensor:
    """Robust DPO: (-(1-ε) log σ(βΔ) + ε log σ(-βΔ)) / (1-2ε). Chowdhury et al. 2024, arXiv 2403.00409.

    Unbiased for labels flipped with probability ε: its mean over flips is the loss on clean labels. Not bounded below.
    """
    logits = beta * _delta(scores, divergence)
    flipped = label_smoothing * logsigmoid(-logits) - (1 - label_smoothing) * logsigmoid(logits)
    return flipped / (1 - 2 * label_smoothing)


def sigmoid_norm(scores: PairScores, *, beta: float = 5.0, divergence: Divergence = reverse_kl) -> Tensor:
    """Length-normalised DPO: -log σ(β (h(y+)/|y+| - h(y-)/|y-|)). Lambert et al. 2024 (Tülu 3), arXiv 2411.15124.

    Log-ratios a token are small, so β is large: the default is theirs.
    """
    return -logsigmoid(beta * _mean_delta(scores, divergence))


def ipo(scores: PairScores, *, beta: float = 0.1, divergence: Divergence = reverse_kl) -> Tensor:
    """IPO: (h(y+)/|y+| - h(y-)/|y-| - 1/(2β))². Azar et al. 2023, arXiv 2310.12036, equation 17 (β is its τ).

    Log-ratios are means a token, as in the authors' experiments; with sums the target would depend on lengths.
    """
    return (_mean_delta(scores, divergence) - 0.5 / beta).square()


def hinge(scores: PairScores, *, beta: float = 0.1, divergence: Divergence = reverse_kl) -> Tensor:
    """SLiC: max(0, 1 - βΔ). Zhao et al. 2023, arXiv 2305.10425; on log-ratios as RSO, Liu et al. 2023, 2309.06657."""
    return (1 - beta * _delta(scores, divergence)).relu()


def exo(
    scores: PairScores, *, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence = reverse_kl
) -> Tensor:
    """EXO: KL((q, 1-q) || (1-ε, ε)) with q = σ(βΔ). Ji et al. 2024, arXiv 2402.00856, equation 16. Needs ε > 0."""
    logits = beta * _delta(scores, divergence)
    right = logits.sigmoid() * (logsigmoid(logits) - log1p(-label_smoothing))
    return right + (-logits).sigmoid() * (logsigmoid(-logits) - log(label_smoothing))


def discopop(
    scores: PairScores, *, beta: float = 0.1, tau: float = 0.05, divergence: Divergence = reverse_kl
) -> Tensor:
    """DiscoPOP: -(1-m) log σ(x) + m e^(-x), x = βΔ, m = σ(x/τ). Lu et al. 2024, arXiv 2406.08414, equation 5.

    m e^(-x) is taken as one exponential: for x far below zero m vanishes faster than e^(-x) grows (τ < 1).
    """
    logits = beta * _delta(scores, divergence)
    mix = logits / tau
    return safe_exp(logsigmoid(mix) - logits) - (-mix).sigmoid() * logsigmoid(logits)


def bco(scores: PairScores, shift: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO: -log σ(βh(y+) - δ) - log σ(-(βh(y-) - δ)). Jung et al. 2024, arXiv 2404.04656.

    shift: δ, 0-d, the mean of all rewards βh up to this optimizer step (`reward_shift`).
    """
    chosen, rejected = beta * scores.chosen_ratio, beta * scores.rejected_ratio
    return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)


def sppo_hard(scores: PairScores, *, beta: float = 1e-3) -> Tensor:
    """SPPO with a win probability of 1: (h(y+) - 1/(2β))² + (h(y-) + 1/(2β))². Wu et al. 2024, arXiv 2405.00675.

    β is 1/η of the paper, whose η is 1000.
    """
    return (scores.chosen_ratio - 0.5 / beta).square() + (scores.rejected_ratio + 0.5 / beta).square()


def nca(scores: PairScores, *, beta: float = 0.1) -> Tensor:
    """NCA on pairs: -log σ(r+) - ½ log σ(-r+) - ½ log σ(-r-), r = βh. Chen et al. 2024, arXiv 2402.05369."""
    chosen, rejected = beta * scores.chosen_ratio, beta * scores.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(scores: PairScores, *, beta: float = 0.1) -> Tensor:
    """APO-zero: σ(-βh(y+)) + σ(βh(y-)). D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.

    For chosen answers that are better than what the model writes: they become likelier, rejected ones less likely.
    """
    return (-beta * scores.chosen_ratio).sigmoid() + (beta * scores.rejected_ratio).sigmoid()


def apo_down(scores: PairScores, *, beta: float = 0.1) -> Tensor:
    """APO-down: σ(βh(y+)) + σ(-βΔ). D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.

    For chosen answers that are worse than what the model writes: both become less likely, rejected ones more so.
    """
    return (beta * scores.chosen_ratio).sigmoid() + (-beta * _delta(scores, reverse_kl)).sigmoid()


def simpo(scores: PairScores, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: -log σ(β log π(y+)/|y+| - β log π(y-)/|y-| - γ), no reference. Meng et al. 2024, arXiv 2405.14734.

    gamma: the margin of rewards aimed at, γ itself (not γ/β). label_smoothing as in `sigmoid`.
    """
    return _smoothed(beta * (scores.chosen_mean - scores.rejected_mean) - gamma, label_smoothing)


def cpo(scores: PairScores, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 1.0) -> Tensor:
    """CPO: -log σ(β (log π(y+) - log π(y-))) + sft_weight · sft, no reference. Xu et al. 2024, arXiv 2401.08417."""
    return _smoothed(beta * (scores.chosen - scores.rejected), label_smoothing) + sft_weight * sft(scores)


def orpo(scores: PairScores, *, beta: float = 0.1) -> Tensor:
    """ORPO: sft - β log σ(o(y+) - o(y-)), no reference. Hong et al. 2024, arXiv 2403.07691 (β is its λ).

    o(y) = log(p / (1-p)), the log-odds of p = exp(log π(y)/|y|), the geometric mean of a token's probability.
    """
    return sft(scores) - beta * logsigmoid(_log_odds(scores.chosen_mean) - _log_odds(scores.rejected_mean))


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1-p)) of log p <= 0. A p that rounds to 1 is held one rounding below it: its odds stay finite."""
    surprise = (-mean).clamp(min=torch.finfo(mean.dtype).eps)
    return -(surprise + (-(-surprise).expm1()).log())


def sft(scores: PairScores) -> Tensor:
    """Negative log-likelihood of the chosen answer a token: -log π(y+)/|y+|. Needs no reference.

    The mean is taken in each pair, so a pair weighs the same here as in the preference term beside it, and the step's
    loss is a plain mean over pairs however it is split; Pang et al. 2024 (IRPO, arXiv 2404.19733) normalise alike. TRL
    divides by the tokens of all chosen answers in a micro-batch: the same for one pair, or for answers of one length.
    """
    chosen = scores.chosen if scores.undiscounted is None else scores.undiscounted
    return -chosen / scores.chosen_tokens


def safe_exp(x: Tensor) -> Tensor:
    """exp, going on along its tangent past STEEPEST: finite, rising, and with a gradient for any x of fp32's range."""
    return x.clamp(max=STEEPEST).exp() * (1 + (x - STEEPEST).relu())


def safe_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, exact near zero, going on along its tangent as `safe_exp` does."""
    low = x.clamp(max=STEEPEST)
    return low.expm1() + low.exp() * (x - STEEPEST).relu()
