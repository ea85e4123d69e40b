"""4-bit codes -> dense values on CUDA in one launch, scales of double quantisation included.

What it would run out of first is instructions and cache ports. Each thread takes words of packed bytes, coalesced.
Every byte is the index of a 2 KB table, which stays in the L1 cache, of the two fp32 values a byte stands for; a word's
8 bf16 values leave as one 16-byte store. The fp32 value times the fp32 scale, rounded once, is the reference's result
bit for bit. Nothing may be fused for that: the scale is map[code] * nested_absmax + offset with two roundings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import dynamic_code, pair_table
from .launch import is_fake, launch
from .weight4bit import Weight4bit

WORD = 8  # values of an int32 word
TILE, WARPS = 256, 2  # words that one program decodes: 32 values to a thread


def decode_words(flat: Tensor, packed: Tensor, weight: Weight4bit) -> bool:
    """flat [n] becomes the weight, whose bytes are `packed`; False, with nothing done, if they are no whole words."""
    width = flat.numel() // WORD
    aligned = is_fake(packed) or packed.data_ptr() % 4 == 0
    if flat.numel() % WORD or packed.storage_offset() % 4 or not aligned:
        return False
    if width == 0:
        return True
    nested = weight.nested_absmax
    launch(dequantize4bit_kernel, (triton.cdiv(width, TILE),))(
        flat,
        packed.view(torch.int32),
        weight.absmax.reshape(-1).contiguous(),  # a view of every other element, say, is still one when it is flat
        None if nested is None else nested.reshape(-1).contiguous(),
        weight.nested_offset,
        None if nested is None else dynamic_code(True, flat.device),
        pair_table(weight.quant_type, torch.float32, flat.device),
        width,
        TILE=TILE,
        BITS=(weight.blocksize // WORD).bit_length() - 1,
        WHOLE=width % TILE == 0,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return True


# `packed` counts as aligned to no more than a word, so that a thread loads one word at a time, neighbours side by side:
# the layout in which a word's values are stored, and no exchange between threads.
@triton.jit(do_not_specialize_on_alignment=["packed"])
def dequantize4bit_kernel(
    out,
    packed,  # int32 words of 8 values
    absmax,  # fp32 [blocks], or uint8 with the three that follow; else those are None
    nested_absmax,
    offset,
    scale_map,
    pairs,  # int64 [256]
    width,  # words
    TILE: tl.constexpr,
    BITS: tl.constexpr,  # the exponent of the words in a block
    WHOLE: tl.constexpr,  # all tiles are full: no masks
):
    """The dense values of a tile of words of codes, each times its block's scale, rounded once."""
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    inside = None if WHOLE else i < width - first
    words = tl.load(packed + first + i, mask=inside)
    start = first >> BITS  # a tile begins with a block, or lies in one
    scale = tl.load(absmax + start + (i >> BITS), mask=inside)
    if nested_absmax is not None:  # 256 blocks are whole tiles, so a tile has one
        nested = tl.load(nested_absmax + (start >> 8))
        scale = tl.load(scale_map + scale.to(tl.int32)) * nested + tl.load(offset)
    p0, p1 = tl.load(pairs + (words & 255)), tl.load(pairs + (words >> 8 & 255))
    p2, p3 = tl.load(pairs + (words >> 16 & 255)), tl.load(pairs + (words >> 24 & 255))
    high = tl.join(tl.join(_high(p0, scale), _high(p2, scale)), tl.join(_high(p1, scale), _high(p3, scale)))
    low = tl.join(tl.join(_low(p0, scale), _low(p2, scale)), tl.join(_low(p1, scale), _low(p3, scale)))
    values = tl.reshape(tl.join(high, low), [TILE, 8]).to(out.dtype.element_ty)
    at = i[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + first * 8 + at, values, mask=None if WHOLE else inside[:, None])  # type: ignore[index]  # a mask


@triton.jit
def _high(pair, scale):
    """The first value of a byte, from the low half of its pair."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True) * scale


@triton.jit
def _low(pair, scale):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale
