"""4-bit codes and block scales -> dense values: the inverse of quantize4bit, and the hot path of training on a CPU.

Torch has no nibble gather, and decoding nibble by nibble moves many bytes for each one written. The CPU path takes
each packed byte as the index of a 256-entry table whose entries are the two fp32 values it stands for, eight bytes
that torch copies as one float64; then each block is multiplied by its scale in place. Everything is exact: the table
holds the code values, and the one product is the reference's own.

A table over byte pairs (65,536 entries of 16 bytes) halves the number of look-ups, but at 1 MB it leaves the
first-level cache and, between matrix products, the second: measured slower there, and no faster when it is warm.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from .codes import code_for
from .dispatch import path_for
from .quantize4bit import check_format

CHUNK = 1 << 20  # values at a time on a CPU: 4 MB of fp32 and a 2 MB index; a multiple of every block size
LARGE_CHUNK = 1 << 24  # values at a time elsewhere, where launches cost more than memory
HUGE_PAGES_FROM = 1 << 25  # bytes; malloc maps blocks of this size anew, at the price of a fault for each 4 KB page


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    quant_type: str = "nf4",
    blocksize: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """The dense tensor of `shape`: code[q] * absmax in fp32, then one rounding to `dtype`.

    packed: uint8, (n + 1) // 2 bytes in any shape; absmax: fp32 [ceil(n / blocksize)]. `out`, if given, is a
    contiguous tensor of that shape and dtype to write into, and is returned. fp64 holds the fp32 values exactly.
    ValueError if the sizes disagree or `dtype` is no floating-point type.
    """
    check_format(quant_type, blocksize)
    check_sizes(packed, absmax, shape, blocksize)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    if out is None:
        out = _allocate(shape, dtype, packed.device)
    elif out.shape != torch.Size(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {tuple(shape)} tensor of {dtype}, "
            f"got {tuple(out.shape)} of {out.dtype} with strides {out.stride()}"
        )
    decode, chunk = (_decode_pairs, CHUNK) if path_for(packed) == "cpu" else (dequantize_reference, LARGE_CHUNK)
    flat, bytes_ = out.view(-1), packed.reshape(-1)
    for start in range(0, flat.numel(), chunk):
        piece = flat[start : start + chunk]
        scales = absmax[start // blocksize : -(-(start + piece.numel()) // blocksize)]
        decode(bytes_[start // 2 : (start + piece.numel() + 1) // 2], scales, quant_type, blocksize, piece)
    return out


def dequantize_reference(packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, out: Tensor) -> None:
    """The definition, on any device, into the flat tensor `out`. Tests hold every other path to this one."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: out.numel()]
    scales = absmax.repeat_interleave(blocksize)[: out.numel()]
    out.copy_(code_for(quant_type, packed.device)[nibbles.int()] * scales)


def _decode_pairs(packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, out: Tensor) -> None:
    """The CPU path: `out` is flat, in any dtype."""
    n = out.numel()
    direct = out.dtype == torch.float32 and _holds_pairs(out)
    values = out if direct else torch.empty(n, dtype=torch.float32, device="cpu")
    pairs, index = _pair_table(quant_type), packed.to(torch.int32)
    torch.index_select(pairs, 0, index[: n // 2], out=values[: n // 2 * 2].view(torch.float64))
    if n % 2:
        values[-1] = code_for(quant_type)[index[-1] >> 4]
    whole = n - n % blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize].unsqueeze(1))
    if whole < n:
        values[whole:].mul_(absmax[-1])
    if not direct:
        out.copy_(values)


def _holds_pairs(values: Tensor) -> bool:
    """True if fp32 `values` can be viewed as float64: aligned, both in memory and within its storage."""
    return values.data_ptr() % 8 == 0 and values.storage_offset() % 2 == 0


@cache
def _pair_table(quant_type: str) -> Tensor:
    """float64 [256]: entry b holds the two fp32 code values of byte b, never read as the number it would be."""
    byte = torch.arange(256, device="cpu")
    return code_for(quant_type)[torch.stack([byte >> 4, byte & 15], dim=1)].view(-1).view(torch.float64)


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor. Large ones on the CPU come from numpy, which asks the kernel for huge pages."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGES_FROM:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))


def check_sizes(packed: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int) -> None:
    """ValueError unless packed and absmax have the size and type that a weight of `shape` needs."""
    n = prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (n + 1) // 2:
        raise ValueError(
            f"{n} values of shape {tuple(shape)} need {(n + 1) // 2} packed uint8 bytes, "
            f"got {packed.numel()} of {packed.dtype}"
        )
    if absmax.dtype != torch.float32 or absmax.numel() != -(-n // blocksize):
        raise ValueError(
            f"{n} values in blocks of {blocksize} need {-(-n // blocksize)} fp32 scales, "
            f"got {absmax.numel()} of {absmax.dtype}"
        )
