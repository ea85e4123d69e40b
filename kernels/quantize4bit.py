"""Weights -> 4-bit codes and a scale for each block, in bitsandbytes' layout, byte for byte.

The weight is flattened row by row and cut into blocks; each block is divided by its largest magnitude (absmax), and
every value becomes the index of the nearest number in the code table. Two codes share a byte, the first in the high nibble.
"""

import torch
from torch import Tensor

from .codes import code_for

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SMALLEST_ABSMAX = 1e-38  # floor for the divisor, so that a block of zeros divides by something


def quantize(weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantise a floating-point tensor of any shape to NF4 or FP4.

    Returns (packed, absmax): packed uint8 [(n + 1) // 2, 1], absmax fp32 [ceil(n / blocksize)], n the number of values.
    fp16, bf16 and fp64 values are converted to fp32 first. ValueError for a block size that is not a power of two from 32
    to 4096, an unknown quant_type, a tensor that is not floating point, and for NaN or Inf: one would spoil its block.
    """
    check_format(quant_type, blocksize)
    if not weight.is_floating_point():
        raise ValueError(f"only floating-point tensors can be quantised, got {weight.dtype}")
    packed, absmax = quantize_reference(weight.detach(), quant_type, blocksize)
    _check_finite(weight, absmax, blocksize)
    return packed, absmax


def quantize_reference(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """The definition, in fp32 on any device. Tests hold every other path to this one."""
    scaled, absmax = _scale_blocks(weight.reshape(-1).float(), blocksize)
    codes = nearest_code(scaled, code_for(quant_type, weight.device))
    if codes.numel() % 2:  # the padding nibble encodes 0.0
        codes = torch.cat([codes, nearest_code(scaled.new_zeros(1), code_for(quant_type, weight.device))])
    return (codes[0::2] << 4 | codes[1::2]).unsqueeze(1), absmax


def nearest_code(values: Tensor, code: Tensor) -> Tensor:
    """Index (uint8) of the table entry nearest to each fp32 value; exactly between two, the lower entry wins."""
    ascending, order = code.sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(values, midpoints)]


def _scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Values [n] divided by their block's absmax, and the absmax [ceil(n / blocksize)].

    Whole blocks multiply by the reciprocal, a short last block divides, and only the latter stores the floored absmax:
    differences of one rounding that decide ties, kept because bitsandbytes' bytes are the format.
    """
    full = values.numel() // blocksize * blocksize
    blocks, rest = values[:full].view(-1, blocksize), values[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax, scaled = torch.cat([absmax, last.view(1)]), torch.cat([scaled, rest / last])
    return scaled, absmax


def check_format(quant_type: str, blocksize: int) -> None:
    """ValueError unless the code and the block size are ones the format knows."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be a power of two from 32 to 4096, got {blocksize!r}")


def _check_finite(weight: Tensor, absmax: Tensor, blocksize: int) -> None:
    finite = torch.isfinite(absmax)  # NaN and Inf always reach their block's absmax
    if not bool(finite.all()):
        block = int((~finite).nonzero()[0])
        where = weight.reshape(-1)[block * blocksize : (block + 1) * blocksize].float()
        first = block * blocksize + int((~torch.isfinite(where)).nonzero()[0])
        raise ValueError(
            f"a weight to quantise must be finite in fp32, got {float(weight.reshape(-1)[first])} at flat index {first} of "
            f"a {tuple(weight.shape)} tensor ({int((~finite).sum())} of {finite.numel()} blocks affected); repair or skip it"
        )
