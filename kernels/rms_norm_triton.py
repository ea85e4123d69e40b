"""RMSNorm on a GPU: one program a row, one pass over x forward, one over x and dy backward; computed in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


def forward(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, scale fp32 [..., 1], x) with scale = 1 / rms(x); where there is `more`, x + more stands for x."""
    x, more = x.contiguous(), None if more is None else more.contiguous()
    total = x if more is None else torch.empty_like(x)
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    columns = x.shape[-1]
    grid, weight = (scale.numel(),), weight.contiguous()
    launch(rms_norm_forward_kernel, grid)(
        *(x, more, None if more is None else total, weight, y, scale, columns, eps), **_sizes(columns)
    )
    return y, scale, total


def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, more: Tensor | None = None) -> Tensor:
    """The gradient of x, in its dtype, plus `more`."""
    dy, x, more = dy.contiguous(), x.contiguous(), None if more is None else more.contiguous()
    dx, columns = torch.empty_like(x), x.shape[-1]
    grid, weight = (scale.numel(),), weight.contiguous()
    launch(rms_norm_backward_kernel, grid)(dy, x, weight, scale, dx, more, columns, **_sizes(columns))
    return dx


def _sizes(columns: int) -> dict[str, int]:
    """The row as one block, and about sixteen values a thread where that allows it."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, more_ptr, total_ptr, weight_ptr, y_ptr, scale_ptr, columns, eps, BLOCK: tl.constexpr
):
    """x / rms(x) * weight of one row, after what is added to x."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < columns
    x = tl.load(x_ptr + row * columns + i, mask=mask, other=0.0).to(tl.float32)
    if more_ptr is not None:
        x += tl.load(more_ptr + row * columns + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * columns + i, x, mask=mask)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)  # as it is kept
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(tl.sum(x * x), tl.cast(columns, tl.float32)) + eps))
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + i, x * scale * weight, mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def rms_norm_backward_kernel(dy_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, more_ptr, columns, BLOCK: tl.constexpr):
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
    dx = (dz - x * pull) * scale
    if more_ptr is not None:
        dx += tl.load(more_ptr + row * columns + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * columns + i, dx, mask=mask)
