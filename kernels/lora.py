"""The LoRA update y + scale * (x A^T) B^T as one rule of autograd, added into y in place: for dense bases.

4-bit bases take `lora_linears4bit`, which makes the base's product too. Left to autograd the same line keeps two more
tensors as large as y alive and passes over y three times. Here only x, which the layer below keeps anyway, and the
narrow x A^T are saved.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import product_dtype
from .linear4bit import lora_linears4bit as lora_linears4bit


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [..., out] += scale * (x [..., in] A^T) B^T, A [rank, in], B [out, rank] (LoRA, arXiv 2106.09685, eq. 3).

    y is overwritten and returned, so it must be a tensor nobody else reads: the fresh output of the base layer.
    Gradients flow to y, x, A and B, each in its own dtype; x and x A^T are saved. A and B may be fp32 masters under
    lower-precision x: the products run in dispatch.product_dtype(x). ValueError if the shapes do not fit.
    """
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and x.shape[-1:] == A.shape[1:]
    if not fits or y.shape != x.shape[:-1] + B.shape[:1]:
        raise ValueError(
            "lora_update needs y [..., out], x [..., in], A [rank, in], B [out, rank], got "
            f"y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    if torch.compiler.is_compiling():  # its compiler decides by itself what to add in place and what to keep
        dtype = product_dtype(x)
        update = (x.to(dtype) @ A.to(dtype).T) @ B.to(dtype).T
        return y + (scale * update).to(y.dtype)
    out: Tensor = _LoRAUpdate.apply(y, x, A, B, float(scale))
    return out


class _LoRAUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        dtype = product_dtype(x)
        s = x.reshape(-1, x.shape[-1]).to(dtype) @ A.to(dtype).T  # [N, rank]
        ctx.save_for_backward(x, s, A, B)
        ctx.scale = scale
        ctx.mark_dirty(y)
        if y.dtype == dtype and y.is_contiguous():
            y.view(-1, y.shape[-1]).addmm_(s, B.to(dtype).T, alpha=scale)
        else:
            y.add_((s @ B.to(dtype).T).view(y.shape), alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad [..., out]
        x, s, A, B = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).to(s.dtype)  # [N, out]
        grad_s = (rows @ B.to(s.dtype)).mul_(ctx.scale)  # [N, rank]
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_s @ A.to(s.dtype)).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad_A = (grad_s.T @ x.reshape(-1, x.shape[-1]).to(s.dtype)).to(A.dtype)
        if ctx.needs_input_grad[3]:
            grad_B = (rows.T @ s).mul_(ctx.scale).to(B.dtype)
        return grad, grad_x, grad_A, grad_B, None
