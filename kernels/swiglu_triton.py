"""The gate of a feed-forward block on a GPU: one launch forward, one backward, computed in fp32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import processors
from .launch import launch

BLOCK = 2048  # values a program, forward
ROWS, COLUMNS = 32, 128  # of a tile, backward
PROGRAMS = 6  # for each multiprocessor; where columns make fewer, rows are split, and sums of splits added in order


def forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or with gelu's tanh form in the place of silu."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    launch(swiglu_forward_kernel, grid)(gate, up, y, gate.numel(), GELU=gelu, BLOCK=BLOCK, num_warps=8)
    return y


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, gelu: bool, lora: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up [..., I], and that of A [R, I] in fp32 where y went down through LoRA.

    lora: (gradient of y A^T [M, R], A) in one dtype; dy is then y's gradient without LoRA's share."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, (M, columns) = torch.empty_like(gate), torch.empty_like(up), dy.view(-1, dy.shape[-1]).shape
    tiles, (ds, A) = triton.cdiv(columns, COLUMNS), lora or (None, None)
    splits = max(1, min(triton.cdiv(M, ROWS), PROGRAMS * processors(gate.device) // tiles))
    of_A = None if A is None else A.new_empty(splits, *A.shape, dtype=torch.float32)
    launch(swiglu_backward_kernel, (tiles, splits))(
        *(dy, gate, up, dgate, dup, ds, None if A is None else A.contiguous(), of_A),
        *(M, columns, 0 if A is None else len(A), triton.cdiv(triton.cdiv(M, splits), ROWS) * ROWS),
        GELU=gelu,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        RANK=0 if A is None else max(16, triton.next_power_of_2(len(A))),
        num_warps=8,
    )
    return dgate, dup, of_A if of_A is None else of_A.sum(0)


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
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, ds_ptr, a_ptr, of_a_ptr, M, columns, rank, rows,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The gradients of gate and up from that of their product y, some columns for one split of the rows.

    With a RANK, LoRA's share of dy is added first, and y is made once more for the gradient of A: its sum stays in
    registers till the rows end, so no order is left to chance."""
    column, split = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :], tl.program_id(1)
    if RANK:
        r = tl.arange(0, RANK)
        kept = (r < rank)[:, None] & (column < columns)
        a = tl.load(a_ptr + r[:, None] * columns + column, mask=kept, other=0.0)
        of_a = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(split * rows, tl.minimum(M, (split + 1) * rows), ROWS):
        m = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask, i = (m < M) & (column < columns), m * columns + column
        dy = tl.load(dy_ptr + i, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
        opened, slope = gate_and_slope(gate, GELU)
        if RANK:
            ds = tl.load(ds_ptr + m * rank + r[None, :], mask=(m < M) & (r < rank)[None, :], other=0.0)
            dy += tl.dot(ds, a, input_precision="ieee")
            of_a += tl.dot(tl.trans(ds), (opened * up).to(ds.dtype), input_precision="ieee")
        tl.store(dgate_ptr + i, dy * up * slope, mask=mask)
        tl.store(dup_ptr + i, dy * opened, mask=mask)
    if RANK:
        tl.store(of_a_ptr + (split * rank + r).to(tl.int64)[:, None] * columns + column, of_a, mask=kept)
