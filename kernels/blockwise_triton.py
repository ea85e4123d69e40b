"""The 8-bit blockwise quantisation of scales on CUDA, in one launch: the reference's bytes."""

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device

BLOCKS = 4  # blocks of one program


def quantize_shifted(
    values: Tensor, offset: Tensor, midpoints: Tensor, blocksize: int, codes: Tensor, absmax: Tensor
) -> None:
    """values - offset, fp32 [n], -> codes uint8 [n], absmax fp32 [blocks]; midpoints float64 [255], ascending."""
    if values.numel() == 0:
        return
    with on_device(values):
        quantize_absmax_kernel[(triton.cdiv(absmax.numel(), BLOCKS),)](
            *(values, offset, midpoints, codes, absmax, values.numel()),
            BLOCKS=BLOCKS,
            BLOCKSIZE=blocksize,
            num_warps=4,
            enable_fp_fusion=False,
        )


@triton.jit
def quantize_absmax_kernel(values, offset, midpoints, codes, absmax, n, BLOCKS: tl.constexpr, BLOCKSIZE: tl.constexpr):
    """Of BLOCKS blocks. Codes are found in float64, as the reference does, by binary search among the midpoints."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    shifted = tl.where(i < n, tl.load(values + i, mask=i < n, other=0.0) - tl.load(offset), 0.0)
    largest = tl.max(tl.abs(shifted), axis=1)
    scaled = shifted.to(tl.float64) / tl.where(largest > 0, largest, 1.0).to(tl.float64)[:, None]
    code = tl.zeros([BLOCKS, BLOCKSIZE], tl.int32)  # midpoints below the value
    for k in tl.static_range(8):
        code += tl.where(scaled > tl.load(midpoints + code + ((128 >> k) - 1)), 128 >> k, 0)
    tl.store(codes + i, code.to(tl.uint8), mask=i < n)
    tl.store(absmax + block, largest, mask=block * BLOCKSIZE < n)
