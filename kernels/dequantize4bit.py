"""4-bit codes and block scales -> dense values: the inverse of quantize4bit, and the hot path of training.

Torch has no nibble gather, and decoding nibble by nibble moves many bytes for each one written. So both quick paths
take each packed byte as the index of a 256-entry table of the two fp32 values it stands for (65,536 entries, for two
bytes, leave a CPU's caches: measured slower). On a CPU torch copies an entry as one float64; then each block is
multiplied by its scale in place. On CUDA one kernel does it all, scales of double quantisation included
(dequantize4bit_triton.py). Everything is exact: the table holds the code values, the one product is the reference's.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..settings import DType, floating
from .blockwise import NESTED_BLOCKSIZE
from .codes import code_for, dynamic_code, pair_table
from .dispatch import path_for
from .weight4bit import Weight4bit, flatten, unflatten

CHUNK = 1 << 20  # values at a time on a CPU: 4 MB of fp32 and a 2 MB index; a multiple of every block size
LARGE_CHUNK = 1 << 24  # values at a time elsewhere, where launches cost more than memory
HUGE_PAGES_FROM = 1 << 25  # bytes; malloc maps blocks of this size anew, at the price of a fault for each 4 KB page
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dequantize(weight: Weight4bit, dtype: DType = torch.float32) -> Tensor:
    """The dense tensor: code[q] * absmax in fp32, then one rounding to `dtype`; fp64 holds the fp32 values exactly.

    On CUDA this is one kernel. ValueError if the weight's sizes, types or devices disagree, or if `dtype` is no
    floating-point type."""
    dtype = floating(dtype)
    if torch.compiler.is_compiling() or isinstance(weight.packed, FakeTensor):  # one node in its graph
        return _in_graph(*flatten([weight]), dtype).view(weight.shape)
    weight.check()
    out = _allocate(weight.shape, dtype, weight.packed.device)
    decode_into(out, weight)
    return out


@torch.library.custom_op("fourbit::dequantize4bit", mutates_args=())
def _in_graph(stored: list[Tensor], sizes: list[int], quant_type: str, blocksize: int, dtype: torch.dtype) -> Tensor:
    return dequantize(unflatten(stored, sizes, quant_type, blocksize)[0], dtype)


@_in_graph.register_fake
def _(stored: list[Tensor], sizes: list[int], quant_type: str, blocksize: int, dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty(sizes, dtype=dtype)


def dequantize_rows(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix [out, in], by their int64 numbers [n]: [n, in], each as `dequantize` makes it.

    Nothing else is decoded where a row is whole blocks; elsewhere all is. IndexError for a row that is not there."""
    if torch.compiler.is_compiling() or isinstance(rows, FakeTensor):
        return _rows_in_graph(rows, *flatten([weight]), dtype)
    if weight.columns % weight.blocksize:
        return F.embedding(rows, dequantize(weight, dtype))
    packed, absmax = (F.embedding(rows, own.view(weight.rows, -1)) for own in (weight.packed, weight.absmax))
    nested = weight.nested_absmax
    if nested is not None and weight.nested_offset is not None:
        blocks = rows[:, None] * absmax.shape[1] + torch.arange(absmax.shape[1], device=rows.device)
        values = dynamic_code(True, absmax.device)[absmax.int()]
        absmax = values * nested[blocks // NESTED_BLOCKSIZE] + weight.nested_offset
    shape = len(rows), weight.columns
    return dequantize(Weight4bit(packed, absmax, None, None, shape, weight.quant_type, weight.blocksize), dtype)


@torch.library.custom_op("fourbit::dequantize4bit_rows", mutates_args=())
def _rows_in_graph(
    rows: Tensor, stored: list[Tensor], sizes: list[int], quant_type: str, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return dequantize_rows(unflatten(stored, sizes, quant_type, blocksize)[0], rows, dtype)


@_rows_in_graph.register_fake
def _(
    rows: Tensor, stored: list[Tensor], sizes: list[int], quant_type: str, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return stored[0].new_empty([len(rows), sizes[1]], dtype=dtype)


def decode_into(out: Tensor, weight: Weight4bit, first: int = 0) -> None:
    """out, contiguous, becomes the weight's values from `first`, a block's start, on. Nothing is checked."""
    path, flat, packed = path_for(weight.packed), out.view(-1), weight.packed.reshape(-1)
    if path == "triton" and first == 0 and out.dtype in KERNEL_DTYPES:
        from . import dequantize4bit_triton  # only here: Triton exists for Linux only and is slow to import

        if dequantize4bit_triton.decode_words(flat, packed.contiguous(), weight):
            return
    absmax, blocksize = weight.scales.reshape(-1), weight.blocksize
    decode, chunk = (_decode_pairs, CHUNK) if path == "cpu" else (dequantize_reference, LARGE_CHUNK)
    if first == 0 and flat.numel() == prod(weight.shape) <= chunk:
        return decode(packed, absmax, weight.quant_type, blocksize, flat)
    for start in range(0, flat.numel(), chunk):
        piece = flat[start : start + chunk]
        at, end = first + start, first + start + piece.numel()
        scales = absmax[at // blocksize : -(-end // blocksize)]
        decode(packed[at // 2 : (end + 1) // 2], scales, weight.quant_type, blocksize, piece)


def dequantize_reference(packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, out: Tensor) -> None:
    """The definition, on any device, into the flat tensor `out`. Tests hold every other path to this one."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: out.numel()]
    scales = absmax.repeat_interleave(blocksize)[: out.numel()]
    out.copy_(code_for(quant_type, packed.device)[nibbles.int()] * scales)


def _decode_pairs(packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, out: Tensor) -> None:
    n = out.numel()
    direct = out.dtype == torch.float32
    values = out if direct else torch.empty(n, dtype=torch.float32, device="cpu")
    pairs, index, whole = pair_table(quant_type, torch.float32).view(torch.float64), packed.int(), n - n % blocksize
    if whole == n:  # as nearly always: a slice costs as much as a thousand values
        torch.index_select(pairs, 0, index, out=values.view(torch.float64))
        values.view(-1, blocksize).mul_(absmax.unsqueeze(1))
    else:
        torch.index_select(pairs, 0, index[: n // 2], out=values[: n // 2 * 2].view(torch.float64))
        if n % 2:
            values[-1] = code_for(quant_type)[index[-1] >> 4]
        values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize].unsqueeze(1))
        values[whole:].mul_(absmax[-1])
    if not direct:
        out.copy_(values)


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor. Large ones on the CPU come from numpy, which asks the kernel for huge pages."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGES_FROM:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))
