"""The fused LoRA of Unsloth's method, written here from its description: not Unsloth's code, and named as ours.

One rule of autograd a group of projections of one input. Forward decodes the weight with bitsandbytes' kernels,
multiplies, and adds the update with `addmm_` in place; backward decodes it again, sums every projection's input
gradient in one buffer and makes each adapter's gradients from products with narrow matrices. Only x is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourbit.kernels.weight4bit import Weight4bit

from . import bnb

NAME = "published-method fused LoRA (ours)"


def missing() -> str | None:
    return bnb.missing()


def linears(
    x: Tensor, frozen: Sequence[tuple[Weight4bit, Any]], adapters: Sequence[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, ...]:
    """x [M, K] through several 4-bit weights with an adapter each, A [r, K] and B [N, r] in x's dtype."""
    flat = [tensor for pair in adapters for tensor in pair]
    outputs: tuple[Tensor, ...] = _Linears.apply(x, frozen, scale, *flat)
    return outputs


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Sequence[tuple[Weight4bit, Any]], scale: float, *flat: Tensor) -> Any:
        ctx.save_for_backward(x, *flat)
        ctx.frozen, ctx.scale = frozen, scale
        outputs = []
        for i, (stored, state) in enumerate(frozen):
            A, B = flat[2 * i], flat[2 * i + 1]
            y = x @ bnb.dequantize(stored, state).T
            outputs.append(y.addmm_(x @ A.T, B.T, alpha=scale))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *flat = ctx.saved_tensors
        dx, gradients = None, []
        for i, ((stored, state), g) in enumerate(zip(ctx.frozen, grads, strict=True)):
            A, B = flat[2 * i], flat[2 * i + 1]
            t = g @ B  # [M, r]
            gradients += [(t.T @ x).mul_(ctx.scale), (g.T @ (x @ A.T)).mul_(ctx.scale)]
            dense = bnb.dequantize(stored, state)
            dx = g @ dense if dx is None else dx.addmm_(g, dense)
            dx.addmm_(t, A, alpha=ctx.scale)
        return dx, None, None, *gradients
