"""Root-mean-square normalisation, y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019).

torch's own `F.rms_norm` decomposes on CPU: it saves the normalised x beside x and walks memory many times in backward.
The rule here saves x, the weight and one number a row, and needs half the time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .derivatives import beyond_first, derivatives, run, transformed
from .dispatch import fused, widened

LARGEST = 1 << 14  # columns that a program of its kernels holds in registers; of twice as many some would spill


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32 for half dtypes. Tests hold `rms_norm` to it."""
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(wide.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The last dimension of `x` [..., D] normalised, times `weight` [D]; in x's dtype, computed in fp32 for 16 bits."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm needs a weight of shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    return run(_RMSNorm, rms_norm_reference, x, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """x + y and its rms_norm, in one pass each way, for a frozen weight on a GPU; None where that is two ops."""
    apart = torch.compiler.is_compiling() or transformed() or weight.requires_grad or x.dtype != y.dtype
    return None if apart or not _on_kernels(x) else _RMSNorm.apply(x, weight, eps, y)


def _on_kernels(x: Tensor) -> bool:
    return fused(x) and x.shape[-1] <= LARGEST


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> Any:
        """The normalised x; with `more`, on kernels only, x + more and that normalised."""
        if _on_kernels(x):
            from . import rms_norm_triton

            y, scale, x = rms_norm_triton.forward(x, weight, eps, more)
        else:
            wide = widened(x)
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
            scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            y = (wide * scale).mul_(weight).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y if more is None else (x, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (*more, dy), (x, weight, scale) = grads, ctx.saved_tensors
        if beyond_first():
            norm = partial(rms_norm_reference, eps=ctx.eps)
            wanted = any(ctx.needs_input_grad[::3]), ctx.needs_input_grad[1]  # the sum's is that of x and of more
            dx, dweight = derivatives(norm, (x, weight), wanted, [dy])
            dx = sum(more, dx) if dx is not None else None
            return dx, dweight, None, dx if more else None
        if not ctx.needs_input_grad[1] and _on_kernels(x):
            from . import rms_norm_triton

            dx = rms_norm_triton.backward(dy, x, weight, scale, *more)
            return dx, None, None, dx if more else None
        wide, dy = x.to(scale.dtype), dy.to(scale.dtype)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        dz = dy * weight  # gradient of the normalised x
        # dx = scale * dz - x * scale^3 * mean(dz * x)
        pull = (dz * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return dz.mul_(scale).addcmul_(wide, pull).to(x.dtype), dweight, None
