"""The LoRA update y + scale * (x A^T) B^T as one rule of autograd, added into y in place."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [..., out] += scale * (x [..., in] A^T) B^T, A [rank, in], B [out, rank] (LoRA, arXiv 2106.09685, eq. 3).

    y is overwritten and returned, so it must be a tensor nobody else reads: the fresh output of the base layer.
    Gradients flow to y, x, A and B; x and x A^T are saved. A and B may be fp32 masters under lower-precision x: the
    products run in x's dtype, and each gradient comes back in its tensor's dtype. ValueError if the shapes do not fit.
    """
    _check_shapes(y, x, A, B)
    out: Tensor = _LoRAUpdate.apply(y, x, A, B, scale)
    return out


class _LoRAUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        s = x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).T  # [N, rank]
        update = s @ B.to(x.dtype).T  # [N, out]
        ctx.save_for_backward(x, s, A, B)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return y.add_(update.view(y.shape), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad [..., out]
        x, s, A, B = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).to(x.dtype)  # [N, out]
        grad_s = ctx.scale * (rows @ B.to(x.dtype))  # [N, rank]
        grad_x = (grad_s @ A.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        grad_A = (grad_s.T @ x.reshape(-1, x.shape[-1])).to(A.dtype) if ctx.needs_input_grad[2] else None
        grad_B = (ctx.scale * (rows.T @ s)).to(B.dtype) if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_A, grad_B, None


def _check_shapes(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and x.shape[-1:] == A.shape[1:]
    if not fits or y.shape != x.shape[:-1] + B.shape[:1]:
        raise ValueError(
            "lora_update needs y [..., out], x [..., in], A [rank, in], B [out, rank], got "
            f"y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
