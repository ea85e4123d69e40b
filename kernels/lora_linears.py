"""Linears with a frozen 4-bit base and LoRA that share one input (q, k, v; gate, up; or just one), as one op.

What such linears do with x and with the gradient of x they do together: one pass makes s = dropout(x) A^T for all of
them, one makes all gradients of A, and the gradients of x are added where they arise. Kept for backward are x, which
the layer below keeps anyway, the narrow s, and the packed weights; a dense weight only where `keep` asks for it.

Registered with torch.library, forward and backward, so that torch.compile sees one node each. Eager mode takes the same
functions through a plain autograd rule: torch.library's dispatch of tensor lists costs a fifth of a millisecond a call,
more than a GPU needs for a small batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .dropout import draw_seed, keep_level
from .linear4bit import prepare
from .lora_paths import (
    Gradients,
    Group,
    Result,
    backward_cpu,
    backward_reference,
    forward_cpu,
    forward_reference,
    group_dtype,
    padded,
    wide,
)
from .plan import FORMS
from .weight4bit import Weight4bit

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def lora_linears4bit(
    x: Tensor,
    weights: Sequence[Weight4bit],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
    form: str = "",
) -> list[Tensor]:
    """y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T for x [..., in] -> each [..., out_i] in x's dtype.

    Weights [out_i, in] of one 4-bit format, A_i [rank_i, in] and B_i [out_i, rank_i] masters of any floating dtype.
    LoRA (arXiv 2106.09685, eq. 3) over frozen weights: gradients flow to x, biases, A and B, each in its own dtype.

    All linears see the same dropped x (kernels/dropout.py): a mask made once. `seed`, int64 0-d on x's device, fixes
    it; by default it is drawn from the device's generator. `keep` holds the decoded weights for backward instead of
    decoding again: for activation checkpointing, where the forward pass that runs again right before backward is the
    one that saves. `form` forces one of plan.FORMS on CUDA; "" leaves it to the dispatcher, and `keep` excludes
    "fused". ValueError where sizes or formats disagree.
    """
    _check(x, weights, biases, As, Bs, scales, form, keep)
    if dropout:
        keep_level(dropout)  # its ValueError
        seed = draw_seed(x.device) if seed is None else seed
    compiling = torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)  # such as fake tensors
    if not compiling:
        for weight in weights:
            weight.check()
    lists = (_stored(weights), _all_or_none(biases, weights), list(As), list(Bs))
    numbers = ([float(scale) for scale in scales], *weights[0][5:], float(dropout), keep, form)
    seed = seed if dropout else None
    if compiling:
        return _forward_op(x, *lists, seed, *numbers)[: len(weights)]
    sizes = [len(tensors) for tensors in lists]
    return list(_Eager.apply(x, seed, numbers, sizes, *chain.from_iterable(lists))[: len(weights)])


def _stored(weights: Sequence[Weight4bit]) -> list[Tensor]:
    """The tensors of all weights, kind by kind: packed, absmax and, with double quantisation, the other two."""
    kinds = zip(*(weight[:4] for weight in weights), strict=True)
    return [tensor for kind in kinds for tensor in kind if tensor is not None]


def _all_or_none(biases: Sequence[Tensor | None], weights: Sequence[Weight4bit]) -> list[Tensor]:
    """No bias at all, or one for each: zeros where a linear has none."""
    if all(bias is None for bias in biases):
        return []
    some = next(bias for bias in biases if bias is not None)
    return [some.new_zeros(w.rows) if bias is None else bias for bias, w in zip(biases, weights, strict=True)]


def _forward(
    x: Tensor,  # [..., in]
    stored: list[Tensor],
    biases: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    seed: Tensor | None,
    scales: list[float],
    quant_type: str,
    blocksize: int,
    dropout: float,
    keep: bool,
    form: str,
) -> list[Tensor]:
    """Each y, then s [M, sum of ranks], then the decoded weights to keep."""
    group = _group(stored, biases, A, B, seed, scales, quant_type, blocksize, dropout)
    with _no_autocast(x):
        result = _run_forward(_matrix(x), group, keep, form)
    unsafe_view = torch.ops.aten._unsafe_view  # not a view of another tensor: the caller may write into it
    return [*(unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in result.outputs), result.s, *result.dense]


def _backward(
    grads: list[Tensor],  # [..., out]
    x: Tensor,
    s: Tensor,
    dense: list[Tensor],
    stored: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    seed: Tensor | None,
    scales: list[float],
    quant_type: str,
    blocksize: int,
    dropout: float,
    need_x: bool,
) -> list[Tensor]:
    """The gradients of all A as one matrix, of each B, and, if needed, of x."""
    group = _group(stored, [], A, B, seed, scales, quant_type, blocksize, dropout)
    with _no_autocast(x):
        result = _run_backward([_matrix(g) for g in grads], _matrix(x), s, group, dense, need_x)
    return [result.A, *result.B, *([] if result.x is None else [result.x.view(x.shape)])]


def _group(
    stored: list[Tensor],
    biases: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    seed: Tensor | None,
    scales: list[float],
    quant_type: str,
    blocksize: int,
    dropout: float,
) -> Group:
    n = len(A)
    packed, absmax = stored[:n], stored[n : 2 * n]
    nested: list[Any] = stored[2 * n : 3 * n] or [None] * n
    offsets: list[Any] = stored[3 * n :] or [None] * n
    weights = [
        Weight4bit(codes, scale, nest, offset, (b.shape[0], a.shape[1]), quant_type, blocksize)
        for codes, scale, nest, offset, a, b in zip(packed, absmax, nested, offsets, A, B, strict=True)
    ]
    # Kernels read A and B row by row; a transposed master (an SVD's factor, say) is copied, others are not.
    return Group(weights, biases, [a.contiguous() for a in A], [b.contiguous() for b in B], scales, dropout, seed)


def _run_forward(x: Tensor, group: Group, keep: bool, form: str) -> Result:
    path = _path(x)
    if path == "reference":
        return forward_reference(x, group, keep)
    if path == "cpu":
        return forward_cpu(x, group, keep)
    from . import lora_cuda  # only here: Triton exists for Linux only and is slow to import

    return lora_cuda.forward(x, group, keep, form or lora_cuda.plan(x, group, keep))


def _run_backward(
    grads: list[Tensor], x: Tensor, s: Tensor, group: Group, dense: list[Tensor], need_x: bool
) -> Gradients:
    path = _path(x)
    if path == "reference":
        return backward_reference(grads, x, s, group, dense, need_x)
    if path == "cpu":
        return backward_cpu(grads, x, s, group, dense, need_x)
    from . import lora_cuda

    return lora_cuda.backward(grads, x, s, group, dense, need_x)


def _path(x: Tensor) -> str:
    """The dispatcher's, but the quick form of plain PyTorch where no kernel takes x."""
    path = dispatch.path_for(x)
    return "cpu" if path == "triton" and (x.dtype not in KERNEL_DTYPES or x.numel() == 0) else path


def _matrix(x: Tensor) -> Tensor:
    """x [..., features] as [M, features] with columns at stride 1."""
    matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The op settles its dtypes itself; autocast would change them once more inside."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


_forward_op = torch.library.custom_op("fourbit::lora_linears4bit", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fourbit::lora_linears4bit_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, stored: list[Tensor], biases: Any, A: list[Tensor], B: list[Tensor], *rest: Any) -> list[Tensor]:
    prepare(x, rest[-5])  # rest ends with quant_type, blocksize, dropout, keep, form
    path, keep, rank = _path(x), rest[-2], sum(a.shape[0] for a in A)
    weights = [Weight4bit(b, b, None, None, (b.shape[0], x.shape[-1])) for b in B]  # of which only sizes matter
    dtype = {"reference": wide(x), "cpu": group_dtype(x, weights), "triton": x.dtype}[path]
    width = x.shape[-1] + (padded(rank) if path == "triton" else 0)
    outputs = [x.new_empty(*x.shape[:-1], b.shape[0]) for b in B]
    s = x.new_empty(x.shape[:-1].numel(), rank, dtype=dtype)
    return [*outputs, s, *(x.new_empty(b.shape[0], width, dtype=dtype) for b in B if keep)]


@_backward_op.register_fake
def _(
    grads: Any, x: Tensor, s: Tensor, dense: Any, stored: Any, A: list[Tensor], B: list[Tensor], *rest: Any
) -> list[Tensor]:
    of_A = x.new_empty(s.shape[1], x.shape[-1], dtype=torch.promote_types(s.dtype, torch.float32))
    return [of_A, *(b.new_empty(b.shape) for b in B), *([x.new_empty(x.shape)] if rest[-1] else [])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, stored, biases, A, B, seed, *numbers = inputs
    s, dense = output[len(A)], output[len(A) + 1 :]
    ctx.mark_non_differentiable(s, *dense)
    ctx.set_materialize_grads(False)
    lists = (dense, stored, A, B)
    ctx.save_for_backward(x, s, seed, *(tensor for tensors in lists for tensor in tensors))
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.numbers = numbers[:-2]  # all but keep and form
    ctx.biases = [bias.dtype if bias.requires_grad else None for bias in biases]


def _differentiate(ctx: Any, grads: Sequence[Tensor | None], backward: Any = _backward_op) -> tuple[Any, ...]:
    x, s, seed, *rest = ctx.saved_tensors
    dense, stored, A, B = _split(rest, ctx.sizes)
    each = [
        x.new_zeros(*x.shape[:-1], b.shape[0]) if g is None else g for g, b in zip(grads, B, strict=False)
    ]  # None: an output that the loss does not use
    need_x = ctx.needs_input_grad[0]
    of_A, *of_B = backward(each, x, s, dense, stored, A, B, seed, *ctx.numbers, need_x)
    of_x = of_B.pop() if need_x else None
    of_A = [part.to(a.dtype) for part, a in zip(of_A.split([len(a) for a in A]), A, strict=True)]
    of_biases = [
        None if dtype is None else _matrix(g).sum(0, dtype=dtype) for g, dtype in zip(each, ctx.biases, strict=False)
    ]
    return of_x, [None] * len(stored), of_biases, of_A, of_B, *[None] * 7


_forward_op.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same op without torch.library."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor | None, numbers: tuple[Any, ...], sizes: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = (x, *_split(tensors, sizes), seed, *numbers)
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, *lists = _differentiate(ctx, grads, _backward)[:5]
        return of_x, None, None, None, *chain.from_iterable(lists)


def _split(tensors: Sequence[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    places = iter(tensors)
    return [list(islice(places, size)) for size in sizes]


def _check(
    x: Tensor,
    weights: Sequence[Weight4bit],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    form: str,
    keep: bool,
) -> None:
    if not len(weights) == len(biases) == len(As) == len(Bs) == len(scales) > 0:
        raise ValueError(
            "lora_linears4bit needs a bias (or None), A, B and scale for each of its weights, and at least one weight; "
            f"got {len(weights)} weights, {len(biases)} biases, {len(As)} A, {len(Bs)} B, {len(scales)} scales"
        )
    if len({(w.quant_type, w.blocksize, w.nested_absmax is None) for w in weights}) > 1:
        raise ValueError("weights of one call must share quant_type, blocksize and whether they are double quantised")
    if form and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, or '' for the dispatcher's choice, got {form!r}")
    if form == "fused" and keep:
        raise ValueError("form 'fused' decodes no weight that could be kept: leave out form or keep")
    for weight, A, B in zip(weights, As, Bs, strict=True):
        shapes = (x.shape[-1:], A.shape[1:], B.shape)
        if shapes != ((weight.columns,), (weight.columns,), (weight.rows, *A.shape[:1])):
            raise ValueError(
                f"for a weight {(weight.rows, weight.columns)} (out, in) x must be [..., in], A [rank, in] and "
                f"B [out, rank], got x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
            )
