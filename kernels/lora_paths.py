"""Base + LoRA for linears that share an input, in plain PyTorch: the definition, and the quick form for CPUs.

The quick form also serves dtypes on CUDA that have no kernel (fp32 and fp64).
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .dequantize4bit import dequantize
from .dropout import dropout, keep_mask, keep_scale
from .linear4bit import compute_dtype, slabs
from .weight4bit import Weight4bit

PAD = 64


class Group(NamedTuple):
    """What the linears of one input x [M, K] hold; the lists have one entry for each."""

    weights: list[Weight4bit]  # [out, K]
    biases: list[Tensor]  # [out]; or no entry at all
    A: list[Tensor]  # [rank, K]
    B: list[Tensor]  # [out, rank]
    scales: list[float]
    dropout: float
    seed: Tensor | None  # of dropout, where there is one

    @property
    def columns(self) -> list[slice]:
        """Where each linear's part lies in s = x A^T [M, sum of ranks]."""
        ends = list(accumulate(len(A) for A in self.A))
        return [slice(end - len(A), end) for A, end in zip(self.A, ends, strict=True)]

    def stacked(self, dtype: torch.dtype) -> Tensor:
        """All of A, one below the other, [sum of ranks, K]."""
        return (self.A[0] if len(self.A) == 1 else torch.cat(self.A)).to(dtype)

    @property
    def keep_scale(self) -> float:
        """What dropout multiplies survivors by."""
        return keep_scale(self.dropout) if self.seed is not None else 1.0


class Result(NamedTuple):
    """What a forward pass makes."""

    outputs: list[Tensor]  # [M, out] in x's dtype
    s: Tensor  # [M, sum of ranks]
    dense: list[Tensor]  # the decoded weights, if they are to be kept


class Gradients(NamedTuple):
    """What a backward pass makes."""

    A: Tensor  # [sum of ranks, K], all of them
    B: list[Tensor]  # [out, rank], in the dtype of the masters
    x: Tensor | None  # [M, K], if wanted


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the reference: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def group_dtype(x: Tensor, weights: list[Weight4bit]) -> torch.dtype:
    """The dtype of the quick form's products: the widest of what the base linears alone would take."""
    dtypes = {compute_dtype(x, weight) for weight in weights}
    return torch.float32 if len(dtypes) > 1 else dtypes.pop()


def padded(rank: int) -> int:
    """How many columns the tail of an augmented matrix has (lora_cuda.py): rows stay aligned to 64 elements."""
    return -(-rank // PAD) * PAD


def forward_reference(x: Tensor, group: Group, keep: bool) -> Result:
    """y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T: everything wide, rounded to x's dtype once."""
    h = x.to(wide(x))
    dropped = dropout(h, group.dropout, group.seed) if group.seed is not None else h
    s = dropped @ group.stacked(h.dtype).T
    dense = [dequantize(weight, h.dtype) for weight in group.weights]
    outputs = [h @ W.T for W in dense]
    for y, bias in zip(outputs, group.biases, strict=False):
        y += bias
    for y, B, scale, part in zip(outputs, group.B, group.scales, group.columns, strict=True):
        y += scale * (s[:, part] @ B.to(h.dtype).T)
    return Result([y.to(x.dtype) for y in outputs], s, dense if keep else [])


def backward_reference(
    grads: list[Tensor], x: Tensor, s: Tensor, group: Group, dense: list[Tensor], need_x: bool
) -> Gradients:
    """The gradients of forward_reference's sum of products with `grads`, written out."""
    h, A = x.to(s.dtype), group.stacked(s.dtype)
    wide_grads = [g.to(s.dtype) for g in grads]
    each = list(zip(wide_grads, group.B, group.scales, group.columns, strict=True))
    grad_B = [(scale * g.T @ s[:, part]).to(B.dtype) for g, B, scale, part in each]
    grad_s = torch.cat([scale * g @ B.to(s.dtype) for g, B, scale, _ in each], dim=1)
    dropped = (lambda t: dropout(t, group.dropout, group.seed)) if group.seed is not None else (lambda t: t)
    grad_A = grad_s.T @ dropped(h)
    if not need_x:
        return Gradients(grad_A, grad_B, None)
    grad_x = dropped(grad_s @ A)  # dropout is linear, and its own transposed
    for g, W in zip(wide_grads, dense or [dequantize(weight, s.dtype) for weight in group.weights], strict=True):
        grad_x += g @ W
    return Gradients(grad_A, grad_B, grad_x.to(x.dtype))


def forward_cpu(x: Tensor, group: Group, keep: bool) -> Result:
    """Slab by slab, each product added in place; one product gives s for all linears."""
    dtype = group_dtype(x, group.weights)
    h = x.to(dtype)
    s = _product(_dropped(h, group), group.stacked(dtype).T, group.keep_scale)
    dense = [dequantize(weight, dtype) for weight in group.weights] if keep else []
    outputs = [x.new_empty(x.shape[0], weight.rows) for weight in group.weights]
    for i, y in enumerate(outputs):
        B, part_of_s = group.B[i].to(dtype), s[:, group.columns[i]]
        for start, part in [(0, dense[i])] if keep else slabs(group.weights[i], dtype):
            rows = slice(start, start + len(part))
            here = y[:, rows]
            target = here if y.dtype == dtype else torch.empty_like(here, dtype=dtype)
            if group.biases:
                torch.addmm(group.biases[i][rows].to(dtype), h, part.T, out=target)
            else:
                torch.mm(h, part.T, out=target)
            target.addmm_(part_of_s, B[rows].T, alpha=group.scales[i])
            if target is not here:
                here.copy_(target)
    return Result(outputs, s, dense)


def backward_cpu(
    grads: list[Tensor], x: Tensor, s: Tensor, group: Group, dense: list[Tensor], need_x: bool
) -> Gradients:
    """The same sums; the gradient of x starts as LoRA's share, which only dropout masks, and the base adds to it."""
    dtype = s.dtype
    grads = [g.to(dtype) for g in grads]
    grad_s, grad_B = torch.empty_like(s), []
    for g, B, scale, part in zip(grads, group.B, group.scales, group.columns, strict=True):
        _product(g, B.to(dtype), scale, grad_s[:, part])
        grad_B.append(_product(g.T, s[:, part], scale).to(B.dtype))
    mask = None if group.seed is None else keep_mask(x.shape, group.dropout, group.seed)
    h = x.to(dtype)
    grad_A = _product(grad_s.T, h if mask is None else h * mask, group.keep_scale).to(wide(x))
    if not need_x:
        return Gradients(grad_A, grad_B, None)
    grad_x = _product(grad_s, group.stacked(dtype), group.keep_scale)
    if mask is not None:
        grad_x *= mask
    for i, g in enumerate(grads):
        for start, rows in [(0, dense[i])] if dense else slabs(group.weights[i], dtype):
            grad_x.addmm_(g[:, start : start + len(rows)], rows)
    return Gradients(grad_A, grad_B, grad_x.to(x.dtype))


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor * a b, rounded once."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    return torch.addmm(out, a, b, beta=0, alpha=factor, out=out)  # beta 0: what was there before is not read


def _dropped(h: Tensor, group: Group) -> Tensor:
    """h with what dropout removes set to zero; what survives is scaled where it is multiplied anyway."""
    return h if group.seed is None else h * keep_mask(h.shape, group.dropout, group.seed)
