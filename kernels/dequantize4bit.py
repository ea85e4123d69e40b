"""4-bit codes and block scales -> dense values: the inverse of quantize4bit, and the hot path of training.

Torch has no nibble gather, and decoding nibble by nibble moves many bytes for each one written. So both quick paths
take each packed byte as the index of a 256-entry table of the two fp32 values it stands for. On a CPU torch copies an
entry as one float64; then each block is multiplied by its scale in place. On CUDA one kernel does it all, scales of
double quantisation included (dequantize4bit_triton.py). Everything is exact: the table holds the code values, and the
one product is the reference's own.

A table over byte pairs (65,536 entries of 16 bytes) halves the number of look-ups, but at 1 MB it leaves the
first-level cache of a CPU and, between matrix products, the second: measured slower there, and no faster when warm.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blockwise import NESTED_BLOCKSIZE, dequantize_absmax
from .codes import code_for, pair_table
from .dispatch import path_for
from .quantize4bit import check_format
from .weight4bit import Weight4bit

CHUNK = 1 << 20  # values at a time on a CPU: 4 MB of fp32 and a 2 MB index; a multiple of every block size
LARGE_CHUNK = 1 << 24  # values at a time elsewhere, where launches cost more than memory
HUGE_PAGES_FROM = 1 << 25  # bytes; malloc maps blocks of this size anew, at the price of a fault for each 4 KB page
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    quant_type: str = "nf4",
    blocksize: int = 64,
    out: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """The dense tensor of `shape`: code[q] * absmax in fp32, then one rounding to `dtype`.

    packed: uint8, (n + 1) // 2 bytes in any shape; absmax: fp32 [ceil(n / blocksize)], or with double quantisation its
    uint8 codes, plus nested_absmax (fp32, one for 256 of them) and offset (fp32, one value). `transpose` gives the
    transposed of a 2-D shape, contiguous. `out`, if given, is a tensor of the result's shape and dtype to write into,
    and is returned; if 2-D, its rows may lie apart (a workspace: any row stride, last stride 1). fp64 holds the fp32
    values exactly. On CUDA this is one kernel. ValueError if sizes, types or devices disagree, if of nested_absmax and
    offset only one is given, or `dtype` is no floating-point type.
    """
    if torch.compiler.is_compiling():  # one node in its graph
        made = _in_graph(packed, absmax, nested_absmax, offset, list(shape), dtype, quant_type, blocksize, transpose)
        return made if out is None else out.copy_(made)
    check_format(quant_type, blocksize)
    check_sizes(packed, absmax, shape, blocksize, nested_absmax, offset)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    if transpose and len(shape) != 2:
        raise ValueError(f"only a matrix can be transposed, got shape {tuple(shape)}")
    target = tuple(reversed(shape)) if transpose else tuple(shape)
    if out is None:
        out = _allocate(target, dtype, packed.device)
    _check_out(out, target, dtype, packed.device)
    rows, columns = (shape[0], shape[1]) if len(shape) == 2 else (1, prod(shape))
    weight = Weight4bit(packed, absmax, nested_absmax, offset, rows, columns, quant_type, blocksize)
    if path_for(packed) == "triton" and dtype in KERNEL_DTYPES:
        from .dequantize4bit_triton import decode_into  # only here: Triton exists for Linux only and is slow to import

        decode_into(out if len(shape) == 2 else out.view(1, -1), weight, transpose)
    elif transpose or not out.is_contiguous():
        dense = torch.empty(rows, columns, dtype=dtype, device=packed.device)
        _decode(dense.view(-1), weight)
        out.copy_(dense.T if transpose else dense)
    else:
        _decode(out.view(-1), weight)
    return out


@torch.library.custom_op("fourbit::dequantize4bit", mutates_args=())
def _in_graph(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    transpose: bool,
) -> Tensor:
    return dequantize(
        packed,
        absmax,
        shape,
        nested_absmax=nested_absmax,
        offset=offset,
        dtype=dtype,
        quant_type=quant_type,
        blocksize=blocksize,
        transpose=transpose,
    )


@_in_graph.register_fake
def _(
    packed: Tensor, absmax: Any, nested: Any, offset: Any, shape: list[int], dtype: torch.dtype, *rest: Any
) -> Tensor:
    return packed.new_empty(shape[::-1] if rest[-1] else shape, dtype=dtype)


def _decode(flat: Tensor, weight: Weight4bit) -> None:
    """All of the weight, chunk by chunk, without a kernel."""
    absmax, blocksize = weight.absmax, weight.blocksize
    if weight.nested_absmax is not None and weight.offset is not None:
        absmax = dequantize_absmax(absmax, weight.nested_absmax, weight.offset)
    cpu = path_for(weight.packed) == "cpu"
    decode, chunk = (_decode_pairs, CHUNK) if cpu else (dequantize_reference, LARGE_CHUNK)
    bytes_ = weight.packed.reshape(-1)
    for start in range(0, flat.numel(), chunk):
        piece = flat[start : start + chunk]
        scales = absmax[start // blocksize : -(-(start + piece.numel()) // blocksize)]
        decode(bytes_[start // 2 : (start + piece.numel() + 1) // 2], scales, weight.quant_type, blocksize, piece)


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
    pairs, index = pair_table(quant_type, torch.float32), packed.to(torch.int32)
    torch.index_select(pairs.view(torch.float64), 0, index[: n // 2], out=values[: n // 2 * 2].view(torch.float64))
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


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor. Large ones on the CPU come from numpy, which asks the kernel for huge pages."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGES_FROM:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))


def check_sizes(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    blocksize: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """ValueError unless the stored tensors have the sizes, types and device that a weight of `shape` needs."""
    n = prod(shape)
    blocks = -(-n // blocksize)
    if packed.dtype != torch.uint8 or packed.numel() != (n + 1) // 2:
        raise ValueError(
            f"{n} values of shape {tuple(shape)} need {(n + 1) // 2} packed uint8 bytes, "
            f"got {packed.numel()} of {packed.dtype}"
        )
    if (nested_absmax is None) != (offset is None):
        raise ValueError("nested_absmax and offset belong together: give both (double quantisation) or neither")
    wanted, kind = (torch.float32, "fp32 scales") if nested_absmax is None else (torch.uint8, "uint8 codes of scales")
    if absmax.dtype != wanted or absmax.numel() != blocks:
        raise ValueError(
            f"{n} values in blocks of {blocksize} need {blocks} {kind}, got {absmax.numel()} of {absmax.dtype}"
        )
    if nested_absmax is not None and offset is not None:
        groups = -(-blocks // NESTED_BLOCKSIZE)
        if nested_absmax.dtype != torch.float32 or nested_absmax.numel() != groups:
            raise ValueError(
                f"{blocks} codes in blocks of {NESTED_BLOCKSIZE} need {groups} scales in fp32, "
                f"got {nested_absmax.numel()} of {nested_absmax.dtype}"
            )
        if offset.dtype != torch.float32 or offset.numel() != 1:
            raise ValueError(f"offset must be one fp32 value, got {offset.numel()} of {offset.dtype}")
    devices = {str(t.device) for t in (packed, absmax, nested_absmax, offset) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"packed codes and scales must be on one device, got {', '.join(sorted(devices))}")


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    strided = out.dim() == 2 and out.stride(1) == 1 and out.stride(0) >= out.shape[1]
    if out.shape != torch.Size(shape) or out.dtype != dtype or not (strided or out.is_contiguous()):
        raise ValueError(
            f"out must be a contiguous {shape} tensor of {dtype} (a matrix may have a larger row stride), "
            f"got {tuple(out.shape)} of {out.dtype} with strides {out.stride()}"
        )
    if out.device != device:
        raise ValueError(f"out must be on the codes' device {device}, got {out.device}")
