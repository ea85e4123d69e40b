"""y = x W^T + b with W in 4 bits. The dense W lives only while a product needs it: backward decodes it again."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blockwise import dequantize_absmax
from .dequantize4bit import dequantize


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
    flow to x and bias; the weight is frozen, and only the packed tensors are saved for backward. float64 x sees the
    fp32 weight exactly. ValueError if the sizes disagree or only one of nested_absmax and offset is given.
    """
    if x.shape[-1:] != (shape[1],):
        raise ValueError(f"the weight is {tuple(shape)} (out, in), so x must end in {shape[1]}, got {tuple(x.shape)}")
    if (nested_absmax is None) != (offset is None):
        raise ValueError("nested_absmax and offset belong together: give both (double quantisation) or neither")
    weight_format = (shape[0], shape[1], quant_type, blocksize)
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
        weight_format: tuple[int, int, str, int],
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax, nested_absmax, offset)
        ctx.weight_format = weight_format
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = _dense((packed, absmax, nested_absmax, offset), weight_format, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad [..., out]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(ctx.saved_tensors, ctx.weight_format, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None


def _dense(stored: tuple[Tensor | None, ...], weight_format: tuple[int, int, str, int], dtype: torch.dtype) -> Tensor:
    """W [out, in] in `dtype`."""
    packed, absmax, nested_absmax, offset = stored
    assert packed is not None and absmax is not None
    rows, columns, quant_type, blocksize = weight_format
    if nested_absmax is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    return dequantize(packed, absmax, (rows, columns), dtype=dtype, quant_type=quant_type, blocksize=blocksize)
