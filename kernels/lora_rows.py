"""LoRA of several adapters on rows of their own: y_i + scale_i (x_i A_i^T) B_i^T for the rows i that each has.

As slices of x and y, as autograd would have it, each adapter's backward is as large as the whole batch: a slice's
gradient is a tensor of zeros but for its rows. Here each writes its rows' part of one gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch

Place = slice | Tensor  # the rows of one adapter: neighbours, or their int64 indices
Part = tuple[Place, Tensor, Tensor, float]  # rows; A [rank, in]; B [out, rank]; scale


def lora_rows(y: Tensor, x: Tensor, parts: Sequence[Part]) -> Tensor:
    """y [M, ..., out] and, on the rows of each part, scale * (x A^T) B^T for x [M, ..., in]; no row is in two parts.

    Gradients flow to y, x and each A and B, of any order; x is saved. Products run in dispatch.product_dtype(x)."""
    factors = [matrix for _, A, B, _ in parts for matrix in (A, B)]
    found: Tensor = _Rows.apply(y, x, [(place, scale) for place, _, _, scale in parts], *factors)
    return found


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, where: list[tuple[Place, float]], *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.where, dtype, out = where, dispatch.product_dtype(x), y.clone()
        for (place, scale), A, B in zip(where, factors[::2], factors[1::2], strict=True):
            rows = out[place]
            s = x[place].flatten(0, -2).to(dtype) @ A.to(dtype).T
            if isinstance(place, slice) and y.dtype == dtype:
                rows.view(-1, rows.shape[-1]).addmm_(s, B.to(dtype).T, alpha=scale)
            else:
                out[place] = rows + (scale * (s @ B.to(dtype).T)).to(y.dtype).view(rows.shape)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        dtype, grads = dispatch.product_dtype(x), list[Tensor | None]()
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        for (place, scale), A, B in zip(ctx.where, factors[::2], factors[1::2], strict=True):
            rows, mine = x[place].flatten(0, -2).to(dtype), scale * g[place].flatten(0, -2).to(dtype)
            grad_s = mine @ B.to(dtype)
            grads += [(grad_s.T @ rows).to(A.dtype), (mine.T @ (rows @ A.to(dtype).T)).to(B.dtype)]
            if grad_x is not None:
                grad_x[place] = (grad_s @ A.to(dtype)).to(x.dtype).view(x[place].shape)
        return g, grad_x, None, *grads
