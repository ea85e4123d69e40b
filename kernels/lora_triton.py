"""LoRA's passes over x and over the gradients on CUDA, where a library product would make one pass for each.

x is read once for all projections that share it, with dropout's mask made on the way; a gradient g is read once for
both products that LoRA wants of it. Sums that run over several programs are written apart and added in one order
(`_add`), so results repeat to the bit: no atomics. Products take operands in x's dtype and add in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .dropout import LEVELS, keep_level, keep_scale
from .dropout_triton import keep_tile
from .lora_paths import padded

RANKS = 128  # columns of s that one program holds at most


def project(x: Tensor, A: Tensor, s: Tensor, dropout: float, seed: Tensor | None, copy: Tensor | None = None) -> None:
    """s [M, R] = dropout(x) A^T for x [M, K] and A [R, K] of one dtype: one pass over x.

    `copy` [M, K + padded(R)], if given, becomes [x | s | 0] on the way.
    """
    (M, K), R = x.shape, A.shape[0]
    tail = 0 if copy is None else padded(R)
    width = min(RANKS, _power(max(R, tail)))
    BM = next((b for b in (64, 32) if -(-M // b) >= dispatch.processors(x.device)), 16)
    grid = (triton.cdiv(M, BM), triton.cdiv(max(R, tail), width))
    level, scale = _dropping(dropout)
    with dispatch.on_device(x):
        _project[grid](
            *(x, A, s, copy, seed, M, K, R, x.stride(0), K + tail, tail, level, scale),
            BM=BM,
            BK=64,
            BR=width,
            DROPOUT=dropout > 0,
            COPY=copy is not None,
            num_warps=4,
            num_stages=4 if width <= 64 else 3,
            enable_fp_fusion=True,
        )


def fill_tail(workspace: Tensor, columns: int, B: Tensor, scale: float, first: int) -> None:
    """Beside the decoded weight [N, columns] in `workspace`: scale * B [N, r] from tail column `first`, else zeros."""
    N, width = workspace.shape
    with dispatch.on_device(workspace):
        _fill_tail[(triton.cdiv(N, 64),)](
            *(workspace, B, N, B.shape[1], width, columns, width - columns, first, float(scale)),
            BN=64,
            BT=_power(width - columns),
            num_warps=4,
            enable_fp_fusion=True,
        )


def gradient_B(g: Tensor, s: Tensor, B: Tensor, gs: Tensor, scale: float) -> Tensor:
    """gs [M, r] = scale * g B, and as result scale * g^T s [N, r] like the masters B: one pass over g [M, N].

    s and gs may be columns of wider matrices.
    """
    result = B.new_empty(B.shape)
    for start in range(0, B.shape[1], RANKS):
        part = slice(start, start + RANKS)
        _gradient_B_part(g, s[:, part], B[:, part], gs[:, part], result[:, part], float(scale))
    return result


def _gradient_B_part(g: Tensor, s: Tensor, B: Tensor, gs: Tensor, result: Tensor, scale: float) -> None:
    (M, N), R = g.shape, B.shape[1]
    BR = _power(R)
    BM, BN = (64, 256) if BR <= 32 else (64, 128) if BR <= 64 else (32, 128)
    rows, columns = _spans(M, N, BN, dispatch.processors(g.device))
    grid = (triton.cdiv(N, columns), triton.cdiv(M, rows))
    of_gs = torch.empty(grid[0], M, R, dtype=torch.float32, device=g.device)
    of_B = torch.empty(grid[1], N, R, dtype=torch.float32, device=g.device)
    with dispatch.on_device(g):
        _gradient_B[grid](
            *(g, s, B, of_gs, of_B, M, N, R, g.stride(0), s.stride(0), B.stride(0), rows, columns),
            BM=BM,
            BN=BN,
            BR=BR,
            num_warps=8,
            num_stages=3 if BR <= 64 else 2,
            enable_fp_fusion=True,
        )
    _add_parts(of_gs, gs, scale)
    _add_parts(of_B, result, scale)


def gradient_A(gs: Tensor, x: Tensor, A: Tensor, grad_x: Tensor | None, dropout: float, seed: Tensor | None) -> Tensor:
    """gs^T dropout(x) [R, K] in fp32; grad_x [M, K], if given, becomes dropout's gradient of gs A: one pass over x.

    A [R, K] and gs [M, R] are in x's dtype.
    """
    result = A.new_empty(A.shape, dtype=torch.float32)
    for start in range(0, A.shape[0], RANKS):
        part = slice(start, start + RANKS)
        _gradient_A_part(gs[:, part], x, A[part], result[part], grad_x, dropout, seed, add=start > 0)
    return result


def _gradient_A_part(
    gs: Tensor, x: Tensor, A: Tensor, result: Tensor, grad_x: Tensor | None, dropout: float, seed: Any, *, add: bool
) -> None:
    (M, K), R = x.shape, A.shape[0]
    BR, BK = _power(R), 64
    rows, _ = _spans(M, K, BK, dispatch.processors(x.device))
    grid = (triton.cdiv(K, BK), triton.cdiv(M, rows))
    parts = torch.empty(grid[1], R, K, dtype=torch.float32, device=x.device)
    level, scale = _dropping(dropout)
    with dispatch.on_device(x):
        _gradient_A[grid](
            *(gs, x, A, grad_x, parts, seed, M, K, R, gs.stride(0), x.stride(0), level, scale, rows),
            BM=64 if BR <= 32 else 32,  # what 255 registers hold on sm_80
            BK=BK,
            BR=BR,
            DROPOUT=dropout > 0,
            GRAD_X=grad_x is not None,
            ADD=add,
            num_warps=4 if BR <= 64 else 8,
            num_stages=3 if BR <= 64 else 2,
            enable_fp_fusion=True,
        )
    _add_parts(parts, result, scale)


def _add_parts(parts: Tensor, out: Tensor, scale: float) -> None:
    """out [rows, columns] = scale * parts [n, rows, columns].sum(0), in the order of n."""
    n, rows, columns = parts.shape
    with dispatch.on_device(parts):
        _add[(triton.cdiv(rows * columns, 1024),)](
            *(parts, out, n, rows * columns, columns, out.stride(0), scale), BLOCK=1024, enable_fp_fusion=True
        )


def _dropping(dropout: float) -> tuple[int, float]:
    return (keep_level(dropout) - LEVELS // 2, keep_scale(dropout)) if dropout else (0, 1.0)


def _power(size: int) -> int:
    """The next power of two from 16 up, the smallest that a product on tensor cores takes."""
    return max(16, 1 << (size - 1).bit_length())


def _spans(M: int, N: int, BN: int, processors: int) -> tuple[int, int]:
    """(rows, columns) that one program goes over: large, for few partial sums, but not so large that GPU parts idle."""
    rows, blocks = 1024, -(-N // BN)
    while rows > 128 and 4 * blocks * -(-M // rows) < 3 * processors:
        rows //= 2
    return rows, BN * -(-blocks * -(-M // rows) // processors)  # so few programs that all run at once


# The kernels. Strides are of rows, in elements; the last dimension is contiguous. Rows are counted in 64 bits where
# they are multiplied: activations may hold more than 2^31 elements.


@triton.jit
def _project(
    x_ptr, a_ptr, s_ptr, copy_ptr, seed_ptr, M, K, R, x_stride, copy_stride, tail, level, scale,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, DROPOUT: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """A program makes [BM, BR] of s; the first of each row also copies x."""
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    wide, inside = rows.to(tl.int64)[:, None], (rows < M)[:, None]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    copied = tl.where(tl.program_id(1) == 0, K, 0)
    total = tl.zeros((BM, BR), tl.float32)
    for column in range(0, K, BK):
        columns = column + tl.arange(0, BK)
        here = inside & (columns < K)[None, :]
        x = tl.load(x_ptr + wide * x_stride + columns[None, :], here, 0.0)
        if COPY:
            tl.store(copy_ptr + wide * copy_stride + columns[None, :], x, inside & (columns < copied)[None, :])
        if DROPOUT:
            x = tl.where(keep_tile(seed, first, column, level, BM, BK), x, 0.0)
        a = tl.load(a_ptr + ranks[:, None] * K + columns[None, :], (ranks < R)[:, None] & (columns < K)[None, :], 0.0)
        total = tl.dot(x, tl.trans(a), total)
    s = (total * scale).to(x_ptr.dtype.element_ty)
    tl.store(s_ptr + wide * R + ranks[None, :], s, inside & (ranks < R)[None, :])
    if COPY:
        tl.store(copy_ptr + wide * copy_stride + K + ranks[None, :], s, inside & (ranks < tail)[None, :])


@triton.jit
def _fill_tail(out_ptr, b_ptr, N, R, stride, columns, tail, first, scale, BN: tl.constexpr, BT: tl.constexpr):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    places = tl.arange(0, BT)
    ranks = places - first
    mine = (rows < N)[:, None] & ((ranks >= 0) & (ranks < R))[None, :]
    b = tl.load(b_ptr + rows[:, None] * R + ranks[None, :], mine, 0.0).to(tl.float32) * scale
    out = out_ptr + rows.to(tl.int64)[:, None] * stride + columns + places[None, :]
    tl.store(out, b.to(out_ptr.dtype.element_ty), (rows < N)[:, None] & (places < tail)[None, :])


@triton.jit
def _gradient_B(
    g_ptr, s_ptr, b_ptr, gs_ptr, gb_ptr, M, N, R, g_stride, s_stride, b_stride, span_m, span_n,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A program goes over g[span_m, span_n], column block by column block: g^T s of a block stays in registers.

    g B runs over the column blocks: it is kept in the program's own part of gs [blocks of N, M, R] and added to.
    """
    first_row, first_column = tl.program_id(1) * span_m, tl.program_id(0) * span_n
    ranks = tl.arange(0, BR)
    gs_ptr += tl.program_id(0).to(tl.int64) * M * R
    gb_ptr += tl.program_id(1).to(tl.int64) * N * R
    for column in range(first_column, min(first_column + span_n, N), BN):
        columns = column + tl.arange(0, BN)
        of_b = (columns < N)[:, None] & (ranks < R)[None, :]
        b = tl.load(b_ptr + columns[:, None] * b_stride + ranks[None, :], of_b, 0.0).to(g_ptr.dtype.element_ty)
        total = tl.zeros((BN, BR), tl.float32)
        for row in range(first_row, min(first_row + span_m, M), BM):
            rows = row + tl.arange(0, BM)
            wide = rows.to(tl.int64)[:, None]
            of_s = (rows < M)[:, None] & (ranks < R)[None, :]
            g = tl.load(g_ptr + wide * g_stride + columns[None, :], (rows < M)[:, None] & (columns < N)[None, :], 0.0)
            s = tl.load(s_ptr + wide * s_stride + ranks[None, :], of_s, 0.0)
            total = tl.dot(tl.trans(g), s, total)
            gs = tl.dot(g, b)
            if column > first_column:
                gs += tl.load(gs_ptr + wide * R + ranks[None, :], of_s, 0.0)
            tl.store(gs_ptr + wide * R + ranks[None, :], gs, of_s)
        tl.store(gb_ptr + columns[:, None] * R + ranks[None, :], total, of_b)
        tl.debug_barrier()  # what one thread wrote to gs another may read for the next block of columns


@triton.jit
def _gradient_A(
    gs_ptr, x_ptr, a_ptr, gx_ptr, ga_ptr, seed_ptr, M, K, R, gs_stride, x_stride, level, scale, span,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    DROPOUT: tl.constexpr, GRAD_X: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A program goes down `span` rows of x[:, BK]; what is unscaled by dropout in ga, its caller scales."""
    column, first_row = tl.program_id(0) * BK, tl.program_id(1) * span
    columns, ranks = column + tl.arange(0, BK), tl.arange(0, BR)
    of_a = (ranks < R)[:, None] & (columns < K)[None, :]
    a = tl.load(a_ptr + ranks[:, None] * K + columns[None, :], of_a, 0.0)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    total = tl.zeros((BR, BK), tl.float32)
    for row in range(first_row, min(first_row + span, M), BM):
        rows = row + tl.arange(0, BM)
        wide, inside = rows.to(tl.int64)[:, None], (rows < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + wide * x_stride + columns[None, :], inside, 0.0)
        gs = tl.load(gs_ptr + wide * gs_stride + ranks[None, :], (rows < M)[:, None] & (ranks < R)[None, :], 0.0)
        if DROPOUT:
            keep = keep_tile(seed, row, column, level, BM, BK)
            x = tl.where(keep, x, 0.0)
        total = tl.dot(tl.trans(gs), x, total)
        if GRAD_X:
            gx = tl.dot(gs, a) * scale
            if DROPOUT:
                gx = tl.where(keep, gx, 0.0)
            if ADD:
                gx += tl.load(gx_ptr + wide * K + columns[None, :], inside, 0.0)
            tl.store(gx_ptr + wide * K + columns[None, :], gx.to(x_ptr.dtype.element_ty), inside)
    ga_ptr += tl.program_id(1).to(tl.int64) * R * K
    tl.store(ga_ptr + ranks[:, None] * K + columns[None, :], total, of_a)


@triton.jit
def _add(parts_ptr, out_ptr, n, size, columns, out_stride, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += tl.load(parts_ptr + i, i < size, 0.0)
        parts_ptr += size
    tl.store(out_ptr + i // columns * out_stride + i % columns, total * scale, i < size)
