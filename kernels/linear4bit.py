"""y = x W^T + b with W in 4 bits. The dense W lives only while a product needs it: backward decodes it again.

A weight of up to WHOLE values is decoded at once. A larger one goes slab by slab through one buffer, each slab
multiplied while it is still in cache, so that no dense copy of a large weight ever exists.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blockwise import dequantize_absmax
from .dequantize4bit import check_sizes, dequantize
from .dispatch import product_dtype

WHOLE = 1 << 21  # values decoded at once: 8 MB of fp32
SLAB = 1 << 20  # values in a slab of a larger weight, about


class _Format(NamedTuple):
    rows: int
    columns: int
    quant_type: str
    blocksize: int


_Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # packed, absmax, nested_absmax, offset


def linear4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Tensor:
    """x [..., in] times the 4-bit weight of `shape` (out, in), plus bias [out] -> [..., out] in x's dtype.

    absmax holds fp32 scales, or uint8 codes when nested_absmax and offset are given (double quantisation). Gradients
    flow to x and bias; the weight is frozen, and only the packed tensors are saved for backward. fp64 x sees the fp32
    weight exactly. bf16 and fp16 x on a CPU are multiplied in fp32 and rounded once, unless the CPU multiplies bf16
    itself: then the weight is rounded to bf16 first. ValueError if sizes disagree or of nested_absmax and offset only
    one is given.
    """
    if x.shape[-1:] != (shape[1],):
        raise ValueError(f"the weight is {tuple(shape)} (out, in), so x must end in {shape[1]}, got {tuple(x.shape)}")
    if (nested_absmax is None) != (offset is None):
        raise ValueError("nested_absmax and offset belong together: give both (double quantisation) or neither")
    weight_format = _Format(shape[0], shape[1], quant_type, blocksize)
    y: Tensor = _Linear4bit.apply(x, bias, packed, absmax, nested_absmax, offset, weight_format)
    return y


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., in]
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        weight_format: _Format,
    ) -> Tensor:
        stored = (packed, absmax, nested_absmax, offset)
        ctx.save_for_backward(*stored)
        ctx.weight_format = weight_format
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = x.new_empty(*x.shape[:-1], weight_format.rows)
        _multiply(_matrix(x), stored, weight_format, bias, _matrix(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad [..., out]
        rows = _matrix(grad)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply_back(rows, ctx.saved_tensors, ctx.weight_format).view(
                *grad.shape[:-1], ctx.weight_format.columns
            )
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None


def _multiply(x: Tensor, stored: _Stored, weight_format: _Format, bias: Tensor | None, y: Tensor) -> None:
    """y [N, out] = x [N, in] W^T + bias, in the dtype of _compute_dtype and rounded once."""
    dtype = _compute_dtype(x, weight_format)
    x = x.to(dtype)
    for start, weight in _slabs(stored, weight_format, dtype):
        part = y[:, start : start + weight.shape[0]]
        target = part if y.dtype == dtype else torch.empty_like(part, dtype=dtype)
        if bias is None:
            torch.mm(x, weight.T, out=target)
        else:
            torch.addmm(bias[start : start + weight.shape[0]].to(dtype), x, weight.T, out=target)
        if target is not part:
            part.copy_(target)


def _multiply_back(grad: Tensor, stored: _Stored, weight_format: _Format) -> Tensor:
    """The gradient of x [N, in] = grad [N, out] W."""
    dtype = _compute_dtype(grad, weight_format)
    total = torch.empty(grad.shape[0], weight_format.columns, dtype=dtype, device=grad.device)
    if weight_format.rows == 0:
        total.zero_()
    for start, weight in _slabs(stored, weight_format, dtype):
        part = grad[:, start : start + weight.shape[0]].to(dtype)
        total.addmm_(part, weight, beta=1 if start else 0)  # beta 0: what empty() left there is not read
    return total.to(grad.dtype)


def _matrix(x: Tensor) -> Tensor:
    """x [..., features] as [N, features], also where a size is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _compute_dtype(x: Tensor, weight_format: _Format) -> torch.dtype:
    """As product_dtype says, except that sums over slabs are kept in fp32."""
    dtype = product_dtype(x)
    slabs = x.device.type == "cpu" and weight_format.rows * weight_format.columns > WHOLE
    return torch.float32 if slabs and dtype == torch.bfloat16 else dtype


def _slabs(stored: _Stored, weight_format: _Format, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, W[first row : ...] in `dtype`) for all of W; each slab overwrites the one before."""
    packed, absmax, nested_absmax, offset = stored
    rows, columns, quant_type, blocksize = weight_format
    if nested_absmax is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    check_sizes(packed, absmax, (rows, columns), blocksize)  # a slab only sees its own part
    step = _slab_rows(weight_format, packed.device)
    buffer = torch.empty(step, columns, dtype=dtype, device=packed.device)
    packed = packed.reshape(-1)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield (
            start,
            dequantize(
                packed[start * columns // 2 : (end * columns + 1) // 2],
                absmax[start * columns // blocksize : -(-end * columns // blocksize)],
                (end - start, columns),
                dtype=dtype,
                quant_type=quant_type,
                blocksize=blocksize,
                out=buffer[: end - start],
            ),
        )


def _slab_rows(weight_format: _Format, device: torch.device) -> int:
    """Rows decoded at a time: all of them, or as many as make about SLAB values and whole blocks."""
    rows, columns, _, blocksize = weight_format
    if rows * columns <= WHOLE or device.type != "cpu":
        return max(rows, 1)
    aligned = blocksize // gcd(blocksize, columns)  # rows after which a block ends with the row
    return min(rows, aligned * max(1, SLAB // (aligned * columns)))
