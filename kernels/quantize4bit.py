"""Weights -> 4-bit codes and a scale for each block, in bitsandbytes' layout, byte for byte.

The weight is flattened row by row and cut into blocks; each block is divided by its largest magnitude (absmax), and
every value becomes the index of the nearest number in the code table.

Finding the nearest of sixteen by binary search mispredicts at every branch. The CPU path takes the upper half of the
fp32 pattern (sign, exponent, seven bits of mantissa) as a table index: at most one midpoint of the code lies among
the values that share such a pattern, so one table gives the midpoint, one comparison the side, and a second table the
code. Elsewhere the definition does: on a GPU it outruns any disk that a weight comes from.
"""

from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockwise import NESTED_BLOCKSIZE, quantize_absmax
from .codes import code_midpoints
from .dispatch import path_for
from .weight4bit import SMALLEST_ABSMAX, Weight4bit, check_format, stored_shapes

CHUNK = 1 << 18  # values at a time on a CPU: 1 MB of fp32, in cache from step to step; a multiple of every block size
LARGE_CHUNK = 1 << 22  # values at a time elsewhere, at some 45 bytes each: fewer would not pay for their launches


def quantize(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> Weight4bit:
    """Quantise a floating-point tensor of any shape to NF4 or FP4; with `double_quant` its scales to 8 bits too.

    fp16, bf16 and fp64 values are converted to fp32 first. ValueError for a block size that is not a power of two from
    32 to 4096, an unknown quant_type, a tensor that is not floating point, and for NaN or Inf."""
    check_format(quant_type, blocksize)
    if not weight.is_floating_point():
        raise ValueError(f"only floating-point tensors can be quantised, got {weight.dtype}")
    weight = weight.detach()
    graph = weight.is_meta or torch.compiler.is_compiling() or type(weight) is not Tensor  # such as a fake tensor
    quantized = _in_graph if graph else _stored  # the call of an op imports sympy, 117 MB
    packed, absmax, *nested = quantized(weight, quant_type, blocksize, double_quant)
    nested_absmax, offset = nested or (None, None)
    return Weight4bit(packed, absmax, nested_absmax, offset, tuple(weight.shape), quant_type, blocksize)


def _stored(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> list[Tensor]:
    bytes_, blocks = stored_shapes(tuple(weight.shape), blocksize)
    packed = torch.empty(bytes_, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    flat, codes, scales = weight.reshape(-1), packed.view(-1), absmax.view(-1)
    pack, chunk = (_pack_by_pattern, CHUNK) if path_for(flat) == "cpu" else (pack_reference, LARGE_CHUNK)
    for start in range(0, flat.numel(), chunk):
        scaled, own = _scale_blocks(flat[start : start + chunk].float(), blocksize)
        if scaled.numel() % 2:  # the padding nibble encodes 0.0
            scaled = F.pad(scaled, (0, 1))
        pack(scaled, quant_type, codes[start // 2 : (start + chunk) // 2])
        scales[start // blocksize : (start + chunk) // blocksize] = own
    _check_finite(weight, scales, blocksize)
    return [packed, *(quantize_absmax(absmax) if double_quant else [absmax])]


_in_graph = torch.library.custom_op("fourbit::quantize4bit", _stored, mutates_args=())  # one node for a compiler


@_in_graph.register_fake
def _(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> list[Tensor]:
    bytes_, blocks = stored_shapes(tuple(weight.shape), blocksize)
    sizes = [bytes_, blocks, (-(-prod(blocks) // NESTED_BLOCKSIZE),), (1,)][: 4 if double_quant else 2]
    types = torch.uint8, torch.uint8 if double_quant else torch.float32, torch.float32, torch.float32
    return [weight.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, types, strict=False)]


def pack_reference(scaled: Tensor, quant_type: str, packed: Tensor) -> None:
    """The definition: the code nearest to each scaled value, two to a byte of `packed`. Others are held to this one."""
    midpoints, order = code_midpoints(quant_type, scaled.device)
    codes = order[torch.bucketize(scaled, midpoints)]  # on a midpoint the lower value wins
    packed.copy_(codes[0::2] << 4 | codes[1::2])


def _pack_by_pattern(scaled: Tensor, quant_type: str, packed: Tensor) -> None:
    midpoints, high, low = _pattern_tables(quant_type)
    # twice the pattern: even entries of the tables stand for "up to the midpoint", odd ones for "above"
    index = (scaled.view(torch.int32) >> 15).bitwise_and_(-2).add_(1 << 16)
    index += scaled > torch.index_select(midpoints, 0, index)
    torch.index_select(high, 0, index[0::2], out=packed)
    packed |= torch.index_select(low, 0, index[1::2])


@cache
def _pattern_tables(quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """(midpoint fp32, code << 4 uint8, code uint8), each [131072]: two entries for every upper half of an fp32 pattern.

    Patterns ascend as int16, so those of negative numbers come first. Where a pattern's values have one code, both its
    entries do. What stands at the patterns of NaN and Inf does not matter: they are refused."""
    midpoints, order = code_midpoints(quant_type)
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([patterns, patterns | 0xFFFF]).view(torch.float32)  # of the values that share a pattern
    below, above = torch.bucketize(ends, midpoints).sort(dim=0).values
    codes = order[torch.stack([below, above], dim=1)].view(-1)
    return midpoints[below.clamp(max=14)].repeat_interleave(2), codes << 4, codes


def _scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Values [n] divided by their block's absmax, and the absmax [ceil(n / blocksize)].

    Whole blocks multiply by the reciprocal, a short last block divides, and only the latter stores the floored absmax:
    roundings that decide ties, and bitsandbytes' bytes are the format."""
    full = values.numel() // blocksize * blocksize
    blocks, rest = values[:full].view(-1, blocksize), values[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax, scaled = torch.cat([absmax, last.view(1)]), torch.cat([scaled, rest / last])
    return scaled, absmax


def _check_finite(weight: Tensor, absmax: Tensor, blocksize: int) -> None:
    bad = (~torch.isfinite(absmax)).nonzero()  # NaN and Inf always reach their block's absmax
    if len(bad):
        start = int(bad[0]) * blocksize
        block = weight.detach().reshape(-1)[start : start + blocksize]
        i = int((~torch.isfinite(block.float())).nonzero()[0])
        raise ValueError(
            f"a weight to quantise must be finite in fp32, got {float(block[i])} at flat index {start + i} of a "
            f"{tuple(weight.shape)} tensor ({len(bad)} of {absmax.numel()} blocks affected); repair or skip it"
        )
