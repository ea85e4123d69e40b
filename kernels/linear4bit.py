"""y = x W^T + b with W in 4 bits. The dense W lives only while a product needs it: backward decodes it again.

On the CPU a weight of up to WHOLE values is decoded at once; a larger one goes slab by slab through one buffer, each
slab multiplied while it is still in cache, so that no dense copy of a large weight ever exists. On CUDA few rows of x
take a kernel that decodes inside the product; more rows decode into a workspace and leave the product to cuBLAS
(`plan.py` says where the border lies). The workspace comes from torch's caching allocator and goes back at once: all
layers share it.

The op is registered with torch.library, so that torch.compile takes it as one node. Called op by op, the same rule runs
as a plain autograd.Function: a registered op with gradients costs the host 40 us a call, the Function 8, and few rows
on a fast GPU take no longer than that.
"""

from collections.abc import Callable, Iterator
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from .dequantize4bit import dequantize
from .dispatch import path_for, plan_linear, product_dtype
from .weight4bit import Weight4bit

WHOLE = 1 << 21  # values decoded at once on a CPU: 8 MB of fp32
SLAB = 1 << 20  # values in a slab of a larger weight, about


def linear4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the 4-bit weight [out, in], transposed, plus bias [out] -> [..., out] in x's dtype.

    Gradients flow to x and bias; the weight is frozen, and only its packed tensors are saved for backward. fp64 x sees
    the fp32 weight exactly. bf16 and fp16 x on a CPU are multiplied in fp32 and rounded once, unless the CPU multiplies
    bf16 itself; there and on CUDA the weight is rounded to x's dtype first (for few rows on CUDA see
    matmul4bit_triton.py). ValueError if sizes disagree.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"the weight is {tuple(weight.shape)} (out, in), so x must end in {weight.shape[-1]}, got {tuple(x.shape)}"
        )
    compiling = torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)  # such as fake tensors
    if not compiling:
        weight.check()
    run = _linear4bit if compiling else _Linear4bit.apply
    y: Tensor = run(x, bias, *weight[:4], weight.rows, weight.columns, weight.quant_type, weight.blocksize)
    return y


def _forward(
    x: Tensor,  # [..., in]
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    quant_type: str,
    blocksize: int,
) -> Tensor:
    weight = Weight4bit(packed, absmax, nested_absmax, offset, (rows, columns), quant_type, blocksize)
    y = x.new_empty(*x.shape[:-1], rows)  # not a view of another tensor: the caller may write into it
    multiply(_matrix(x), weight, bias, _matrix(y))
    return y


def _gradient_of_x(
    grad: Tensor,  # [..., out]
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    quant_type: str,
    blocksize: int,
) -> Tensor:
    weight = Weight4bit(packed, absmax, nested_absmax, offset, (rows, columns), quant_type, blocksize)
    grad_x = grad.new_empty(*grad.shape[:-1], columns)
    multiply_back(_matrix(grad), weight, _matrix(grad_x))
    return grad_x


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, packed, absmax, nested_absmax, offset, *ctx.layout = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, gradient_of_x: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient_of_x(grad, *ctx.saved_tensors, *ctx.layout)
    if ctx.needs_input_grad[1]:
        grad_bias = _matrix(grad).sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_bias, *[None] * 8


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, _gradient_of_x)


_linear4bit = torch.library.custom_op("fourbit::linear4bit", _forward, mutates_args=())
_linear4bit_backward = torch.library.custom_op("fourbit::linear4bit_backward", _gradient_of_x, mutates_args=())
_linear4bit.register_autograd(lambda ctx, grad: _backward(ctx, grad, _linear4bit_backward), setup_context=_save)


@_linear4bit.register_fake
def _(
    x: Tensor, bias: Any, packed: Any, absmax: Any, nested: Any, offset: Any, rows: int, columns: int, *layout: Any
) -> Tensor:
    prepare(x, layout[0])
    return x.new_empty(*x.shape[:-1], rows)


@_linear4bit_backward.register_fake
def _(grad: Tensor, packed: Any, absmax: Any, nested: Any, offset: Any, rows: int, columns: int, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


def prepare(x: Tensor, quant_type: str) -> None:
    """The tables and counters that kernels share, made now: here a compiler only asks what an op returns.

    Made later, on the first run, they would lie in the memory of the CUDA graphs that torch.compile records.
    """
    if x.device.type == "cuda" and path_for(x) == "triton":
        from . import matmul4bit_triton

        with unset_fake_temporarily():
            matmul4bit_triton.prepare(x.device, x.dtype, quant_type)


def multiply(x: Tensor, weight: Weight4bit, bias: Tensor | None, y: Tensor) -> None:
    """y [N, out] = x [N, in] W^T + bias, in the dtype of compute_dtype and rounded once. Not differentiable.

    y must be contiguous, x's columns too.
    """
    if path_for(x) == "triton" and _multiply_packed(x, weight, bias, y):
        return
    dtype = compute_dtype(x, weight)
    x = x.to(dtype)
    for start, part in slabs(weight, dtype):
        here = y[:, start : start + part.shape[0]]
        target = here if y.dtype == dtype else torch.empty_like(here, dtype=dtype)
        if bias is None:
            torch.mm(x, part.T, out=target)  # out= also keeps autocast away: the dtypes are settled here
        else:
            torch.addmm(bias[start : start + part.shape[0]].to(dtype), x, part.T, out=target)
        if target is not here:
            here.copy_(target)


def _multiply_packed(x: Tensor, weight: Weight4bit, bias: Tensor | None, y: Tensor) -> bool:
    """Like multiply, but decoding inside the product; False, with nothing done, where that is not the quicker way."""
    from . import matmul4bit_triton  # only here: Triton exists for Linux only and is slow to import

    if not x.numel() or not matmul4bit_triton.applies(x.dtype, weight):
        return False
    way = plan_linear(x, weight.rows)
    if way.config is None:
        return False
    matmul4bit_triton.matmul(x, weight, bias, way.config, out=y)
    return True


def multiply_back(grad: Tensor, weight: Weight4bit, grad_x: Tensor) -> None:
    """grad_x [N, in] = grad [N, out] W, the gradient of x. Not differentiable."""
    dtype = compute_dtype(grad, weight)
    total = grad_x if grad_x.dtype == dtype else torch.empty_like(grad_x, dtype=dtype)
    if weight.rows == 0:
        total.zero_()
    for start, part in slabs(weight, dtype):
        here = grad[:, start : start + part.shape[0]].to(dtype)
        total.addmm_(here, part, beta=1 if start else 0)  # beta 0: what empty() left there is not read
    if total is not grad_x:
        grad_x.copy_(total)


def _matrix(x: Tensor) -> Tensor:
    """x [..., features] as [N, features], also where a size is 0; columns at stride 1."""
    matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def compute_dtype(x: Tensor, weight: Weight4bit) -> torch.dtype:
    """As product_dtype says, except that sums over slabs are kept in fp32."""
    dtype = product_dtype(x)
    slabs = x.device.type == "cpu" and weight.rows * weight.columns > WHOLE
    return torch.float32 if slabs and dtype == torch.bfloat16 else dtype


def slabs(weight: Weight4bit, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, W[first row : ...] in `dtype`) for all of W; each slab overwrites the one before."""
    rows, columns, blocksize, step = weight.rows, weight.columns, weight.blocksize, _slab_rows(weight)
    buffer = torch.empty(step, columns, dtype=dtype, device=weight.packed.device)
    if rows <= step:
        yield from [(0, dequantize(weight, dtype, buffer[:rows]))] if rows else []
        return
    packed, absmax = weight.packed.reshape(-1), weight.scales.reshape(-1)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        bytes_ = packed[start * columns // 2 : (end * columns + 1) // 2]
        scales = absmax[start * columns // blocksize : -(-end * columns // blocksize)]
        part = Weight4bit(bytes_, scales, None, None, (end - start, columns), weight.quant_type, blocksize)
        yield start, dequantize(part, dtype, buffer[: end - start])


def _slab_rows(weight: Weight4bit) -> int:
    """Rows decoded at a time: all of them, or as many as make about SLAB values and whole blocks."""
    rows, columns, blocksize = weight.rows, weight.columns, weight.blocksize
    if rows * columns <= WHOLE or weight.packed.device.type != "cpu":
        return max(rows, 1)
    aligned = blocksize // gcd(blocksize, columns)  # rows after which a block ends with the row
    return min(rows, aligned * max(1, SLAB // (aligned * columns)))
