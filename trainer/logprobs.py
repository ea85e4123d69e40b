"""Log-probabilities of trained tokens for any output head: dense, 4-bit, with a bias or carrying an adapter."""

from torch import Tensor, nn

from ..kernels.chunked_head import Scorer, dense_figures, module_figures, rows_per_chunk
from ..kernels.linear_logprobs import TokenScorer, TokenScores
from ..lora.linear import LoRALinear
from ..lora.linear4bit import NF4Linear


def token_scores(head: nn.Module, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Log-probability of each row's target, with the row's entropy and whether the target is the likeliest token.

    head: the output head, [N, D] -> [N, V]. hidden: [N, D], trained positions only. targets: [N] int64 in 0..V-1.
    The loss of SFT is -logps. Gradients flow from logps to hidden and to what is trained in the head. A head without
    trained parameters runs once, a trained one again in backward; one chunk of logits is alive at a time.
    Raises ValueError when the shapes do not fit together, and for targets out of range on a CPU (on CUDA a device-side
    assertion: `kernels.linear_logprobs.check_targets` before they are sent).
    """
    vocabulary = vocabulary_of(head)
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_scores needs hidden [N, D] and targets [N], got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    rows = rows_per_chunk(vocabulary, hidden.device)
    return TokenScores(*head_figures(head, hidden, TokenScorer(targets, vocabulary), rows))


def head_figures(head: nn.Module, hidden: Tensor, scorer: Scorer, rows: int) -> tuple[Tensor, ...]:
    """The scorer's figures for the head's logits, `rows` of them at a time, by the shortest way for this head."""
    plain = type(head) in (nn.Linear, NF4Linear, LoRALinear) and not (head._forward_hooks or head._forward_pre_hooks)
    if plain and type(head) is nn.Linear and head.bias is None:
        return dense_figures(hidden, head.weight, scorer, rows)
    return module_figures(hidden, head, scorer, rows, in_place=plain)


def vocabulary_of(head: nn.Module) -> int:
    """How many tokens the head scores."""
    size = head.out_features
    assert isinstance(size, int)
    return size
