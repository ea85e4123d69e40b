"""Divergence between a teacher's and the student's next-token distributions for output heads of any kind."""

from torch import Tensor, nn

from ...kernels.chunked_head import rows_per_chunk
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
    """The divergence of each row, [N], nats; what `kind` and the settings mean says `kernels.linear_divergence`.

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

    scorer = DivergenceScorer(lambda rows: logits_of(teacher_head, teacher_hidden[rows]), wanted)
    (values,) = head_scores(head, hidden, scorer, rows_per_chunk(2 * vocabulary, hidden.device))
    return values
