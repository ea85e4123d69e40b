"""Losses on pairs of answers: pure functions on log-probabilities, one number a pair.

Each takes Scores and its own settings by name, and returns [P], not reduced: the trainer averages over all pairs of an
optimizer step, so no loss depends on how the step was split into micro-batches. Notation: π the policy, π_ref the
reference, y+ the chosen answer, y- the rejected one, h(y) = log π(y) - log π_ref(y) the log-ratio, Δ = h(y+) - h(y-), σ
the logistic function, |y| a number of tokens. `objective` checks settings and has the table of names. A loss must stay
finite, with finite gradients, for log-ratios of ±1e4 in fp32: hence log σ instead of log of σ, and exponentials that go
on along their tangent past e^30.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log, log1p
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

STEEPEST = 30.0  # exp goes on along its tangent past this: its square times 1e4 is still far below the largest fp32
Compared = Literal["ratio", "policy", "mean"]  # what β multiplies in an implicit reward: a property of Scores
DivergenceName = Literal["reverse-kl", "forward-kl", "jsd", "alpha"]
Divergence = Callable[[Tensor], Tensor]  # log-ratios -> f'(ratio), up to a constant
Term = tuple[float, Callable[..., Tensor], str | None]  # weight, loss, the name of the number it is given besides


def alike(what: str, **tensors: Tensor) -> None:
    """ValueError unless the tensors are floating-point and of one shape: [1] beside [8] is a slip, no wish."""
    if len({x.shape for x in tensors.values()}) > 1 or not all(x.is_floating_point() for x in tensors.values()):
        got = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{what} takes floating-point tensors of one shape, got {got}")


@dataclass(frozen=True)
class Scores:
    """P examples of A answers: pairs (A = 2: chosen, rejected), or answers that were judged one by one (A = 1).

    policy, reference: [A, P] fp32 or float64, the log-probability of each whole answer given its prompt under the
    policy, with its gradient, and under the reference, without one; zeros where no loss asks for a reference.
    tokens: [A, P] int64, how many each answer was scored on, at least 1. good: [A, P] bool, chosen or judged good.
    undiscounted: [P], policy of the first answers before `ld_alpha` discounted their tails, for SFT terms.
    Raises ValueError for other shapes or dtypes: nothing is broadcast."""

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    good: Tensor
    undiscounted: Tensor

    def __post_init__(self) -> None:
        alike("a loss", policy=self.policy, reference=self.reference)
        found = [(x.dtype, tuple(x.shape)) for x in (self.tokens, self.good)]
        if self.policy.ndim != 2 or found != [(kind, self.policy.shape) for kind in (torch.int64, torch.bool)]:
            rule = "a loss takes policy, reference, tokens (int64) [2, P], or [P] with good (bool) [P]"
            raise ValueError(f"{rule}, got policy {list(self.policy.shape)}, tokens and good {found}")

    @property
    def ratio(self) -> Tensor:
        """h(y), [A, P]."""
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """Log-probability a token."""
        return self.policy / self.tokens

    def rewards(self, compared: Compared, beta: float) -> Tensor:
        """Implicit rewards of the answers, [A, P], without gradient.
        β times the log-ratio; of losses without a reference, β times what they compare, as TRL reports them: the
        log-probability of the answer (CPO), or a token's mean of it (SimPO and ORPO)."""
        rewards: Tensor = beta * getattr(self, compared).detach()
        return rewards


def scores(policy: Tensor, reference: Tensor | None, tokens: Tensor, good: Tensor | None = None) -> Scores:
    """What the losses here take, from log-probabilities of whole answers, given their prompts.

    policy, reference: fp32 or float64 [2, P], chosen answers in the first row and rejected ones in the second; or [P]
    of answers that were judged one by one, with good: bool [P]. reference may be None for losses that need none; others
    are NaN then. tokens: int64 of policy's shape, how many each answer has. Raises ValueError for other shapes or
    dtypes. Gradients flow to policy."""
    reference = torch.full_like(policy, torch.nan) if reference is None else reference.detach()
    if good is not None:
        policy, reference, tokens, good = (tensor.unsqueeze(0) for tensor in (policy, reference, tokens, good))
    else:
        good = (torch.arange(2, device=policy.device) == 0).unsqueeze(1).expand(2, policy.shape[-1])
    return Scores(policy, reference, tokens, good, policy[0])


def scores_of(
    logps: Tensor,
    lengths: Tensor,
    reference: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    ld_alpha: float | None = None,
) -> Scores:
    """Scores from per-token log-probabilities of the policy and the reference, [A, P, L], zero past an answer's end.

    lengths: [A, P] int64. labels: [P] bool of judged answers; None of pairs, chosen first.
    ld_alpha: LD-DPO (Liu et al. 2024, arXiv 2409.06411) with α in [0, 1]: tokens of an answer past the length of its
    pair's shortest answer, l_p, count α times, Σ_{t <= l_p} log π(y_t) + α Σ_{t > l_p} log π(y_t); a long answer then
    wins less by being long. α = 1 discounts nothing."""
    counted = [logps, torch.zeros_like(logps) if reference is None else reference.detach()]
    if ld_alpha is not None:
        tail = torch.arange(logps.shape[-1], device=logps.device) >= lengths.amin(0).unsqueeze(-1)  # [P, L]
        counted = [torch.where(tail, ld_alpha * values, values) for values in counted]
    policy, base = (values.sum(-1) for values in counted)
    whole = scores(policy, base, lengths) if labels is None else scores(policy[0], base[0], lengths[0], labels)
    return whole if ld_alpha is None else replace(whole, undiscounted=logps[0].sum(-1))


def mixture(terms: Sequence[Term], scores: Scores, points: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of losses, [P], not reduced. points: the 0-d numbers that terms need, by name."""
    parts = [weight * loss(scores, *([] if point is None else [points[point]])) for weight, loss, point in terms]
    return torch.stack(parts).sum(0)


def rewards_seen(rewards: Tensor, good: Tensor) -> Tensor:
    """[2, 2] float64: the sum of the rewards of good answers and of bad ones, and below how many there are of each.
    rewards, good (bool): of one shape, else ValueError. Those of several batches add up."""
    alike("rewards_seen", rewards=rewards, good=good.to(rewards.dtype))
    sides = torch.stack([good, ~good]).to(torch.float64).flatten(1)
    return torch.stack([(sides * rewards.detach().to(torch.float64).flatten()).sum(1), sides.sum(1)])


def reward_shift(seen: Tensor) -> Tensor:
    """BCO's δ from `rewards_seen` of all steps so far: midway between the mean reward of good answers and of bad ones.
    0-d. A side without answers counts as 0, the reward that every answer starts with."""
    return (seen[0] / seen[1].clamp(min=1)).mean()


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
    """f-DPO (Wang et al. 2023, arXiv 2309.16240): h(y) becomes f'(π(y) / π_ref(y)) in losses that are made of Δ.
    name: "reverse-kl" (DPO itself), "forward-kl", "jsd" or "alpha", with alpha from 0 to 1; else ValueError."""
    if name not in DIVERGENCES or not 0 <= alpha <= 1:
        raise ValueError(f"divergence is one of {', '.join(DIVERGENCES)} with alpha from 0 to 1, got {name!r}, {alpha}")
    return partial(alpha_divergence, alpha=alpha) if name == "alpha" else DIVERGENCES[name]


DIVERGENCES: dict[str, Divergence] = {
    "reverse-kl": reverse_kl,
    "forward-kl": forward_kl,
    "jsd": jsd,
    "alpha": alpha_divergence,
}


def _delta(scores: Scores, divergence: Divergence) -> Tensor:
    chosen, rejected = divergence(scores.ratio)
    return chosen - rejected


def _mean_delta(scores: Scores, divergence: Divergence) -> Tensor:
    """Each answer's score divided by its own length, then the difference."""
    chosen, rejected = divergence(scores.ratio) / scores.tokens
    return chosen - rejected


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1-ε) log σ(x) - ε log σ(-x): cross-entropy with labels that are wrong with probability ε."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def sigmoid(
    scores: Scores, *, beta: float = 0.1, label_smoothing: float = 0.0, divergence: Divergence = reverse_kl
) -> Tensor:
    """DPO: -log σ(βΔ). Rafailov et al. 2023, arXiv 2305.18290. ln 2 where the policy still is the reference.
    label_smoothing ε: conservative DPO, -(1-ε) log σ(βΔ) - ε log σ(-βΔ), for labels that are wrong with probability ε
    (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO"; no arXiv number)."""
    return _smoothed(beta * _delta(scores, divergence), label_smoothing)


def robust(
    scores: Scores, *, beta: float = 0.1, label_smoothing: float = 0.1, divergence: Divergence = reverse_kl
) -> Tensor:
    """Robust DPO: (-(1-ε) log σ(βΔ) + ε log σ(-βΔ)) / (1-2ε). Chowdhury et al. 2024, arXiv 2403.00409.

    Unbiased for labels flipped with probability ε: its mean over flips is the loss on clean labels. Not bounded below.
    """
    logits = beta * _delta(scores, divergence)
    flipped = label_smoothing * logsigmoid(-logits) - (1 - label_smoothing) * logsigmoid(logits)
    return flipped / (1 - 2 * label_smoothing)


def sigmoid_norm(scores: Scores, *, beta: float = 5.0, divergence: Divergence = reverse_kl) -> Tensor:
    """Length-normalised DPO: -log σ(β (h(y+)/|y+| - h(y-)/|y-|)). Lambert et al. 2024 (Tülu 3), arXiv 2411.15124.
    Log-ratios a token are small, so β is large: the default is theirs."""
    return -logsigmoid(beta * _mean_delta(scores, divergence))


def ipo(scores: Scores, *, beta: float = 0.1, divergence: Divergence = reverse_kl) -> Tensor:
    """IPO: (h(y+)/|y+| - h(y-)/|y-| - 1/(2β))². Azar et al. 2023, arXiv 2310.12036, equation 17 (β is its τ).
    Log-ratios are means a token, as in the authors' experiments; with sums the target would depend on lengths."""
    return (_mean_delta(scores, divergence) - 0.5 / beta).square()


def hinge(scores: Scores, *, beta: float = 0.1, divergence: Divergence = reverse_kl) -> Tensor:
    """SLiC: max(0, 1 - βΔ). Zhao et al. 2023, arXiv 2305.10425; on log-ratios as RSO, Liu et al. 2023, 2309.06657."""
    return (1 - beta * _delta(scores, divergence)).relu()


def exo(
    scores: Scores, *, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence = reverse_kl
) -> Tensor:
    """EXO: KL((q, 1-q) || (1-ε, ε)) with q = σ(βΔ). Ji et al. 2024, arXiv 2402.00856, equation 16. Needs ε > 0."""
    logits = beta * _delta(scores, divergence)
    right = logits.sigmoid() * (logsigmoid(logits) - log1p(-label_smoothing))
    return right + (-logits).sigmoid() * (logsigmoid(-logits) - log(label_smoothing))


def discopop(scores: Scores, *, beta: float = 0.1, tau: float = 0.05, divergence: Divergence = reverse_kl) -> Tensor:
    """DiscoPOP: -(1-m) log σ(x) + m e^(-x), x = βΔ, m = σ(x/τ). Lu et al. 2024, arXiv 2406.08414, equation 5.
    m e^(-x) is taken as one exponential: for x far below zero m vanishes faster than e^(-x) grows (τ < 1)."""
    logits = beta * _delta(scores, divergence)
    mix = logits / tau
    return safe_exp(logsigmoid(mix) - logits) - (-mix).sigmoid() * logsigmoid(logits)


def bco(scores: Scores, shift: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO: -log σ(βh(y+) - δ) - log σ(-(βh(y-) - δ)). Jung et al. 2024, arXiv 2404.04656.
    shift: δ, 0-d, the mean of all rewards βh up to this optimizer step (`reward_shift`)."""
    chosen, rejected = beta * scores.ratio
    return -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)


def sppo_hard(scores: Scores, *, beta: float = 1e-3) -> Tensor:
    """SPPO with a win probability of 1: (h(y+) - 1/(2β))² + (h(y-) + 1/(2β))². Wu et al. 2024, arXiv 2405.00675.
    β is 1/η of the paper, whose η is 1000."""
    chosen, rejected = scores.ratio
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def nca(scores: Scores, *, beta: float = 0.1) -> Tensor:
    """NCA on pairs: -log σ(r+) - ½ log σ(-r+) - ½ log σ(-r-), r = βh. Chen et al. 2024, arXiv 2402.05369."""
    chosen, rejected = beta * scores.ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(scores: Scores, *, beta: float = 0.1) -> Tensor:
    """APO-zero: σ(-βh(y+)) + σ(βh(y-)). D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.
    For chosen answers that are better than what the model writes: they become likelier, rejected ones less likely."""
    chosen, rejected = beta * scores.ratio
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(scores: Scores, *, beta: float = 0.1) -> Tensor:
    """APO-down: σ(βh(y+)) + σ(-βΔ). D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.
    For chosen answers that are worse than what the model writes: both become less likely, rejected ones more so."""
    return (beta * scores.ratio[0]).sigmoid() + (-beta * _delta(scores, reverse_kl)).sigmoid()


def simpo(scores: Scores, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: -log σ(β log π(y+)/|y+| - β log π(y-)/|y-| - γ), no reference. Meng et al. 2024, arXiv 2405.14734.
    gamma: the margin of rewards aimed at, γ itself (not γ/β). label_smoothing as in `sigmoid`."""
    chosen, rejected = scores.mean
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(scores: Scores, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 1.0) -> Tensor:
    """CPO: -log σ(β (log π(y+) - log π(y-))) + sft_weight · sft, no reference. Xu et al. 2024, arXiv 2401.08417."""
    chosen, rejected = scores.policy
    return _smoothed(beta * (chosen - rejected), label_smoothing) + sft_weight * sft(scores)


def orpo(scores: Scores, *, beta: float = 0.1) -> Tensor:
    """ORPO: sft - β log σ(o(y+) - o(y-)), no reference. Hong et al. 2024, arXiv 2403.07691 (β is its λ).
    o(y) = log(p / (1-p)), the log-odds of p = exp(log π(y)/|y|), the geometric mean of a token's probability."""
    chosen, rejected = _log_odds(scores.mean)
    return sft(scores) - beta * logsigmoid(chosen - rejected)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1-p)) of log p <= 0. A p that rounds to 1 is held one rounding below it: its odds stay finite."""
    surprise = (-mean).clamp(min=torch.finfo(mean.dtype).eps)
    return -(surprise + (-(-surprise).expm1()).log())


def sft(scores: Scores) -> Tensor:
    """Negative log-likelihood of the chosen answer a token: -log π(y+)/|y+|. Needs no reference.

    The mean is taken in each pair, so a pair weighs the same here as in the preference term beside it, and the step's
    loss is a plain mean over pairs however it is split; Pang et al. 2024 (IRPO, arXiv 2404.19733) normalise alike. TRL
    divides by the tokens of all chosen answers in a micro-batch: the same for one pair, or for answers of one length.
    """
    return -scores.undiscounted / scores.tokens[0]


def reward_loss(chosen: Tensor, rejected: Tensor, *, center: float = 0.0) -> Tensor:
    """-log σ(r+ - r-) + center (r+ + r-)², for rewards [P] of preferred and other answers. Returns [P], not reduced.
    The first term is the negative log-likelihood of Bradley and Terry's model (1952) as Ouyang et al. 2022 (arXiv
    2203.02155, equation 1) use it. It sees differences only; the second (Eisenstein et al. 2023, arXiv 2312.09244,
    equation 2) holds rewards around zero, so that those of different prompts compare better. ValueError unless both are
    floating-point and of one shape."""
    alike("reward_loss", chosen=chosen, rejected=rejected)
    losses = -logsigmoid(chosen - rejected)
    return losses + center * (chosen + rejected).square() if center else losses


def safe_exp(x: Tensor) -> Tensor:
    """exp, going on along its tangent past STEEPEST: finite, rising, and with a gradient for any x of fp32's range."""
    return x.clamp(max=STEEPEST).exp() * (1 + (x - STEEPEST).relu())


def safe_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, exact near zero, going on along its tangent as `safe_exp` does."""
    low = x.clamp(max=STEEPEST)
    return low.expm1() + low.exp() * (x - STEEPEST).relu()
