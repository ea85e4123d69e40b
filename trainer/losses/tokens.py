"""What a model makes of trained tokens, for any output head (dense, 4-bit, with a bias or an adapter) and any layout.

The head runs on trained positions only, in chunks of logits. SFT's loss is -logps of `batch_token_scores`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batch import Batch
from ...kernels.chunked_head import (
    Scorer,
    TokenScorer,
    TokenScores,
    check_targets,
    dense_figures,
    module_figures,
    rows_per_chunk,
)
from ...kernels.dispatch import bucketed, widened
from ...kernels.linear_divergence import Divergence, DivergenceScorer, Kind
from ...lora.adapter import is_hooked
from ...lora.layer import AdapterLayer
from ...lora.linear4bit import NF4Linear
from ...models.protocol import CausalLM
from .pairs import alike

NEVER_SURE = 1e-12  # a probability of 1 - 1e-12 is the largest that `token_kl` works with: log(1 - p) stays finite


def token_scores(head: nn.Module | Tensor, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Log-probability of each row's target, with the row's entropy and whether the target is the likeliest token.

    head: any module [N, D] -> [N, V], 4-bit or with an adapter too, or the weight [V, D] of one without a bias. hidden:
    [N, D], trained positions only. targets: [N] int64 in 0..V-1. Gradients flow from logps to hidden and to what is
    trained in the head. A head without trained parameters runs once, a trained one again in backward; one chunk of
    logits is alive at a time.
    Raises ValueError when the shapes do not fit together, and for targets out of range on a CPU (on CUDA a device-side
    assertion: `kernels.chunked_head.check_targets` before they are sent)."""
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_scores needs hidden [N, D] and targets [N], got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    vocabulary = vocabulary_of(head, hidden)
    rows, n = rows_per_chunk(vocabulary, hidden.device), hidden.shape[0]
    if more := bucketed(n, hidden) - n:
        hidden, targets = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
    made = head_scores(head, hidden, TokenScorer(targets, vocabulary), rows)
    return TokenScores(*(figure[:n] for figure in made) if more else made)


def token_entropy(head: nn.Module | Tensor, hidden: Tensor) -> Tensor:
    """The entropy of each row's distribution in nats, [N], as `token_scores` has it, with its gradient: log V less how
    far it is from the even one."""
    vocabulary, zero = vocabulary_of(head, hidden), hidden.new_zeros((), dtype=widened(hidden[:0]).dtype)
    scorer = DivergenceScorer(lambda rows: zero.expand(len(hidden[rows]), vocabulary), Divergence("reverse-kl"))
    return math.log(vocabulary) - head_scores(head, hidden, scorer, rows_per_chunk(vocabulary, hidden.device))[0]


def token_divergence(
    head: nn.Module | Tensor,
    hidden: Tensor,
    teacher_head: nn.Module | Tensor,
    teacher_hidden: Tensor,
    kind: Kind = "forward-kl",
    temperature: float = 1.0,
    top_k: int | None = None,
    beta: float = 0.5,
) -> Tensor:
    """How far the student's distribution q is from the teacher's p, of each row: [N], in nats, fp32 or float64.

    kind: "forward-kl" KL(p || q) (Hinton et al. 2015), "reverse-kl" KL(q || p) (MiniLLM, arXiv 2306.08543), or "jsd",
    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1).
    temperature: both sides' logits are divided by it; the value is not multiplied by its square. top_k: the teacher's
    k likeliest tokens only, p and q renormalised over them; None: all.
    head, teacher_head: as in `token_scores`, of one vocabulary; they may be the same. hidden: [N, D] of the student,
    trained positions only; teacher_hidden: [N, E] at the same positions. Both heads are run in the mode they are in,
    the teacher's without gradient. Gradients flow to hidden and to what is trained in the student's head. One chunk of
    both logits is alive at a time. Raises ValueError when shapes or vocabularies do not fit or a setting is out of
    range."""
    if hidden.ndim != 2 or teacher_hidden.ndim != 2 or len(hidden) != len(teacher_hidden):
        raise ValueError(
            "token_divergence needs hidden [N, D] and teacher_hidden [N, E], "
            f"got {tuple(hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    vocabulary, theirs = vocabulary_of(head, hidden), vocabulary_of(teacher_head, teacher_hidden)
    if vocabulary != theirs:
        raise ValueError(
            f"student and teacher must share one vocabulary, got {vocabulary} and {theirs} tokens; distil between "
            "models of one tokenizer"
        )
    wanted = Divergence(kind, temperature, top_k, beta)
    wanted.check(vocabulary)

    n = hidden.shape[0]
    if more := bucketed(n, hidden) - n:
        hidden, teacher_hidden = F.pad(hidden, (0, 0, 0, more)), F.pad(teacher_hidden, (0, 0, 0, more))
    scorer = DivergenceScorer(lambda rows: logits_of(teacher_head, teacher_hidden[rows]), wanted)
    (values,) = head_scores(head, hidden, scorer, rows_per_chunk(2 * vocabulary, hidden.device))
    return values[:n]


def head_scores(head: nn.Module | Tensor, hidden: Tensor, scorer: Scorer, rows: int) -> tuple[Tensor, ...]:
    """What the scorer makes of the head's logits, `rows` of them at a time, by the shortest way for this head."""
    if isinstance(head, Tensor):
        return dense_figures(hidden, head, scorer, rows)
    plain = type(head) in (nn.Linear, NF4Linear, AdapterLayer) and not any(map(is_hooked, head.modules()))
    if plain and type(head) is nn.Linear and head.bias is None:
        return dense_figures(hidden, head.weight, scorer, rows)
    return module_figures(hidden, head, scorer, rows, in_place=plain)


def logits_of(head: nn.Module | Tensor, hidden: Tensor) -> Tensor:
    """[N, V] of hidden states [N, D]."""
    logits: Tensor = hidden @ head.T if isinstance(head, Tensor) else head(hidden)
    return logits


def vocabulary_of(head: nn.Module | Tensor, hidden: Tensor) -> int:
    """How many tokens the head scores; one that does not say so is asked with a row of zeros."""
    if isinstance(head, Tensor):
        return len(head)
    if isinstance(size := getattr(head, "out_features", None), int):
        return size
    with torch.no_grad():
        return head(hidden.new_zeros(1, hidden.shape[1])).shape[1]


def batch_token_scores(model: CausalLM, batch: Batch) -> TokenScores:
    """Log-probability, entropy and correctness of each prediction of a batch that is on the CPU, [batch.trained] each.
    Raises ValueError for a target outside the model's vocabulary."""
    return _scores_there(model, on_device(model, batch))


def _scores_there(model: CausalLM, here: Batch, temperature: float = 1.0, spread: bool = False) -> TokenScores:
    head = model.head() if temperature == 1 else Tempered(model.head(), temperature)
    hidden = hidden_rows(model, here, here.rows)
    scores = token_scores(head, hidden, here.targets)
    return scores._replace(entropy=token_entropy(head, hidden)) if spread else scores


def on_device(model: CausalLM, batch: Batch) -> Batch:
    """The batch where the model is; its targets are checked on the CPU, so the device is never waited for."""
    check_targets(batch.targets, model.vocab_size)
    return batch.to(next(model.parameters()).device)


def hidden_rows(model: CausalLM, here: Batch, rows: Tensor) -> Tensor:
    """Hidden states [N, D] at these flattened places of a batch that is on the model's device."""
    hidden = model.hidden(here.input_ids, here.position_ids, here.spans)  # [B, T, D]
    return hidden.flatten(0, 1).index_select(0, rows)


class Answers(NamedTuple):
    """What a model makes of the A answers to each of P prompts; L is the longest answer's number of tokens."""

    logps: Tensor  # [A, P, L] fp32 or float64: log-probability of each token, zero past an answer's end
    lengths: Tensor  # [A, P] int64
    entropy: Tensor  # [A, P, L] nats, of the distribution that predicts each token; no gradient
    correct: Tensor  # [A, P, L] bool: the token was the likeliest

    @property
    def there(self) -> Tensor:
        """[A, P, L] bool: False past an answer's end."""
        return torch.arange(self.logps.shape[-1], device=self.logps.device) < self.lengths.unsqueeze(-1)


class Tempered(nn.Module):
    """A head whose logits are divided by a temperature."""

    def __init__(self, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.head, self.temperature = head, temperature

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden) / self.temperature
        return logits


def answer_scores(model: CausalLM, batch: Batch, temperature: float = 1.0, spread: bool = False) -> Answers:
    """One forward pass over a batch that is still on the CPU; the head runs on predicted tokens only.
    A token that both answers of a pair begin with is predicted once and counts in both. Logits are divided by the
    temperature. spread: entropies carry a gradient, for a second pass of the head."""
    here = on_device(model, batch)
    assert here.slots is not None and here.lengths is not None  # its answers are rated
    logps, entropy, correct = (
        by_answer(values, here.slots) for values in _scores_there(model, here, temperature, spread)
    )
    return Answers(logps, here.lengths, entropy, correct)


def by_answer(values: Tensor, slots: Tensor) -> Tensor:
    """[R] predictions as [A, P, L]; slots of what is not there point past the end, at a zero."""
    return torch.cat([values, values.new_zeros(1)]).index_select(0, slots.flatten()).view(slots.shape)


def token_kl(logps: Tensor, reference: Tensor) -> Tensor:
    """How far the policy has moved at each token of an answer: a lower bound of KL(policy || reference), in nats.
    It is the divergence of "this token or another one", p log(p/q) + (1-p) log((1-p)/(1-q)), which is at most that of
    the whole distributions and equal to it over two tokens. It needs no samples of the policy, which the answers of
    preference data are not; the usual estimates from samples (k1, k3) are negative or without bound there. Any shape,
    returns the same, fp32 or float64, never negative; no gradient."""
    alike("token_kl", logps=logps, reference=reference)
    p, q = (x.detach().double().clamp(max=-NEVER_SURE) for x in (logps, reference))
    not_p, not_q = ((-x.expm1()).log() for x in (p, q))
    return (p.exp() * (p - q) + not_p.exp() * (not_p - not_q)).clamp(min=0).to(logps.dtype)


def summed(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """A metric's part: [2], the sum of `values` (where `mask` is true) and how many they are; float64, no graph."""
    values = values.detach().to(torch.float64)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum(dtype=torch.float64)])
