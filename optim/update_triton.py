"""The update of all parameters of one dtype and width of state in one launch: AdamW or Lion.

A program takes a part of one chunk: it finds its parameter and gradient by their addresses, its state by its offset,
and does the whole step in registers. 8-bit states take the exactly nearest code: arithmetic on the map's rule
(codes.dynamic_code) finds the nearest border between two codes, and one comparison in float64, where border times scale
is exact, decides the side. A search among the borders would read eight of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .state import BLOCK, CHUNK
from .update import ROUNDING_KEY

TILE_SIZE = 2048  # elements of a program: 8 for each of its threads
TILE, TILES = tl.constexpr(TILE_SIZE), tl.constexpr(CHUNK // TILE_SIZE)
PER, KEY = tl.constexpr(BLOCK), tl.constexpr(ROUNDING_KEY)  # PER: elements that share a scale
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _name(specialization: Any) -> str:
    """What a profiler shows, such as adamw_8bit_update_kernel."""
    constants = specialization.constants  # None is one
    return f"{'lion' if constants['LION'] else 'adamw'}_{'32bit' if 'maps' in constants else '8bit'}_update_kernel"


@triton.jit(repr=_name)
def optimizer_update_kernel(
    tables, control, state, maps, rule, DTYPE: tl.constexpr, LION: tl.constexpr, ROUNDED: tl.constexpr
):  # fmt: skip
    """One tile of weights and state, after one step of the rule.

    A state is its table of chunks, where its tensors begin, and these: moments, or where there are maps, codes and
    scales of each. Weights and gradients are found by address; where nothing may change, the length is 0.
    """
    chunk, first = tl.program_id(0).to(tl.int64) // TILES, tl.program_id(0) % TILES * TILE
    addresses, where = tables[0], state[0] + 4 * chunk
    row, start = tl.load(where), tl.multiple_of(tl.load(where + 1) + first, 256)
    length = tl.minimum(tl.maximum(tl.load(where + 2) - first, 0), TILE)
    offset = tl.multiple_of(tl.load(where + 3) - state[1] + first, 256)
    p, g = tl.load(addresses + 2 * row), tl.load(addresses + 2 * row + 1)
    length = tl.where(g == 0, 0, length)
    if control is not None:
        length = tl.where(tl.load(control + 1) != 0, 0, length)
    place = p, g, start, length, offset, row
    if is_even(p | g, length):
        _update(tables, state, maps, place, rule, DTYPE, LION, ROUNDED, True)
    else:
        _update(tables, state, maps, place, rule, DTYPE, LION, ROUNDED, False)


@triton.jit
def is_even(address, length):
    """Whether a tile can be read and written 16 bytes at a time."""
    return (length % 16 == 0) & (address % 16 == 0)


@triton.jit
def at(address, start, DTYPE: tl.constexpr, EVEN: tl.constexpr):
    """The pointer to element `start`; where EVEN, the compiler learns that the address is a multiple of 16.

    It would hold a hint on the address itself for every use of it, also where that was not looked at.
    """
    if EVEN:
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16) + start
    else:
        return address.to(tl.pointer_type(DTYPE)) + start


@triton.jit
def below(i, length, EVEN: tl.constexpr):
    """i < length; where EVEN, the compiler learns that 16 divides the length."""
    if EVEN:
        return i < length // 16 * 16
    else:
        return i < length


@triton.jit
def _update(
    tables, state, maps, place, rule, DTYPE: tl.constexpr, LION: tl.constexpr, ROUNDED: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """A tile's step. Moments are fp32, or 8-bit codes where there are maps."""
    _, numbers, factors, steps = tables
    p_address, g_address, start, length, offset, row = place
    beta1, rest1, beta2, rest2, eps = rule
    i = tl.arange(0, TILE)
    mask = below(i, length, EVEN)
    p_ptr, g_ptr = at(p_address, start, DTYPE, EVEN), at(g_address, start, DTYPE, EVEN)
    p = tl.load(p_ptr + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + i, mask=mask, other=0.0).to(tl.float32) * tl.load(factors + 4 * row + 3)
    mean = _decode(state, maps, offset, length, mask, 0)
    if LION:
        p, mean = _lion(p, g, mean, row, factors, beta1, rest1, rest2)
    else:
        square = _decode(state, maps, offset, length, mask, 1)
        p, mean, square = _adamw(p, g, mean, square, row, factors, rest1, beta2, rest2, eps)
        _encode(square, state, maps, offset, length, mask, 1)
    _encode(mean, state, maps, offset, length, mask, 0)
    if ROUNDED:
        p = _rounded(p, start, row, numbers, steps, tl.float16 == DTYPE)
    tl.store(p_ptr + i, p.to(DTYPE), mask=mask)


@triton.jit
def _adamw(p, g, mean, square, row, factors, rest1, beta2, rest2, eps):
    decay, size = tl.load(factors + 4 * row), tl.load(factors + 4 * row + 1)
    correction = tl.load(factors + 4 * row + 2)
    mean = mean + (g - mean) * rest1
    square = square * beta2 + g * g * rest2
    root = tl.sqrt_rn(square) * correction + eps
    return p * decay - tl.math.div_rn(mean, root) * size, mean, square


@triton.jit
def _lion(p, g, mean, row, factors, beta1, rest1, rest2):
    decay, size = tl.load(factors + 4 * row), tl.load(factors + 4 * row + 1)
    direction = mean * beta1 + g * rest1
    step = tl.where(direction > 0, size, tl.where(direction < 0, -size, direction * 0))  # NaN stays NaN
    return p * decay - step, mean + (g - mean) * rest2


@triton.jit
def _decode(state, maps, offset, length, mask, MOMENT: tl.constexpr):
    """A tile's first (0, signed) or second (1) moment in fp32; 0 beyond the length, which no block's scale may see."""
    i, blocks = tl.arange(0, TILE), tl.arange(0, TILE // PER)
    if maps is None:
        values = tl.load(state[2 + MOMENT] + offset + i, mask=mask, other=0.0)
    else:
        code = tl.load(state[2 + 2 * MOMENT] + offset + i, mask=mask, other=0).to(tl.int32)
        scales = tl.load(state[3 + 2 * MOMENT] + offset // PER + blocks, mask=blocks * PER < length, other=0.0)
        values = tl.where(mask, tl.load(maps[MOMENT] + code) * _for_each(scales), 0.0)
    return values


@triton.jit
def _for_each(scales):
    """The scale of its block for each value. All else has one dimension: around look-ups in two, Triton moves values to
    another layout and back (3.6 where rows are contiguous, 3.9 where columns are), a fifth of all instructions.
    """
    return tl.reshape(tl.broadcast_to(scales[:, None], [TILE // PER, PER]), [TILE])


@triton.jit
def _encode(values, state, maps, offset, length, mask, MOMENT: tl.constexpr):
    """Put a tile's moment back where `_decode` took it."""
    i, blocks = tl.arange(0, TILE), tl.arange(0, TILE // PER)
    if maps is None:
        tl.store(state[2 + MOMENT] + offset + i, values, mask=mask)
    else:
        values = tl.where(mask, values, 0.0)
        largest = _largest(values)
        tl.store(state[3 + 2 * MOMENT] + offset // PER + blocks, largest, mask=blocks * PER < length)
        codes = _nearest(values, largest, maps[2 + MOMENT], MOMENT == 0)
        tl.store(state[2 + 2 * MOMENT] + offset + i, codes, mask=mask)


@triton.jit
def _largest(values):
    """The largest magnitude of each block."""
    # As integers: the order of non-negative floats, and NaN above all, so that it is not lost.
    ordered = tl.reshape(tl.abs(values).to(tl.int32, bitcast=True), [TILE // PER, PER])
    return tl.max(ordered, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(values, largest, borders, SIGNED: tl.constexpr):
    """Codes. Decade i of the map is [0.1, 1] * 10^(i - 6), in 2^i cells of equal width (2^(i + 1) if unsigned)."""
    scale = tl.where(largest > 0, largest, 1.0)
    up = tl.where(scale < 7.8886090522101181e-31, 1.2676506002282294e30, 1.0)  # 2^-100, 2^100: keeps 1 / scale finite
    relative = tl.abs(values) * _for_each(up) * _for_each(1.0 / (scale * up))
    bits = tl.maximum(relative, 1e-6).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # log10(relative) + 6.5, of which the nearest integer is the decade: the pattern as an integer is the logarithm but
    # for a cubic in the mantissa, to 2e-4. It may take a decade's end for the next one's start, which are one border.
    decade = ((0.0476370 * mantissa - 0.3166413) * mantissa + 0.6164649) * mantissa - 32.078578
    decade = decade + bits.to(tl.float32) * 3.5885571e-8
    # Where floats are as far apart as integers, adding rounds: MUFU and conversions have a quarter of the other rates.
    rounded = decade + 12582912.0  # 1.5 * 2^23
    doubled: tl.constexpr = 0 if SIGNED else 1
    # 2^decade: the integer's low bits make the exponent of a float
    cells = ((rounded.to(tl.int32, bitcast=True) << 23) + (127 + doubled << 23)).to(tl.float32, bitcast=True)
    # (relative * 10^(6 - i) - 0.1) / 0.9 * 2^i; 20.08357 is log2(10^6 / 0.9), -2.321928 is log2(2 / 10)
    slope = tl.exp2((rounded - 12582912.0) * -2.3219280948873622 + (20.083571662769224 + doubled))
    position = relative * slope - cells * 0.11111111111111111
    nearest = (tl.maximum(position, 0.0) + (cells + 12582912.0)).to(tl.int32, bitcast=True) - 0x4B400000
    if SIGNED:
        border = tl.where(values < 0, 127 - nearest, 126 + nearest)
    else:
        border = nearest - 2
    border = tl.minimum(tl.maximum(border, 0), 254)
    above = values.to(tl.float64) > tl.load(borders + border) * _for_each(scale).to(tl.float64)
    return (border + above.to(tl.int32)).to(tl.uint8)


@triton.jit
def _rounded(x, start, row, numbers, steps, HALF: tl.constexpr):
    """update.round_stochastically, its result still in fp32."""
    nothing = tl.zeros([TILE // 8], tl.uint32)
    groups = nothing + (start // 8 + tl.arange(0, TILE // 8)).to(tl.uint32)
    step = nothing + tl.load(steps + row).to(tl.uint32)
    seed = tl.load(numbers + 2 * row + 1).to(tl.uint32, bitcast=True).to(tl.uint64) + (KEY << 32)
    w0, w1, w2, w3 = tl.philox(seed, groups, step, nothing, nothing, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2 i + j at [:, i, j]
    draws = tl.reshape(tl.join(words & 65535, words >> 16), [TILE]).to(tl.int32)
    bits = x.to(tl.int32, bitcast=True)
    if HALF:
        exponent = tl.maximum((bits >> 23) & 255, 113)
        size = tl.abs(x) * ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        whole = tl.floor(size)
        up = ((size - whole) * 65536.0 > draws.to(tl.float32)).to(tl.float32)
        cut = (whole + up) * ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        cut = (cut.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
    else:
        cut = ((bits + draws) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), cut, x)
