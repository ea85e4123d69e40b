"""Output head and cross-entropy in one op, in chunks of rows, so that full logits never exist.

For T tokens and a vocabulary of V the usual route holds T x V logits and as many gradients, in fp32: 6 GB for 8,192
tokens of a 100k vocabulary. Here only one chunk of rows is alive at a time. With a frozen head, as with adapters, the
gradient of the hidden states is written while the chunk's logits are still there: two matmuls per chunk instead of
the three of recomputing in backward, which is what happens when the head is trained too.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of one chunk's logits in fp32, on a CPU
CHUNK_BYTES_GPU = 512 * 2**20  # a thousand rows at 128k tokens of vocabulary: fewer do not fill a GPU's products


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, through full logits: -log softmax(hidden weight^T)[target] for each row."""
    logits = upcast(hidden @ weight.T)
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None]).squeeze(1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """Cross-entropy of each row without full logits.

    hidden: [N, D]. weight: [V, D], same dtype. targets: [N] int64 in 0..V-1.
    Returns the losses [N], not reduced, in fp32 (float64 for float64 inputs). Gradients flow to hidden and weight.
    Memory: one chunk of logits (`chunk_rows` rows; by default as many as 64 MiB hold), and one [N, D] gradient when
    only hidden is trained.
    Raises ValueError when the shapes do not fit together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "linear_cross_entropy needs hidden [N, D], weight [V, D] and targets [N], "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    losses: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, targets, chunk_rows or rows_per_chunk(len(weight), weight.device)
    )
    return losses


def upcast(logits: Tensor) -> Tensor:
    """fp32 at least: an exponential of 16-bit logits is no softmax."""
    return logits if logits.dtype == torch.float64 else logits.float()


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Rows of logits that one chunk holds by default, at least one."""
    return max(1, (CHUNK_BYTES_GPU if device.type == "cuda" else CHUNK_BYTES) // (4 * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        hidden_only = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        losses = hidden.new_empty(len(hidden), dtype=upcast(hidden.new_empty(0)).dtype)
        dhidden = torch.empty_like(hidden) if hidden_only else None
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            logits = upcast(hidden[part] @ weight.T)  # [rows, V]
            target = targets[part, None]
            log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
            losses[part] = (log_sum - logits.gather(1, target)).squeeze(1)
            if dhidden is not None:
                dhidden[part] = _dlogits(logits, log_sum, target).to(weight.dtype) @ weight
        if hidden_only:
            ctx.save_for_backward(dhidden)
        else:
            ctx.save_for_backward(hidden, weight, targets)
        ctx.hidden_only, ctx.rows = hidden_only, rows
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.hidden_only:
            (dhidden,) = ctx.saved_tensors
            return dhidden * dlosses[:, None].to(dhidden.dtype), None, None, None
        hidden, weight, targets = ctx.saved_tensors
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight)
        for i in range(0, len(hidden), ctx.rows):
            part = slice(i, i + ctx.rows)
            logits = upcast(hidden[part] @ weight.T)
            log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
            dlogits = _dlogits(logits, log_sum, targets[part, None]).mul_(dlosses[part, None]).to(weight.dtype)
            dweight.addmm_(dlogits.T, hidden[part])
            if dhidden is not None:
                dhidden[part] = dlogits @ weight
        return dhidden, dweight, None, None


def _dlogits(logits: Tensor, log_sum: Tensor, target: Tensor) -> Tensor:
    """softmax(logits) - one_hot(target), written over the logits."""
    probabilities = logits.sub_(log_sum).exp_()
    return probabilities.scatter_add_(1, target, probabilities.new_full((), -1.0).expand(target.shape))
