"""The two products of LoRA's backward that read a wide gradient, in one pass over it, on a GPU.

Programs take some columns of g for some rows; their fp32 parts of g B and g^T s are added in order by a second launch:
how they are cut depends on sizes alone, so the bits too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

ROWS, SHARE, BLOCK = 32, 512, 1024  # of a tile; rows of a program; sums of a program


def narrow(g: Tensor, B: Tensor, s: Tensor, grad_s: Tensor, carried: float, rest: float) -> Tensor:
    """carried * g B into grad_s [M, R], rounded once, and rest * g^T s [out, R] in fp32, for g [M, out] and B [out, R].

    g, B, s [M, R] and grad_s in one dtype of 16 bits, R at most 64; s and grad_s may be columns of a wider one."""
    (M, columns), rank, RANK = g.shape, B.shape[1], max(16, triton.next_power_of_2(B.shape[1]))
    width = min(512, 2**14 // RANK)
    grid = triton.cdiv(columns, width), triton.cdiv(M, SHARE)
    of_s, of_B = (g.new_empty(n, *of.shape, dtype=torch.float32) for n, of in zip(grid, (s, B), strict=True))
    launch(lora_narrow_kernel, grid)(
        *(g, B.contiguous(), s, of_s, of_B, M, columns, rank, g.stride(0), s.stride(0), carried, rest),
        **{"ROWS": ROWS, "SHARE": SHARE, "COLUMNS": width, "RANK": RANK, "num_warps": 8},
    )
    made = torch.empty_like(of_B[0])
    launch(lora_sums_kernel, (triton.cdiv(of_s[0].numel(), BLOCK) + triton.cdiv(made.numel(), BLOCK),))(
        of_s, of_B, grad_s, made, *grid, of_s[0].numel(), made.numel(), rank, grad_s.stride(0), BLOCK=BLOCK
    )
    return made


@triton.jit
def lora_narrow_kernel(
    g_ptr, b_ptr, s_ptr, of_s_ptr, of_b_ptr, M, columns, rank, g_stride, s_stride, carried, rest,
    ROWS: tl.constexpr, SHARE: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Some columns' part of g B, and some rows' part of g^T s."""
    tile, split, r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, RANK)[None, :]
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    kept = (column < columns)[:, None] & (r < rank)
    b = tl.load(b_ptr + column[:, None] * rank + r, mask=kept, other=0.0)
    of_b = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(split * SHARE, tl.minimum(M, (split + 1) * SHARE), ROWS):
        m = (start + tl.arange(0, ROWS))[:, None]
        g = tl.load(g_ptr + m * g_stride + column[None, :], mask=(m < M) & (column < columns)[None, :], other=0.0)
        s = tl.load(s_ptr + m * s_stride + r, mask=(m < M) & (r < rank), other=0.0)
        of_s = tl.dot(g, b, input_precision="ieee") * carried
        tl.store(of_s_ptr + (tile * M + m) * rank + r, of_s, mask=(m < M) & (r < rank))
        of_b += tl.dot(tl.trans(g), s, input_precision="ieee")
    tl.store(of_b_ptr + (split * columns + column[:, None]) * rank + r, of_b * rest, mask=kept)


@triton.jit
def lora_sums_kernel(
    of_s_ptr, of_b_ptr, grad_s_ptr, made_ptr, tiles, splits, of_s_size, of_b_size, rank, stride, BLOCK: tl.constexpr
):
    """The sums of parts, of those for s in the first programs."""
    first, block = tl.cdiv(of_s_size, BLOCK), tl.program_id(0)
    i = tl.where(block < first, block, block - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if block < first:
        for part in range(tiles):
            total += tl.load(of_s_ptr + tl.cast(part, tl.int64) * of_s_size + i, mask=i < of_s_size, other=0.0)
        tl.store(grad_s_ptr + i // rank * stride + i % rank, total, mask=i < of_s_size)
    else:
        for part in range(splits):
            total += tl.load(of_b_ptr + tl.cast(part, tl.int64) * of_b_size + i, mask=i < of_b_size, other=0.0)
        tl.store(made_ptr + i, total, mask=i < of_b_size)
