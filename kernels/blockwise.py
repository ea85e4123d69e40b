"""8-bit blockwise quantisation with a 256-entry table, and its use on NF4's own scales (double quantisation)."""

from functools import cache

import torch
from torch import Tensor

from .codes import dynamic_code, midpoints
from .dispatch import path_for

NESTED_BLOCKSIZE = 256
CHUNK = 1 << 17  # values at a time: fewer, and calls of PyTorch cost more than their work; more, and caches overflow
ONE_CODE = 1 << 17  # what one code more adds to a sum with `_carries`: twice the patterns that share an upper half


def quantize_blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The nearest entry of code * absmax for every value, exactly: (codes uint8 like values, absmax fp32 [blocks]).

    `code` is ascending fp32; exactly between two entries the lower one wins."""
    flat = values.detach().reshape(-1).float()
    if missing := -flat.numel() % blocksize:
        flat = torch.nn.functional.pad(flat, (0, missing))
    blocks = flat.view(-1, blocksize)
    signed = next((s for s in (True, False) if code is dynamic_code(s)), None)
    quick = path_for(flat) == "cpu" and signed is not None
    codes, absmax = _quantize_by_carry(blocks, bool(signed)) if quick else quantize_reference(blocks, code)
    codes = codes.view(-1)[: values.numel()].view(values.shape)
    return (codes.clone() if missing else codes), absmax  # not a view of more: files refuse that


def quantize_reference(blocks: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, on fp32 [b, blocksize]: (codes uint8 [b, blocksize], absmax fp32 [b]).

    The comparison runs in float64, where the quotient of two fp32 numbers cannot round onto a midpoint of the table,
    so no value takes the farther code."""
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks.double() / torch.where(absmax > 0, absmax, 1).double().unsqueeze(1)
    return torch.bucketize(scaled, midpoints(code)).to(torch.uint8), absmax


def _quantize_by_carry(blocks: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The CPU path of quantize_reference, for the dynamic maps: in fp32, one look-up and one addition give the code.

    A quotient rounded to fp32 is on the same side of a midpoint as the exact one, unless it is one of the two fp32
    numbers that enclose the midpoint. Sums show that too, and blocks with such a quotient (a few in a thousand) are
    done again by the definition; so are those that are not finite, or have a negative value but no code for it."""
    codes = torch.empty_like(blocks, dtype=torch.uint8)
    rests = torch.empty(len(blocks), dtype=torch.int32, device="cpu")
    high, low = blocks.amax(dim=1), blocks.amin(dim=1)
    absmax = torch.maximum(high, -low).abs_()  # no -0.0
    step = max(CHUNK // blocks.shape[1], 1)
    work = torch.empty(3, min(step, len(blocks)) * blocks.shape[1], dtype=torch.int32, device="cpu")
    for first in range(0, len(blocks), step):
        part = slice(first, first + step)
        _codes_by_carry(blocks[part], absmax[part], signed, codes[part], rests[part], work)
    sure = (rests > 1).logical_and_(absmax < torch.inf)
    if not signed:
        sure.logical_and_(low >= 0)
    if not sure.all():
        again = sure.logical_not_().nonzero().view(-1)
        codes[again] = quantize_reference(blocks[again], dynamic_code(signed))[0]
    return codes, absmax


def _codes_by_carry(blocks: Tensor, absmax: Tensor, signed: bool, codes: Tensor, rests: Tensor, work: Tensor) -> None:
    """One chunk; `rests` int32 [b] gets the least rest of each block: 0 or 1 where a code is unsure."""
    bits, other, sums = work[:, : blocks.numel()]
    torch.div(blocks, absmax.unsqueeze(1), out=bits.view(torch.float32).view(blocks.shape))  # 0 / 0: code of 0
    _ascend(bits, signed, other)
    torch.bitwise_right_shift(bits, 16, out=other)
    torch.index_select(_carries(signed), 0, other, out=sums)
    sums += bits
    torch.bitwise_right_shift(sums, 17, out=other)
    codes.copy_(other.view(blocks.shape))
    sums &= ONE_CODE - 1
    torch.amin(sums.view(blocks.shape), dim=1, out=rests)


def _ascend(bits: Tensor, signed: bool, work: Tensor) -> None:
    """Patterns of fp32 in place: without their sign, and if `signed` those of negative numbers complemented.

    So numbers from -1 to 1 stay different, and those of one upper half are in the order of their values."""
    if signed:
        bits ^= torch.bitwise_right_shift(bits, 31, out=work)
    else:
        bits &= 0x7FFFFFFF


@cache
def _carries(signed: bool) -> Tensor:
    """int32 [32768]: for each upper half of a pattern that `_ascend` made, what turns the pattern into its code.

    Pattern + entry is code * ONE_CODE + rest. Beyond the midpoint that a half may contain, the pattern's lower half
    carries over into the code. For the two patterns that enclose a midpoint, and only these, the rest is 0 or 1."""
    halfway = midpoints(dynamic_code(signed))
    halves = torch.arange(1 << 15, dtype=torch.int32, device="cpu") << 16
    negative = (halves > 0x40000000) & signed  # positive numbers up to 1 end at 0x3F800000
    first = torch.where(negative, ~halves, halves).view(torch.float32)  # the lowest number of each half
    lowest = torch.bucketize(first.double().nan_to_num(0), halfway)
    rests = torch.full((1 << 15,), 2, device="cpu")
    below, above = _enclosing(halfway)
    for bits in (below, above):
        _ascend(bits, signed, torch.empty_like(bits))
    rests[above >> 16] = 1  # the first number of its half, or else overwritten:
    rests[below >> 16] = ONE_CODE - (below & 0xFFFF).long()
    return (lowest * ONE_CODE + rests - halves).to(torch.int32)


def _enclosing(midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Patterns of the largest fp32 that is not above each midpoint, and of the next one."""
    nearest = midpoints.float()
    down, up = (torch.full_like(nearest, end) for end in (-torch.inf, torch.inf))
    below = torch.where(nearest > midpoints, torch.nextafter(nearest, down), nearest)
    return below.view(torch.int32), torch.nextafter(below, up).view(torch.int32)


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """code[codes] * absmax of the block, fp32, in the shape of codes. ValueError if the scales are not one a block."""
    if absmax.numel() != (blocks := -(-codes.numel() // blocksize)):
        raise ValueError(f"{codes.numel()} codes in blocks of {blocksize} need {blocks} scales, got {absmax.numel()}")
    values = torch.index_select(code, 0, codes.reshape(-1).int())
    whole = values.numel() - values.numel() % blocksize
    if whole < values.numel():
        values[whole:].mul_(absmax[-1])
        values[:whole].view(-1, blocksize).mul_(absmax[:-1].unsqueeze(1))
    else:
        values.view(-1, blocksize).mul_(absmax.unsqueeze(1))
    return values.view(codes.shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation (QLoRA, arXiv 2305.14314, section 3) of b fp32 scales in any shape.

    Returns (codes uint8 like absmax, nested_absmax fp32 [ceil(b / 256)], offset fp32 [1]). The offset is the mean,
    summed in float64: scales are all positive, and would else waste half the codes of the signed map."""
    offset = absmax.double().mean().float().view(1) if absmax.numel() else absmax.new_zeros(1)
    codes, nested = quantize_blockwise(absmax - offset, dynamic_code(True, absmax.device), NESTED_BLOCKSIZE)
    return codes, nested, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The scales back, fp32 in the shape of codes: map[code] * nested_absmax + offset, each step rounded to fp32."""
    return dequantize_blockwise(codes, nested_absmax, dynamic_code(True, codes.device), NESTED_BLOCKSIZE).add_(offset)
