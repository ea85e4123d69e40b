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

TILE = (4, 128)  # rows, and words in a row, of what one program decodes in place
SQUARE = (64, 16)  # the same for a transposed matrix: 64 bytes of a row are read, 128 (bf16) written
VALUES = (16, 64)  # rows and columns of a tile of the slow way
FARTHEST = 1 << 24  # from this row stride on, offsets inside a tile do not fit 32 bits


def decode_into(out: Tensor, weight: Weight4bit, transpose: bool = False) -> None:
    """out [rows, columns], last stride 1, becomes the weight in out's dtype; or, [columns, rows], its transposed.

    Nothing is checked but which kernel fits. The result is the reference's, bit for bit.
    """
    if out.numel() == 0:
        return
    rows, columns = weight.rows, weight.columns
    if not transpose and out.is_contiguous():
        rows, columns = 1, rows * columns
    packed = weight.packed.reshape(-1)
    word = 8 if out.element_size() == 2 else 4  # values that make 16 bytes
    near = rows == 1 or max(columns, out.stride(0)) < FARTHEST
    by_words = columns % word == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0 and near
    launch = _launch_words if by_words else _launch_values
    with on_device(out):
        launch(out, packed, weight, rows, columns, word, transpose)


def _launch_words(
    out: Tensor, packed: Tensor, weight: Weight4bit, rows: int, columns: int, word: int, transpose: bool
) -> None:
    high, wide = SQUARE if transpose else TILE
    width = columns // word
    flat = rows == 1 and not transpose  # then rows may be as wide as a tile, known when compiling: it costs the least
    across = 1 if flat else triton.cdiv(width, wide)
    down = triton.cdiv(width, high * wide) if flat else triton.cdiv(rows, high)
    _decode_words[(across * down,)](
        out,
        packed.view(torch.int32 if word == 8 else torch.int16),
        *_scales(weight),
        pair_table(weight.quant_type, torch.float32, out.device),
        *(rows, width, out.stride(0), across),
        HIGH=high,
        WIDE=wide,
        WORD=word,
        BITS=_bits(weight),
        FLAT=flat,
        WHOLE=width % (high * wide) == 0 if flat else rows % high == 0 and width % wide == 0,
        TRANSPOSE=transpose,
        num_warps=8 if transpose else 4,
        enable_fp_fusion=False,
    )


def _launch_values(
    out: Tensor, packed: Tensor, weight: Weight4bit, rows: int, columns: int, word: int, transpose: bool
) -> None:
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
    absmax, nested_absmax = weight.absmax.reshape(-1), weight.nested_absmax
    if nested_absmax is None:
        return absmax, None, None, None
    return absmax, nested_absmax.reshape(-1), weight.offset, dynamic_code(True, absmax.device)


def _bits(weight: Weight4bit) -> int:
    return weight.blocksize.bit_length() - 1


@triton.jit
def _decode_words(  # type: ignore[no-untyped-def]
    out,
    packed,  # int32 words of 8 values, or int16 words of 4
    absmax,  # fp32 [blocks], or uint8 with the three that follow; else those are None
    nested_absmax,
    offset,
    scale_map,
    pairs,  # int64 [256]
    rows,
    width,  # words in a row, or in all if FLAT
    stride,
    across,  # programs side by side
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    WORD: tl.constexpr,
    BITS: tl.constexpr,  # of the block size
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile hangs over: no masks
    TRANSPOSE: tl.constexpr,
):
    row = tl.program_id(0) // across * HIGH
    column = tl.program_id(0) % across * WIDE
    r = tl.arange(0, HIGH)[:, None]
    c = tl.arange(0, WIDE)[None, :]
    if FLAT:
        first = row.to(tl.int64) * WIDE  # word of the tile
        i = r * WIDE + c
        left = tl.minimum(width - first, HIGH * WIDE).to(tl.int32)
    else:
        first = row.to(tl.int64) * width + column
        i = r * width + c
    # A word to a thread, the layout that its values are stored in: no exchange between threads.
    i = tl.max_contiguous(i, [1, 1])
    if WHOLE:
        inside = None
    elif FLAT:
        inside = i < left
    else:
        inside = (r < rows - row) & (c < width - column)
    words = tl.load(packed + first + i, mask=inside).to(tl.int32)
    value = first * WORD
    within = (value & ((1 << BITS) - 1)).to(tl.int32)  # the tile's first value in its block
    scale = _scale(absmax, nested_absmax, offset, scale_map, value >> BITS, (within + i * WORD) >> BITS, inside, FLAT)
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
    values = tl.reshape(tl.join(high, low), [HIGH, WIDE * WORD]).to(out.dtype.element_ty)
    if TRANSPOSE:
        v = tl.arange(0, WIDE * WORD)[:, None]
        x = tl.arange(0, HIGH)[None, :]
        target = out + (column.to(tl.int64) * WORD * stride + row) + (v * stride + x)
        if WHOLE:
            tl.store(target, tl.trans(values))
        else:
            tl.store(target, tl.trans(values), mask=(x < rows - row) & (v < (width - column) * WORD))
    else:
        v = tl.arange(0, WIDE * WORD)[None, :]
        if FLAT:
            target = out + first * WORD + (r * (WIDE * WORD) + v)
        else:
            target = out + (row.to(tl.int64) * stride + column * WORD) + (r * stride + v)
        if WHOLE:
            tl.store(target, values)
        elif FLAT:
            tl.store(target, values, mask=r * (WIDE * WORD) + v < left * WORD)
        else:
            tl.store(target, values, mask=(r < rows - row) & (v < (width - column) * WORD))


@triton.jit
def _high(pair, scale):  # type: ignore[no-untyped-def]
    """The first value of a byte, from the low half of its pair."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True) * scale


@triton.jit
def _low(pair, scale):  # type: ignore[no-untyped-def]
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scale


@triton.jit
def _scale(absmax, nested_absmax, offset, scale_map, first, block, inside, ONE_GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 scales of blocks first + block. ONE_GROUP: all of them share the nested scale of the first."""
    if nested_absmax is None:
        scale = tl.load(absmax + first + block, mask=inside)
    else:
        code = tl.load(absmax + first + block, mask=inside).to(tl.int32)
        if ONE_GROUP:
            nested = tl.load(nested_absmax + (first >> 8))
        else:
            nested = tl.load(nested_absmax + (first >> 8) + ((first & 255).to(tl.int32) + block >> 8), mask=inside)
        scale = tl.load(scale_map + code) * nested + tl.load(offset)
    return scale


@triton.jit
def _decode_values(  # type: ignore[no-untyped-def]
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
    across,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
):
    r = (tl.program_id(0) // across).to(tl.int64) * HIGH + tl.arange(0, HIGH)[:, None]
    c = (tl.program_id(0) % across).to(tl.int64) * WIDE + tl.arange(0, WIDE)[None, :]
    inside = (r < rows) & (c < columns)
    value = r * columns + c
    byte = tl.load(packed + (value >> 1), mask=inside, other=0).to(tl.int32)
    nibble = tl.where(value % 2 == 0, byte >> 4, byte & 15)
    scale = _scale(absmax, nested_absmax, offset, scale_map, value >> BITS, 0, inside, False)
    values = tl.load(code + nibble) * scale
    tl.store(out + r * row_step + c * column_step, values.to(out.dtype.element_ty), mask=inside)
