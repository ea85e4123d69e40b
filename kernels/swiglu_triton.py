"""The gate of a feed-forward block on a GPU: one launch forward, one backward, computed in fp32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device

BLOCK = 2048  # values a program


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    with on_device(gate):
        swiglu_forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, y, gate.numel(), BLOCK=BLOCK, num_warps=8)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    with on_device(gate):
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        swiglu_backward_kernel[grid](dy, gate, up, dgate, dup, gate.numel(), BLOCK=BLOCK, num_warps=8)
    return dgate, dup


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """silu(gate) * up, element by element."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def swiglu_backward_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    """The gradients of gate and up from that of their product."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    dy = tl.load(dy_ptr + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    tl.store(dgate_ptr + i, dy * up * open_ * (1 + gate * (1 - open_)), mask=mask)
    tl.store(dup_ptr + i, dy * gate * open_, mask=mask)
