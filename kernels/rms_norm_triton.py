"""RMSNorm on a GPU: one program a row, one pass over x forward, one over x and dy backward; computed in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y like x, scale fp32 [..., 1]) with scale = 1 / rms(x)."""
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    columns = x.shape[-1]
    grid, weight = (scale.numel(),), weight.contiguous()
    launch(rms_norm_forward_kernel, grid)(x, weight, y, scale, columns, eps, **_sizes(columns))
    return y, scale


def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x, in its dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, columns = torch.empty_like(x), x.shape[-1]
    grid, weight = (scale.numel(),), weight.contiguous()
    launch(rms_norm_backward_kernel, grid)(dy, x, weight, scale, dx, columns, **_sizes(columns))
    return dx


def _sizes(columns: int) -> dict[str, int]:
    """The row as one block, and about sixteen values a thread where that allows it."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@triton.jit
def rms_norm_forward_kernel(x_ptr, weight_ptr, y_ptr, scale_ptr, columns, eps, BLOCK: tl.constexpr):
    """x / rms(x) * weight of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < columns
    x = tl.load(x_ptr + row * columns + i, mask=mask, other=0.0).to(tl.float32)
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(tl.sum(x * x), tl.cast(columns, tl.float32)) + eps))
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + i, x * scale * weight, mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def rms_norm_backward_kernel(dy_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, columns, BLOCK: tl.constexpr):
    """The gradient of x of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < columns
    dy = tl.load(dy_ptr + row * columns + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * columns + i, mask=mask, other=0.0).to(tl.float32)
    dz = dy * tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row)
    # dx = scale * dz - x * scale^3 * mean(dz * x)
    pull = tl.sum(dz * x) / columns * scale * scale
    tl.store(dx_ptr + row * columns + i, (dz - x * pull) * scale, mask=mask)
