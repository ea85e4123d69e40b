"""How far a student's distribution over tokens is from a teacher's, row by row from hidden states, for distillation.

With p the teacher's distribution and q the student's, both softmax(logits / temperature):

    forward-kl   KL(p || q) = sum p log(p / q)       covers all that the teacher says (Hinton et al. 2015)
    reverse-kl   KL(q || p) = sum q log(q / p)       keeps to what the teacher finds likely (Gu et al. 2023, MiniLLM)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
                 generalised Jensen-Shannon divergence (Agarwal et al. 2023, "GKD", equation 1)

The value is in nats and not multiplied by temperature^2, as Hinton et al. do to keep gradients as large as at
temperature 1, and GKD does not. With top_k only the teacher's k likeliest tokens count, and both p and q are
renormalised over them, so it stays a divergence: never negative, and 0 only where both agree on these tokens'
proportions. What the student gives to all other tokens is then free.

One chunk of both logits exists at a time; see `chunked_head` for how gradients are made.
"""

from collections.abc import Callable
from math import log, log1p
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .chunked_head import blocks, upcast

Kind = Literal["forward-kl", "reverse-kl", "jsd"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Divergence(NamedTuple):
    """Which divergence; `check` raises ValueError for settings that make none."""

    kind: Kind
    temperature: float = 1.0
    top_k: int | None = None
    beta: float = 0.5  # of jsd

    def check(self, vocabulary: int) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.top_k is not None and not 1 <= self.top_k <= vocabulary:
            raise ValueError(f"top_k must be in 1..{vocabulary}, the vocabulary, or None for all, got {self.top_k}")
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(
                f"beta of jsd must lie between 0 and 1, got {self.beta}; its ends are forward-kl (0) and reverse-kl (1)"
            )


def divergence_reference(student: Tensor, teacher: Tensor, wanted: Divergence) -> Tensor:
    """The definition, [N] of full logits [N, V]. Tests hold DivergenceScorer to it."""
    if wanted.top_k is not None:
        teacher, places = teacher.topk(wanted.top_k, dim=1)
        student = student.gather(1, places)
    log_q, log_p = (torch.log_softmax(upcast(logits) / wanted.temperature, dim=1) for logits in (student, teacher))
    if wanted.kind == "forward-kl":
        return _kl(log_p, log_q)
    if wanted.kind == "reverse-kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + log(wanted.beta), log_q + log1p(-wanted.beta))
    return wanted.beta * _kl(log_p, log_m) + (1 - wanted.beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


class DivergenceScorer:
    """The divergence for chunks of the student's logits. `teacher` gives its logits [n, V] for the same rows."""

    def __init__(self, teacher: Callable[[slice], Tensor], wanted: Divergence) -> None:
        self.teacher, self.wanted = teacher, wanted

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, ...]:
        teacher = self.teacher(rows)
        values = logits.new_empty(len(logits))
        for block in blocks(logits):
            values[block] = self._block(logits[block], teacher[block].to(logits.dtype), gradient)
        return (values,)

    def _block(self, student: Tensor, teacher: Tensor, gradient: bool) -> Tensor:
        wanted, chosen, places = self.wanted, student, None
        if wanted.top_k is not None:
            teacher, places = teacher.topk(wanted.top_k, dim=1, sorted=False)
            chosen = student.gather(1, places)
        value, dlogits = _divergence(
            *_softmax(teacher, wanted.temperature), *_softmax(chosen, wanted.temperature), wanted
        )
        if gradient:
            dlogits /= wanted.temperature
            if places is None:
                student.copy_(dlogits)
            else:
                student.zero_().scatter_(1, places, dlogits)
        return value.squeeze(1)


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and p. By steps: torch.log_softmax on a CPU adds up 150,000 exponentials to 6e-6."""
    z = logits / temperature
    p = z.sub_(z.amax(1, keepdim=True)).exp()
    total = p.sum(1, keepdim=True)
    return z.sub_(total.log()), p.div_(total)


def _divergence(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, wanted: Divergence) -> tuple[Tensor, Tensor]:
    """The value [n, 1] and its gradient [n, V] with respect to what q is the softmax of."""
    if wanted.kind == "forward-kl":
        return _mean(p, log_p - log_q), q - p
    if wanted.kind == "reverse-kl":
        over = log_q - log_p
        value = _mean(q, over)
        return value, _weighted(q, over - value)
    beta = wanted.beta
    log_m = torch.logaddexp(log_p + log(beta), log_q + log1p(-beta))
    over = log_q - log_m
    of_student = _mean(q, over)
    value = beta * _mean(p, log_p - log_m) + (1 - beta) * of_student
    return value, _weighted(q, over - of_student).mul_(1 - beta)


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0: tokens that both sides ban have x = inf - inf."""
    return torch.where(p > 0, p * x, 0)


def _mean(p: Tensor, x: Tensor) -> Tensor:
    return _weighted(p, x).sum(1, keepdim=True)
