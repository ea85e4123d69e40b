"""The gate of a feed-forward block, y = f(gate) * up (Shazeer 2020), keeping only gate and up for backward.

f is silu (SwiGLU, of Llama) or the tanh form of gelu (GEGLU, of Gemma). Written out in plain ops autograd would keep
f(gate) too: one more [tokens, intermediate] tensor in every layer.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import beyond_first, derivatives, run
from .dispatch import fused


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition. Tests hold `swiglu` to it."""
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition. Tests hold `geglu` to it."""
    return F.gelu(gate, approximate="tanh") * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for two tensors of equal shape and dtype; both get gradients."""
    return _checked("swiglu", gate, up, False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh form, for two tensors of equal shape and dtype; both get gradients."""
    return _checked("geglu", gate, up, True)


def _checked(name: str, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"{name} needs gate and up alike, got {got}")
    return run(_Gated, gated_reference, gate, up, gelu)


def gated_reference(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """geglu's or swiglu's definition."""
    return geglu_reference(gate, up) if gelu else swiglu_reference(gate, up)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """geglu or swiglu; no gradient flows."""
    if fused(gate):
        from . import swiglu_triton

        return swiglu_triton.forward(gate, up, gelu)
    return _opened(gate, gelu).mul_(up)


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    if fused(gate):
        from . import swiglu_triton

        return swiglu_triton.backward(dy, gate, up, gelu)[:2]
    aten, dup = torch.ops.aten, _opened(gate, gelu).mul_(dy)
    if gelu:
        return aten.gelu_backward(dy * up, gate, approximate="tanh"), dup
    return aten.silu_backward(dy * up, gate), dup


def _opened(gate: Tensor, gelu: bool) -> Tensor:
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return gated(gate, up, gelu)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if beyond_first():
            plain = partial(gated_reference, gelu=ctx.gelu)
            return *derivatives(plain, (gate, up), ctx.needs_input_grad[:2], [dy]), None
        return *gated_backward(dy, gate, up, ctx.gelu), None
