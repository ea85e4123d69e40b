"""How far a student's distribution over tokens is from a teacher's, row by row from hidden states, for distillation.

What each kind is, and what temperature and top_k do, says `losses.token_divergence`. GKD too does not multiply by the
square of the temperature, which Hinton et al. do to keep gradients as large as at 1.

One chunk of both logits exists at a time; see `chunked_head` for how gradients are made.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .chunked_head import blocks
from .dispatch import widened

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


def divergence(student: Tensor, teacher: Tensor, wanted: Divergence) -> Tensor:
    """The divergence of each row, [N], of full logits [N, V]; differentiable to any order."""
    if wanted.top_k is not None:
        teacher, places = teacher.topk(wanted.top_k, dim=1, sorted=False)
        student = student.gather(1, places)
    log_q, log_p = (_log_softmax(widened(logits) / wanted.temperature) for logits in (student, teacher))
    if wanted.kind == "forward-kl":
        return _kl(log_p, log_q)
    if wanted.kind == "reverse-kl":
        return _kl(log_q, log_p)
    mixture = wanted.beta * log_p.exp() + (1 - wanted.beta) * log_q.exp()
    log_m = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
    return wanted.beta * _kl(log_p, log_m) + (1 - wanted.beta) * _kl(log_q, log_m)


def _log_softmax(logits: Tensor) -> Tensor:
    """By steps: torch.log_softmax on a CPU adds up 150,000 exponentials to 6e-6."""
    z = logits - logits.detach().amax(1, keepdim=True)
    return z - z.exp().sum(1, keepdim=True).log()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(1)  # inf - inf where both ban a token


class DivergenceScorer:
    """The divergence for chunks of the student's logits. `teacher` gives its logits [n, V] for the same rows."""

    def __init__(self, teacher: Callable[[slice], Tensor], wanted: Divergence) -> None:
        self.teacher, self.wanted = teacher, wanted

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, ...]:
        teacher = self._teacher(logits, rows)
        values = teacher.new_empty(len(logits))
        for block in blocks(logits):
            student = widened(logits[block]).detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                value = divergence(student, teacher[block], self.wanted)
            values[block] = value.detach()
            if gradient:
                logits[block] = torch.autograd.grad(value, student, torch.ones_like(value))[0]
        return (values,)

    def plain(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (divergence(logits, self._teacher(logits, slice(None)), self.wanted),)

    def _teacher(self, logits: Tensor, rows: slice) -> Tensor:
        teacher = self.teacher(rows).detach().to(widened(logits[:0]).dtype)
        if teacher.shape != logits.shape:
            raise ValueError(f"teacher logits must be {tuple(logits.shape)}, the student's, got {tuple(teacher.shape)}")
        return teacher
