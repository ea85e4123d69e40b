"""The gate of a feed-forward block on a GPU: one launch forward, one backward, computed in fp32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 2048  # values a program


def forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or with gelu's tanh form in the place of silu."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    launch(swiglu_forward_kernel, grid, gate, up, y, gate.numel(), GELU=gelu, BLOCK=BLOCK, num_warps=8)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid, n = (triton.cdiv(gate.numel(), BLOCK),), gate.numel()
    launch(swiglu_backward_kernel, grid, dy, gate, up, dgate, dup, n, GELU=gelu, BLOCK=BLOCK, num_warps=8)
    return dgate, dup


@triton.jit
def gate_and_slope(gate, GELU: tl.constexpr):
    """f(gate) and its derivative, for silu, x sigmoid(x), or gelu's tanh form, x sigmoid(2 c (x + 0.044715 x^3))."""
    if GELU:
        inner = 1.5957691216057308 * gate * (1 + 0.044715 * gate * gate)  # 2 sqrt(2 / pi)
        open_ = tl.sigmoid(inner)
        slope = open_ + gate * open_ * (1 - open_) * 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    else:
        open_ = tl.sigmoid(gate)
        slope = open_ * (1 + gate * (1 - open_))
    return gate * open_, slope


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """f(gate) * up, element by element."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    opened, _ = gate_and_slope(gate, GELU)
    tl.store(y_ptr + i, opened * up, mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradients of gate and up from that of their product."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    dy = tl.load(dy_ptr + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    opened, slope = gate_and_slope(gate, GELU)
    tl.store(dgate_ptr + i, dy * up * slope, mask=mask)
    tl.store(dup_ptr + i, dy * opened, mask=mask)
