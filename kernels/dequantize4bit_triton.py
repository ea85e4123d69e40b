"""4-bit codes -> dense values on CUDA in one launch, scales of double quantisation included.

The kernel has to move little more than its bytes, and what it would run out of first is instructions and cache ports.
Each thread takes words of packed bytes, coalesced. Every byte is the index of a 2 KB table, which stays in the L1
cache, of the two fp32 values a byte stands for; a word's 8 bf16 values leave as one 16-byte store. The fp32 value
times the fp32 scale, rounded once, is the reference's result bit for bit. Nothing may be fused for that
(enable_fp_fusion=False): the scale is map[code] * nested_absmax + offset with two roundings.

Matrices whose rows are whole words take this way, also transposed; all others take `_decode_values`, value by value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import code_for, dynamic_code, pair_table
from .dispatch import on_device
from .weight4bit import Weight4bit

TILE, TILE_WARPS = 2048, 2  # values of a row that one program decodes: 32 to a thread
SQUARE, SQUARE_WARPS = (128, 16), 8  # rows and words of a tile that is transposed: 64 bytes of a row read, 256 written
VALUES = (16, 64)  # rows and columns of a tile of the slow way
FARTHEST = 1 << 21  # row strides below it keep offsets inside a tile in 32 bits and a grid in its limits


def decode_into(out: Tensor, weight: Weight4bit, transpose: bool = False) -> None:
    """out [rows, columns], last stride 1, becomes the weight in out's dtype; or, [columns, rows], its transposed.

    Nothing is checked but which kernel fits. The result is the reference's, bit for bit.
    """
    if out.numel() == 0:
        return
    rows, columns = weight.rows, weight.columns
    if not transpose and out.is_contiguous():
        rows, columns = 1, rows * columns
    packed = _flat(weight.packed)
    word = 8 if out.element_size() == 2 else 4  # values that make 16 bytes
    near = max(columns, out.stride(0)) < FARTHEST or (rows == 1 and not transpose)
    by_words = columns % word == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0 and near
    with on_device(out):
        if not by_words:
            _launch_values(out, packed, weight, rows, columns, transpose)
        elif transpose:
            _launch_turned(out, packed, weight, rows, columns, word)
        else:
            _launch_words(out, packed, weight, rows, columns, word)


def _launch_words(out: Tensor, packed: Tensor, weight: Weight4bit, rows: int, columns: int, word: int) -> None:
    width, tile = columns // word, TILE // word
    across = triton.cdiv(width, tile)
    # The second number of a grid is limited to 65,535, which a flat weight has too many tiles for and a row never.
    _decode_words[(across, 1) if rows == 1 else (rows, across)](
        out,
        packed.view(torch.int32 if word == 8 else torch.int16),
        *_scales(weight),
        pair_table(weight.quant_type, torch.float32, out.device),
        *(width, out.stride(0)),
        TILE=tile,
        WORD=word,
        BITS=_bits(weight, word),
        ONE_ROW=rows == 1,
        ALIGNED=rows == 1 or columns % weight.blocksize == 0,
        WHOLE=width % tile == 0,
        num_warps=TILE_WARPS,
        enable_fp_fusion=False,
    )


def _launch_turned(out: Tensor, packed: Tensor, weight: Weight4bit, rows: int, columns: int, word: int) -> None:
    (high, wide), width = SQUARE, columns // word
    _decode_turned[(triton.cdiv(rows, high), triton.cdiv(width, wide))](
        out,
        packed.view(torch.int32 if word == 8 else torch.int16),
        *_scales(weight),
        pair_table(weight.quant_type, torch.float32, out.device),
        *(rows, width, out.stride(0)),
        HIGH=high,
        WIDE=wide,
        WORD=word,
        BITS=_bits(weight, word),
        WHOLE=width % wide == 0 and rows % high == 0,
        num_warps=SQUARE_WARPS,
        enable_fp_fusion=False,
    )


def _launch_values(out: Tensor, packed: Tensor, weight: Weight4bit, rows: int, columns: int, transpose: bool) -> None:
    across = triton.cdiv(columns, VALUES[1])
    steps = (1, out.stride(0)) if transpose else (out.stride(0), 1)
    _decode_values[(across * triton.cdiv(rows, VALUES[0]),)](
        out,
        packed,
        *_scales(weight),
        code_for(weight.quant_type, out.device),
        *(rows, columns, *steps, across),
        HIGH=VALUES[0],
        WIDE=VALUES[1],
        BITS=_bits(weight),
        num_warps=4,
        enable_fp_fusion=False,
    )


def _scales(weight: Weight4bit) -> tuple[Tensor | None, ...]:
    absmax, nested_absmax = _flat(weight.absmax), weight.nested_absmax
    if nested_absmax is None:
        return absmax, None, None, None
    return absmax, _flat(nested_absmax), weight.offset, dynamic_code(True, absmax.device)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous()  # a view of every other element, say, is still one when it is flat


def _bits(weight: Weight4bit, word: int = 1) -> int:
    """The exponent of the block size, a power of two, counted in words."""
    return (weight.blocksize // word).bit_length() - 1


# `packed` counts as aligned to no more than a word, so that a thread loads one word at a time, neighbours side by side:
# the layout in which a word's values are stored, and no exchange between threads.
@triton.jit(do_not_specialize_on_alignment=["packed"])
def _decode_words(
    out,
    packed,  # int32 words of 8 values, or int16 words of 4
    absmax,  # fp32 [blocks], or uint8 with the three that follow; else those are None
    nested_absmax,
    offset,
    scale_map,
    pairs,  # int64 [256]
    width,  # words in a row
    stride,
    TILE: tl.constexpr,
    WORD: tl.constexpr,
    BITS: tl.constexpr,  # of the words in a block
    ONE_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows begin with a block
    WHOLE: tl.constexpr,  # rows are whole tiles: no masks
):
    row = 0 if ONE_ROW else tl.program_id(0)
    column = tl.program_id(0 if ONE_ROW else 1) * TILE
    first = tl.cast(row, tl.int64) * width + column
    i = tl.arange(0, TILE)
    inside = None if WHOLE else i < width - column
    words = tl.load(packed + first + i, mask=inside).to(tl.int32)
    start = (first >> BITS).to(tl.int32)
    into = 0 if ALIGNED else (first & ((1 << BITS) - 1)).to(tl.int32)  # words of the first block before the tile
    nested = None
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + (start >> 8))
        if not (ONE_ROW or (ALIGNED and WHOLE)):  # the tile may reach into the next group of 256 blocks, not farther
            reach = ((256 - (start & 255)) << BITS) - into
            after = tl.load(nested_absmax + (start >> 8) + 1, mask=reach < width - column)  # there is one
            nested = tl.where(i < reach, nested, after)
    scale = _scale(absmax + start, i + into >> BITS, inside, nested, offset, scale_map)
    values = _decode(words, scale, pairs, WORD).to(out.dtype.element_ty)  # [TILE, WORD]
    target = out + (tl.cast(row, tl.int64) * stride + tl.cast(column, tl.int64) * WORD)
    v = i[:, None] * WORD + tl.arange(0, WORD)[None, :]
    tl.store(target + v, values, mask=None if WHOLE else inside[:, None])  # type: ignore[index]


@triton.jit(do_not_specialize_on_alignment=["packed"])
def _decode_turned(
    out,
    packed,
    absmax,
    nested_absmax,
    offset,
    scale_map,
    pairs,
    rows,
    width,
    stride,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    WORD: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, column = tl.program_id(0) * HIGH, tl.program_id(1) * WIDE
    first = tl.cast(row, tl.int64) * width + column
    t = tl.arange(0, HIGH * WIDE)
    i = t // WIDE * width + t % WIDE
    inside = None if WHOLE else (t // WIDE < rows - row) & (t % WIDE < width - column)
    words = tl.load(packed + first + i, mask=inside).to(tl.int32)
    start = (first >> BITS).to(tl.int32)
    block = i + (first & ((1 << BITS) - 1)).to(tl.int32) >> BITS
    nested = None
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + (start + block >> 8), mask=inside)
    scale = _scale(absmax + start, block, inside, nested, offset, scale_map)
    values = _decode(words, scale, pairs, WORD).to(out.dtype.element_ty)
    turned = tl.trans(tl.reshape(values, [HIGH, WIDE * WORD]))
    r = tl.arange(0, HIGH)[None, :]
    v = tl.arange(0, WIDE * WORD)[:, None]
    target = out + (tl.cast(column, tl.int64) * WORD * stride + row) + (v * stride + r)
    tl.store(target, turned, mask=None if WHOLE else (r < rows - row) & (v < (width - column) * WORD))


@triton.jit
def _decode(words, scale, pairs, WORD: tl.constexpr):
    """fp32 [..., WORD] from words [...] and the scale of each."""
    p0 = tl.load(pairs + (words & 255))
    p1 = tl.load(pairs + (words >> 8 & 255))
    if WORD == 8:
        p2 = tl.load(pairs + (words >> 16 & 255))
        p3 = tl.load(pairs + (words >> 24 & 255))
        high = tl.join(tl.join(_high(p0, scale), _high(p2, scale)), tl.join(_high(p1, scale), _high(p3, scale)))
        low = tl.join(tl.join(_low(p0, scale), _low(p2, scale)), tl.join(_low(p1, scale), _low(p3, scale)))
    else:
        high = tl.join(_high(p0, scale), _high(p1, scale))
        low = tl.join(_low(p0, scale), _low(p1, scale))
    return tl.reshape(tl.join(high, low), words.shape + [WORD])  # noqa: RUF005


@triton.jit
def _high(pair, scale):
    """The first value of a byte, from the low half of its pair."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True) * scale


@triton.jit
def _low(pair, scale):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale


@triton.jit
def _scale(absmax, block, inside, nested, offset, scale_map):
    """fp32 scales of the blocks, from their own numbers or from codes and their nested scales."""
    scale = tl.load(absmax + block, mask=inside)
    if nested is not None:
        scale = tl.load(scale_map + scale.to(tl.int32)) * nested + tl.load(offset)
    return scale


@triton.jit
def _decode_values(
    out,
    packed,  # uint8
    absmax,
    nested_absmax,
    offset,
    scale_map,
    code,  # fp32 [16]
    rows,
    columns,
    row_step,  # strides of out
    column_step,
    across,  # tiles side by side
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,  # of the values in a block
):
    r = (tl.program_id(0) // across).to(tl.int64) * HIGH + tl.arange(0, HIGH)[:, None]
    c = (tl.program_id(0) % across).to(tl.int64) * WIDE + tl.arange(0, WIDE)[None, :]
    inside = (r < rows) & (c < columns)
    value = r * columns + c
    byte = tl.load(packed + (value >> 1), mask=inside, other=0).to(tl.int32)
    nibble = tl.where(value % 2 == 0, byte >> 4, byte & 15)
    block = value >> BITS
    nested = None
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + (block >> 8), mask=inside)
    values = tl.load(code + nibble) * _scale(absmax, block, inside, nested, offset, scale_map)
    tl.store(out + r * row_step + c * column_step, values.to(out.dtype.element_ty), mask=inside)
