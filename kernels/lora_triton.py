"""LoRA's two kernels on CUDA: s = x A^T for few rows in one launch, and dropout whose mask is never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .dropout import LEVELS, ROUNDS, keep_level
from .split_k_triton import counters, finish, is_last, splits_for, sum_of_splits

DROP_ROWS, DROP_COLUMNS = 8, 256  # of a tile of dropout
PHILOX_ROUNDS = tl.constexpr(ROUNDS)


def project_down(x: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    """s [M, R] = scale * x [M, K] A^T in x's dtype, summed in fp32, for few rows of x.

    One launch. A [R, K] is rounded to x's dtype. K is split over programs, whose sums are added as in `matmul`. Columns
    of x and A lie at stride 1.
    """
    (M, K), R = x.shape, A.shape[0]
    s = x.new_empty(M, R)
    if s.numel() == 0:
        return s
    BM, BR, BK = min(64, max(16, triton.next_power_of_2(M))), min(64, max(16, triton.next_power_of_2(R))), 128
    tiles = triton.cdiv(M, BM) * triton.cdiv(R, BR)
    splits = splits_for(tiles, triton.cdiv(K, BK), dispatch.processors(x.device))
    sums = x.new_empty((splits, M, R) if splits > 1 else 0, dtype=torch.float32)
    with dispatch.on_device(x):
        lora_project_down_kernel[(tiles, splits)](
            *(x, A, s, sums, counters(x.device, tiles) if splits > 1 else None),
            *(M, R, K, x.stride(0), A.stride(0), scale, splits),
            *(BM, BR, BK, splits > 1),
            num_warps=4,
            num_stages=3,
        )
    return s


def drop(x: Tensor, p: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """x [M, K] where dropout.keep_mask(x.shape, p, seed) keeps it, else 0: not scaled. `out` may be x itself."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    M, K = x.shape
    with dispatch.on_device(x):
        lora_dropout_kernel[(triton.cdiv(M, DROP_ROWS), triton.cdiv(K, DROP_COLUMNS))](
            *(x, out, seed, M, K, x.stride(0), out.stride(0), keep_level(p) - LEVELS // 2),
            ROWS=DROP_ROWS,
            COLUMNS=DROP_COLUMNS,
            num_warps=4,
        )
    return out


# The kernels. Strides are of rows, in elements; the last dimension is contiguous. Rows are counted in 64 bits where
# they are multiplied: activations may hold more than 2^31 elements.


@triton.jit(do_not_specialize=["M", "splits"])
def lora_project_down_kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [R, K]
    s_ptr,  # [M, R]
    sums_ptr,  # fp32 [splits, M, R]
    counters_ptr,  # int32 [tiles], all 0
    M, R, K, x_stride, A_stride, scale,
    splits,  # of K
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr,  # whether splits > 1
):  # fmt: skip
    """One tile of s = factor * x A^T; K may be split over programs, whose parts are added in a fixed order."""
    tile, split = tl.program_id(0), tl.program_id(1)
    r_tiles = tl.cdiv(R, BR)
    m = tile // r_tiles * BM + tl.arange(0, BM)
    r = tile % r_tiles * BR + tl.arange(0, BR)
    share = tl.cdiv(tl.cdiv(K, BK), splits) * BK if SPLIT else K
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride
    A_at = A_ptr + r.to(tl.int64)[None, :] * A_stride
    total = tl.zeros([BM, BR], tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, K), BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_at + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        A = tl.load(A_at + k[:, None], mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x, A.to(x.dtype), total)
    total *= scale

    inside = (m < M)[:, None] & (r < R)[None, :]
    at = m.to(tl.int64)[:, None] * R + r[None, :]
    if SPLIT:
        if is_last(sums_ptr + split.to(tl.int64) * M * R + at, total, inside, counters_ptr + tile, splits):
            total = sum_of_splits(sums_ptr + at, inside, tl.cast(M, tl.int64) * R, splits)
            finish(s_ptr + at, total, None, r, R, inside)
    else:
        finish(s_ptr + at, total, None, r, R, inside)


@triton.jit
def lora_dropout_kernel(
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
