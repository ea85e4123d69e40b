"""Token losses from hidden states: the output head runs on trained positions only, and in chunks."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.linear_cross_entropy import linear_cross_entropy, rows_per_chunk, upcast


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row, not reduced.

    head: the output head, [N, D] -> [N, V]. hidden: [N, D], trained positions only. targets: [N] int64.
    Returns [N], fp32 or float64. A plain nn.Linear without bias takes the fused op; any other head (4-bit, with an
    adapter or a bias) runs chunk by chunk and again in backward, so its logits are never all there either.
    """
    if type(head) is nn.Linear and head.bias is None:
        return linear_cross_entropy(hidden, head.weight, targets)
    rows = rows_per_chunk(_vocabulary(head), hidden.device)
    parts = [
        checkpoint(_head_losses, head, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _head_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(upcast(head(hidden)), targets, reduction="none")


def _vocabulary(head: nn.Module) -> int:
    size = head.out_features
    assert isinstance(size, int)
    return size
