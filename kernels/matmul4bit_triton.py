"""y = x W^T + bias for few rows of x, W in 4 bits and decoded inside the product: no dense W is ever written.

A program owns BN rows of W and BM of x. Per step of BK columns it looks up each packed byte in a table of pairs, kept
in shared memory, which gives two neighbouring values of W as they lie in a matrix unit's register; W is the left
operand of the product, which may come from registers, so that only the small x goes through shared memory as a matrix.

The matrix units see the 4-bit code values, rounded to x's dtype, and each step's fp32 partial sum is multiplied by its
block's scale: few instructions while BM is small. Each code value is off by up to half an ulp of x's dtype, the scale
is exact, so |error| <= (2 K 2^-24 + 2 u) |x| |W|^T + u |y| against the exact product of x with code * scale (u = 2^-8
for bf16, 2^-11 for fp16). Bias and LoRA's second product ride in the same launch. Few tiles do not fill a GPU: then K
is split over programs, whose sums are added after the launch, in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch
from .border import STEP
from .codes import code_for, dynamic_code, pair_table
from .launch import launch
from .weight4bit import Weight4bit

COLUMNS, WARPS, STAGES = 256, 8, 3  # of a program; its columns of y are rows of W
ROWS = 32  # of x in a program, at most
COPIES = 16  # of the look-up table in shared memory
PROGRAMS = 2  # that a multiprocessor is to run at a time; of more than 8 rows it may run one, in two waves
FEWEST_STEPS = 4  # of a program: filling its pipeline and ending takes as long
RANKS = 64  # of LoRA in one step

NEW_LAYOUT = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)  # of mma.sync's operand from 8-bit loads

_Lora = tuple[Tensor, Tensor, float]


def matmul(x: Tensor, weight: Weight4bit, bias: Tensor | None, lora: _Lora | None = None) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias [N] + scale * s B^T, in x's dtype (bf16 or fp16), summed in fp32, rounded once.

    `lora` is (s [M, R], B [N, R], scale) with s = x A^T in x's dtype; B and bias may have any floating dtype, B is
    rounded to x's. The rows of x may lie at any stride, the columns at 1. Nothing is checked: see
    `lora_paths.few_rows`.
    """
    M, N, K = x.shape[0], weight.rows, weight.columns
    if M == 0:
        return x.new_empty(M, N)
    BM, BK = min(ROWS, max(8, triton.next_power_of_2(M))), min(STEP, weight.blocksize)
    tiles, steps = triton.cdiv(M, BM) * triton.cdiv(N, COLUMNS), K // BK
    splits = splits_for(tiles, steps, PROGRAMS * dispatch.processors(x.device))
    y = x.new_empty(splits, M, N, dtype=x.dtype if splits == 1 else torch.float32)
    s, B, lora_scale = lora if lora is not None else (None, None, 0.0)
    nested = weight.nested_absmax
    launch(matmul4bit_kernel, (tiles, splits))(
        x,
        weight.packed.contiguous(),
        weight.absmax.contiguous(),
        None if nested is None else nested.contiguous(),
        weight.nested_offset,
        pair_table(weight.quant_type, x.dtype, x.device),
        None if nested is None else dynamic_code(True, x.device),
        None if bias is None else bias.contiguous(),
        *(s, B, y),
        *(M, N, K // 2, triton.cdiv(steps, splits), 0 if s is None else s.shape[1]),
        *(x.stride(0), 0 if s is None else s.stride(0), 0 if B is None else B.stride(0)),
        *(lora_scale, COPIES),
        BM=BM,
        BN=COLUMNS,
        BK=BK,
        RANK=0 if s is None else min(RANKS, max(16, triton.next_power_of_2(s.shape[1]))),
        STEPS_PER_BLOCK=weight.blocksize // BK,
        COPIES=COPIES,
        WARPS=WARPS,
        WORDS=_words(x.device, BM),
        num_warps=WARPS,
        num_stages=STAGES,
        maxnreg=65536 // (32 * WARPS * PROGRAMS) if BM == 8 else None,
        enable_fp_fusion=False,  # the scales are rounded as the reference rounds them
    )
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def splits_for(tiles: int, steps: int, slots: int) -> int:
    """Parts of K, none of them empty, for `tiles` tiles of `steps` steps each, where `slots` programs run at a time."""
    wanted = max(1, min(slots // tiles, steps // FEWEST_STEPS))
    return int(triton.cdiv(steps, triton.cdiv(steps, wanted)))


def prepare(device: torch.device, dtype: torch.dtype, quant_type: str) -> None:
    """Makes what launches on this device share: look-up tables."""
    for kind in {dtype, torch.float32} & {torch.bfloat16, torch.float16, torch.float32}:
        pair_table(quant_type, kind, device)
    code_for(quant_type, device)
    dynamic_code(True, device)


def _words(device: torch.device, BM: int) -> int:
    """Neighbouring bytes of W in one thread's part of the left operand, as the compiler lays it out."""
    wgmma = dispatch.architecture(device).startswith("sm_9") and BM >= 16
    return 1 if wgmma or NEW_LAYOUT else 2


@triton.jit(do_not_specialize=["M", "R", "share"])  # the next token or prompt is no reason to compile again
def matmul4bit_kernel(
    x_ptr,  # [M, K]
    packed_ptr,  # uint8 [N, HALF]
    absmax_ptr,  # fp32 scales, or with nested_ptr uint8 codes of them, one a block of the flattened W
    nested_ptr,  # fp32, one for 256 scales
    offset_ptr,  # fp32, one
    pairs_ptr,  # int32 [256], each the two code values of a byte in x's dtype
    map_ptr,  # fp32 [256], the values of absmax codes
    bias_ptr,  # [N]
    s_ptr,  # [M, R]
    B_ptr,  # [N, R]
    y_ptr,  # [splits, M, N]
    M, N, HALF, share, R,  # HALF is K // 2; share: steps of one split
    x_stride, s_stride, B_stride, lora_scale,
    copies,  # COPIES again; as an argument, the address of a look-up is one multiply-add
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    RANK: tl.constexpr,  # 0 without LoRA
    STEPS_PER_BLOCK: tl.constexpr,
    COPIES: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One tile of y = x W^T + bias + scale * s B^T, W decoded inside, or of its sum over a part of K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    m_tiles = tl.cdiv(M, BM)  # neighbours in the grid share rows of W, the dearer operand
    m = tile % m_tiles * BM + tl.arange(0, BM)
    first, of_tile = tile // m_tiles * BN, tl.arange(0, BN)
    n = first + of_tile
    row = tl.minimum(n, N - 1)  # of W, for reading: past the end the last row again
    k, byte = tl.arange(0, BK), tl.arange(0, BK // 2)
    steps = HALF // (BK // 2)
    x_at = x_ptr + m.to(tl.int64)[None, :] * x_stride + _column(k, BK, WORDS)[:, None]  # [BK, BM]
    read = tl.minimum(first + _row(of_tile, WARPS), N - 1)
    packed_at = packed_ptr + read[:, None] * HALF + byte[None, :]  # [BN, BK // 2]
    packed_at = tl.max_contiguous(packed_at, [1, BK // 8])  # what a thread may take: an eighth of a row's step
    pairs = _table(pairs_ptr, COPIES)
    # The thread that looks a byte up, in its warp: each takes a copy of the table of its own.
    lane = ((of_tile % 8)[:, None] * 4 + byte[None, :] // WORDS % 4) % COPIES
    offset = tl.load(offset_ptr) if nested_ptr is not None else 0.0

    total = tl.zeros([BN, BM], tl.float32)
    absmax, nested = _read_scales(absmax_ptr, nested_ptr, row * steps + split * share, STEPS_PER_BLOCK)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        scale = _scales(absmax, nested, offset, map_ptr)
        following = row * steps + tl.minimum(step + 1, steps - 1)  # read a step ahead: nothing else hides the wait
        absmax, nested = _read_scales(absmax_ptr, nested_ptr, following, STEPS_PER_BLOCK)
        codes = tl.load(packed_at + step * (BK // 2))
        x = tl.load(x_at + step * BK, mask=(m < M)[None, :], other=0.0)
        part = tl.dot(_codes(codes, pairs, lane, copies, x.dtype, WARPS, WORDS), x)
        total = tl.fma(part, tl.broadcast_to(scale[:, None], [BN, BM]), total)
    if split == 0:
        if RANK > 0:
            total = tl.fma(_update(s_ptr, B_ptr, m, row, M, R, s_stride, B_stride, RANK), lora_scale, total)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    at = (tl.cast(M, tl.int64) * split + m)[None, :] * N + n[:, None]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row(i, WARPS: tl.constexpr):
    """Which row of its tile of W is read as row i of the loaded tile; `_arrange` puts it back."""
    return i // (16 * WARPS) * (16 * WARPS) + i // 8 % WARPS * 16 + i // (8 * WARPS) % 2 * 8 + i % 8


@triton.jit
def _column(k, BK: tl.constexpr, WORDS: tl.constexpr):
    """Which column of its step `_arrange` puts at column k of W; x is read in the same order."""
    return k // (2 * WORDS) % 4 * (BK // 4) + k // (8 * WORDS) * (2 * WORDS) + k % (2 * WORDS)


@triton.jit
def _arrange(codes, WARPS: tl.constexpr, WORDS: tl.constexpr):
    """The loaded tile as the left operand of a product: the bytes of each thread stay where they are."""
    BN: tl.constexpr = codes.shape[0]
    HALF: tl.constexpr = codes.shape[1]
    parts = tl.reshape(codes, [BN // (16 * WARPS), 2, WARPS, 8, 4, HALF // (4 * WORDS), WORDS])
    return tl.reshape(tl.permute(parts, [0, 2, 1, 3, 5, 4, 6]), [BN, HALF])


@triton.jit
def _table(pairs_ptr, COPIES: tl.constexpr):
    """The pairs of all bytes, each COPIES (4 or more) times in a row."""
    quarter = tl.load(pairs_ptr + tl.arange(0, 64 * COPIES) // (COPIES // 4))
    half = tl.reshape(tl.join(quarter, quarter), [128 * COPIES])  # four neighbours in one thread: wide stores
    return tl.reshape(tl.join(half, half), [256 * COPIES])


@triton.jit
def _codes(codes, pairs, lane, copies, dtype: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr):
    """The code values [BN, BK] in `dtype` of packed bytes [BN, BK // 2]."""
    index = _arrange(codes, WARPS, WORDS).to(tl.int32) * copies + lane
    words = tl.reshape(tl.gather(pairs, tl.reshape(index, [index.numel]), 0), index.shape)
    even = words.to(tl.int16).to(dtype, bitcast=True)
    odd = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(even, odd), [codes.shape[0], 2 * codes.shape[1]])


@triton.jit
def _read_scales(absmax_ptr, nested_ptr, step, STEPS_PER_BLOCK: tl.constexpr):
    """What is stored of the scales of steps, counted through the whole of W."""
    block = step // STEPS_PER_BLOCK
    absmax = tl.load(absmax_ptr + block)
    return absmax, tl.load(nested_ptr + block // 256) if nested_ptr is not None else absmax


@triton.jit
def _scales(absmax, nested, offset, map_ptr):
    """The scales themselves, rounded as dequantize_absmax rounds them."""
    if map_ptr is not None:
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * nested + offset
    return absmax


@triton.jit
def _update(s_ptr, B_ptr, m, row, M, R, s_stride, B_stride, RANK: tl.constexpr):
    """B s^T [BN, BM]."""
    total = tl.zeros([row.shape[0], m.shape[0]], tl.float32)
    for start in range(0, R, RANK):
        r = start + tl.arange(0, RANK)
        inside = (m < M)[None, :] & (r < R)[:, None]
        s = tl.load(s_ptr + m.to(tl.int64)[None, :] * s_stride + r[:, None], mask=inside, other=0.0)
        B = tl.load(B_ptr + row.to(tl.int64)[:, None] * B_stride + r[None, :], mask=(r < R)[None, :], other=0.0)
        total = tl.dot(B.to(s.dtype), s, total)
    return total
