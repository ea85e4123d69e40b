"""The gate of a Llama feed-forward block, y = silu(gate) * up (Shazeer 2020), keeping only gate and up for backward.

Written out in plain ops autograd would keep silu(gate) too: one more [tokens, intermediate] tensor in every layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .derivatives import beyond_first, derivatives, run
from .dispatch import fused


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition. Tests hold `swiglu` to it."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for two tensors of equal shape and dtype; both get gradients."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu needs gate and up alike, got {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    return run(_SwiGLU, swiglu_reference, gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if fused(gate):
            from . import swiglu_triton

            return swiglu_triton.forward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # ctx has none
        gate, up = ctx.saved_tensors
        if beyond_first():
            return tuple(derivatives(swiglu_reference, (gate, up), ctx.needs_input_grad, [dy]))
        if fused(gate):
            from . import swiglu_triton

            return swiglu_triton.backward(dy, gate, up)
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
