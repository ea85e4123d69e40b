"""s = x A^T for few rows of x: LoRA's narrow product, one launch, K split over programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .split_k_triton import counters, finish, is_last, splits_for, sum_of_splits


def project_down(x: Tensor, A: Tensor) -> Tensor:
    """s [M, R] = x [M, K] A^T in x's dtype, summed in fp32, for few rows of x; A [R, K] is rounded to x's dtype.

    One launch. K is split over programs, whose sums are added as in `matmul`. Columns of x and A lie at stride 1.
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
        _project_kernel[(tiles, splits)](
            x,
            A,
            s,
            sums,
            counters(x.device, tiles) if splits > 1 else None,
            M,
            R,
            K,
            x.stride(0),
            A.stride(0),
            splits,
            BM=BM,
            BR=BR,
            BK=BK,
            SPLIT=splits > 1,
            num_warps=4,
            num_stages=3,
        )
    return s


@triton.jit(do_not_specialize=["M", "splits"])
def _project_kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [R, K]
    s_ptr,  # [M, R]
    sums_ptr,  # fp32 [splits, M, R]
    counters_ptr,  # int32 [tiles], all 0
    M,
    R,
    K,
    x_stride,
    A_stride,
    splits,  # of K
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,  # whether splits > 1
):
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

    inside = (m < M)[:, None] & (r < R)[None, :]
    at = m.to(tl.int64)[:, None] * R + r[None, :]
    if SPLIT:
        if is_last(sums_ptr + split.to(tl.int64) * M * R + at, total, inside, counters_ptr + tile, splits):
            finish(
                s_ptr + at, sum_of_splits(sums_ptr + at, inside, tl.cast(M, tl.int64) * R, splits), None, r, R, inside
            )
    else:
        finish(s_ptr + at, total, None, r, R, inside)
