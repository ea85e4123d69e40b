"""Root-mean-square normalisation, y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019).

torch's own `F.rms_norm` decomposes on CPU: it saves the normalised x beside x and walks memory many times in backward.
The rule here saves x, the weight and one number a row, and needs half the time.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .dispatch import fused


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32 for half dtypes. Tests hold `rms_norm` to it."""
    wide = x.to(_compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(wide.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The last dimension of `x` [..., D] normalised, times `weight` [D]; in x's dtype, computed in fp32 for 16 bits."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm needs a weight of shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if torch.compiler.is_compiling():  # its compiler fuses the plain form by itself
        return rms_norm_reference(x, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _on_kernels(x: Tensor) -> bool:
    if not fused(x):
        return False
    from . import rms_norm_triton

    return rms_norm_triton.fits(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if _on_kernels(x):
            from . import rms_norm_triton

            y, scale = rms_norm_triton.forward(x, weight, eps)
        else:
            wide = x.to(_compute_dtype(x))
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
            scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            y = (wide * scale).mul_(weight).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and _on_kernels(x):
            from . import rms_norm_triton

            return rms_norm_triton.backward(dy, x, weight, scale), None, None
        wide, dy = x.to(scale.dtype), dy.to(scale.dtype)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        dz = dy * weight  # gradient of the normalised x
        # dx = scale * dz - x * scale^3 * mean(dz * x)
        pull = (dz * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return dz.mul_(scale).addcmul_(wide, pull).to(x.dtype), dweight, None
