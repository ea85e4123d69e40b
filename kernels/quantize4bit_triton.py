"""Weights -> 4-bit codes and block scales on CUDA, in one launch: the reference's bytes.

A program holds whole blocks. It finds their largest magnitudes, scales as the reference does (whole blocks multiply by
the reciprocal, a short last one divides, each step rounded to nearest), and finds the interval between midpoints of
the code by four comparisons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import code_midpoints
from .dispatch import on_device
from .weight4bit import SMALLEST_ABSMAX

TILE = 4096  # values of one program: the largest block


def quantize_into(flat: Tensor, quant_type: str, blocksize: int, packed: Tensor, absmax: Tensor) -> None:
    """Flat values -> packed uint8 [(n + 1) // 2] and absmax fp32 [blocks], which are overwritten.

    The absmax of a block with a NaN or Inf is Inf.
    """
    n = flat.numel()
    if n == 0:
        return
    values = (flat if flat.dtype in (torch.float16, torch.bfloat16) else flat.float()).contiguous()
    midpoints, order = code_midpoints(quant_type, flat.device)
    codes = None if quant_type == "nf4" else order  # NF4 ascends: an interval's code is its number
    with on_device(flat):
        quantize4bit_kernel[(triton.cdiv(n, TILE),)](
            *(values, midpoints, codes, packed, absmax, n),
            BLOCKS=TILE // blocksize,
            BLOCKSIZE=blocksize,
            SMALLEST=SMALLEST_ABSMAX,
            SHORT=n % blocksize > 0,
            num_warps=8,
            enable_fp_fusion=False,
        )


@triton.jit
def quantize4bit_kernel(
    flat, midpoints, order, packed, absmax, n,
    BLOCKS: tl.constexpr, BLOCKSIZE: tl.constexpr,
    SMALLEST: tl.constexpr,  # divisor
    SHORT: tl.constexpr,  # the last block is not full
):  # fmt: skip
    """Packed codes and absmax of some blocks of a weight: the reference's bytes."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # block
    left = tl.minimum(n - first * BLOCKSIZE, BLOCKS * BLOCKSIZE).to(tl.int32)  # values from there on
    block = tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.load(flat + first * BLOCKSIZE + i, mask=i < left, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(values == values, tl.abs(values), float("inf")), axis=1)
    # Constants as tensors: Triton takes a number below fp32's normal range for float64.
    divisor = tl.maximum(largest, tl.full([BLOCKS], SMALLEST, tl.float32))
    scaled = values * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)[:, None]
    if SHORT:
        short = (block + 1) * BLOCKSIZE > left
        scaled = tl.where(short[:, None], tl.div_rn(values, divisor[:, None]), scaled)
        largest = tl.where(short, divisor, largest)
    codes = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)  # how many of the 15 ascending midpoints lie below
    for k in tl.static_range(4):
        codes += tl.where(scaled > tl.load(midpoints + codes + ((8 >> k) - 1)), 8 >> k, 0)
    if order is not None:
        codes = tl.load(order + codes).to(tl.int32)
    high, low = tl.split(tl.reshape(codes, [BLOCKS, BLOCKSIZE // 2, 2]))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + first * (BLOCKSIZE // 2) + byte, (high << 4 | low).to(tl.uint8), mask=byte * 2 < left)
    tl.store(absmax + first + block, largest, mask=block * BLOCKSIZE < left)
