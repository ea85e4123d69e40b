"""4-bit codes and block scales -> dense values: the inverse of quantize4bit, and the hot path of training on a CPU."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .codes import code_for
from .quantize4bit import check_format


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

    packed: uint8, (n + 1) // 2 bytes in any shape; absmax: fp32 [ceil(n / blocksize)]. `out`, if given, is a contiguous
    tensor of that shape and dtype to write into, and is returned. fp64 holds the fp32 values exactly. ValueError if the
    sizes disagree.
    """
    check_format(quant_type, blocksize)
    _check_sizes(packed, absmax, shape, blocksize)
    if out is not None and (out.shape != torch.Size(shape) or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(
            f"out must be a contiguous {tuple(shape)} tensor of {dtype}, "
            f"got {tuple(out.shape)} of {out.dtype} with strides {out.stride()}"
        )
    dense = dequantize_reference(packed, absmax, shape, dtype, quant_type, blocksize)
    return dense if out is None else out.copy_(dense)


def dequantize_reference(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, quant_type: str, blocksize: int
) -> Tensor:
    """The definition, on any device. Tests hold every other path to this one."""
    n = prod(shape)
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).view(-1)[:n]
    scales = absmax.repeat_interleave(blocksize)[:n]
    return (code_for(quant_type, packed.device)[nibbles.int()] * scales).to(dtype).view(tuple(shape))


def _check_sizes(packed: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int) -> None:
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
