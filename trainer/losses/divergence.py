"""Divergence between a teacher's and the student's next-token distributions for output heads of any kind."""

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.chunked_head import rows_per_chunk
from ...kernels.dispatch import bucketed
from ...kernels.linear_divergence import Divergence, DivergenceScorer, Kind
from .tokens import head_scores, logits_of, vocabulary_of


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
