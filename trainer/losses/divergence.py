"""Divergence between a teacher's and the student's next-token distributions for output heads of any kind."""

import torch
from torch import Tensor, nn

from ...kernels.chunked_head import rows_per_chunk
from ...kernels.linear_divergence import Divergence, DivergenceScorer
from .tokens import head_scores, vocabulary_of


def token_divergence(
    head: nn.Module,
    hidden: Tensor,
    teacher_head: nn.Module,
    teacher_hidden: Tensor,
    wanted: Divergence,
) -> Tensor:
    """The divergence of each row, [N], nats: `kernels.linear_divergence` for heads that are modules, of one vocabulary.
    hidden: [N, D] of the student, trained positions only; teacher_hidden: [N, E] at the same positions. Both heads are
    run in the mode they are in, the teacher's without gradient; they may be the same module. Gradients flow to hidden
    and to what is trained in the student's head. One chunk of both logits is alive at a time. Raises ValueError when
    rows or vocabularies differ or a setting is out of range."""
    vocabulary, theirs = vocabulary_of(head), vocabulary_of(teacher_head)
    if vocabulary != theirs:
        raise ValueError(
            f"student and teacher must share one vocabulary, got {vocabulary} and {theirs} tokens; distil between "
            "models of one tokenizer"
        )
    if hidden.ndim != 2 or teacher_hidden.ndim != 2 or len(hidden) != len(teacher_hidden):
        raise ValueError(
            "token_divergence needs hidden [N, D] and teacher_hidden [N, E], "
            f"got {tuple(hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    wanted.check(vocabulary)

    def teacher_logits(rows: slice) -> Tensor:
        with torch.no_grad():
            logits: Tensor = teacher_head(teacher_hidden[rows])
            return logits

    scorer = DivergenceScorer(teacher_logits, wanted)
    (values,) = head_scores(head, hidden, scorer, rows_per_chunk(2 * vocabulary, hidden.device))
    return values
