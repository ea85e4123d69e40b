"""Dropout on CUDA whose mask is never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import LEVELS, ROUNDS, keep_level
from .launch import launch

DROP_ROWS, DROP_COLUMNS = 8, 256  # of a tile of dropout
PHILOX_ROUNDS = tl.constexpr(ROUNDS)


def drop(x: Tensor, p: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """x [M, K] where dropout.keep_mask(x.shape, p, seed) keeps it, else 0: not scaled. `out` may be x itself."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    M, K = x.shape
    launch(dropout_kernel, (triton.cdiv(M, DROP_ROWS), triton.cdiv(K, DROP_COLUMNS)))(
        *(x, out, seed, M, K, x.stride(0), out.stride(0), keep_level(p) - LEVELS // 2),
        ROWS=DROP_ROWS,
        COLUMNS=DROP_COLUMNS,
        num_warps=4,
    )
    return out


@triton.jit
def dropout_kernel(
    x_ptr, out_ptr, seed_ptr, M, K, x_stride, out_stride, level, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The mask of dropout.keep_mask, made where it is used; 8 divides COLUMNS.

    `level` is dropout.keep_level - 32768, to be compared with 16 bits as a signed number. A thread's draws become the
    eight neighbours that it also loads, so the words are cut up without leaving their registers.
    """
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    m, k = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], inside, 0.0)
    nothing = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    groups = nothing + (column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    rows_ = nothing + m.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), groups, rows_, nothing, nothing, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)  # word 2 i + j at [:, :, i, j]
    halves = tl.join((words << 16) >> 16, words >> 16)  # sign-extended
    kept = tl.where(tl.reshape(halves, (ROWS, COLUMNS)) < level, x, 0.0)
    tl.store(out_ptr + m.to(tl.int64)[:, None] * out_stride + k[None, :], kept.to(x.dtype), inside)
