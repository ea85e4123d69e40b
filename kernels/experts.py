"""Mixture of experts: rows sorted by the expert that they go to, and one product for each expert's rows.

The rows of an expert stand together, so a product with all experts is a product for each slice, and what is decoded
from 4 bits is one expert at a time, in forward and again in backward. On CUDA with at least a row an expert it is one
launch for all of them (torch's grouped product, of 16 bits), which needs no word from the device on where slices end.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .derivatives import beyond_first, derivatives, transformed

Matrices = Callable[[int | None, torch.dtype], Tensor]  # of expert e [K, M], or of all [E, K, M], in that dtype


def sorted_rows(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Of index [T, k], the experts of each token: which (token, choice) pairs stand where once they are sorted by
    expert, int64 [T k], and where each expert's pairs end there, int32 [experts]. Those of equal experts keep their
    order; an index of `experts` or more, which stands for none, comes last and after every end."""
    flat = index.reshape(-1)
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=flat.device)
    counts.index_add_(0, flat.clamp(max=experts), torch.ones_like(flat, dtype=torch.int32))
    return flat.argsort(stable=True), counts[:-1].cumsum(0, dtype=torch.int32)


def spread(x: Tensor, order: Tensor) -> Tensor:
    """x [T, H] as the row of every pair: [T k, H] in the order of `sorted_rows`."""
    rows: Tensor = _Rows.apply(x, order, len(order) // max(len(x), 1), True)
    return rows


def gathered(rows: Tensor, order: Tensor, tokens: int) -> Tensor:
    """The way back: rows [T k, H] summed over each token's pairs, [T, H]."""
    sums: Tensor = _Rows.apply(rows, order, len(order) // max(tokens, 1), False)
    return sums


class _Rows(torch.autograd.Function):
    """Each way is the other's derivative; both read each place once, so that no sum depends on an order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, k: int, out: bool) -> Tensor:
        if out:
            return x[order // k]
        return x[order.argsort()].view(-1, k, x.shape[1]).sum(1) if k else x.new_zeros(0, x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, order, ctx.k, ctx.out = inputs
        ctx.save_for_backward(order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rows.apply(g, ctx.saved_tensors[0], ctx.k, not ctx.out), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Rows.apply(tangent, ctx.saved_tensors[0], ctx.k, ctx.out)


def grouped_product(x: Tensor, matrices: Tensor | Matrices, ends: Tensor) -> Tensor:
    """y [N, M] in x's dtype, whose rows between ends[e - 1] and ends[e] are those of x [N, K] times matrix e [K, M].

    ends: int32 [E]; rows after the last one are 0. Matrices are a tensor [E, K, M] or a function that decodes frozen
    ones, called again in backward: none is kept. Gradients flow to x and to the tensor, of any order.
    """
    of, tensor = (matrices, None) if callable(matrices) else (_of(matrices), matrices)
    if transformed():
        return _plain(x, tensor, of, ends)
    y: Tensor = _Grouped.apply(x, tensor, of, ends)
    return y


def grouped_reference(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The definition, for a tensor [E, K, M], on any device."""
    parts = [x[a:b] @ matrix.to(x.dtype) for matrix, (_, a, b) in zip(matrices, _slices(ends, empty=True), strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - int(ends[-1]), matrices.shape[2])])


def _of(tensor: Tensor) -> Matrices:
    return lambda e, dtype: (tensor if e is None else tensor[e]).to(dtype)


def _slices(ends: Tensor, empty: bool = False) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and end, for those that have rows."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if empty or end > start:
            yield e, start, end
        start = end


def _plain(x: Tensor, tensor: Tensor | None, of: Matrices, ends: Tensor) -> Tensor:
    return grouped_reference(x, of(None, x.dtype) if tensor is None else tensor, ends)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Tensor | None, of: Matrices, ends: Tensor) -> Tensor:
        h = x.to(dispatch.product_dtype(x))
        ctx.save_for_backward(x if tensor is not None else None, tensor, ends)
        ctx.of, ctx.like = of if tensor is None else None, h[:0]
        return _times(h, of, ends).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, tensor, ends = ctx.saved_tensors
        of, (need_x, need_tensor) = ctx.of or _of(tensor), ctx.needs_input_grad[:2]
        if beyond_first():
            x = g.new_zeros(len(g), of(0, g.dtype).shape[0], requires_grad=True) if x is None else x  # y is linear in x

            def plain(x: Tensor, tensor: Tensor | None = None) -> Tensor:
                return _plain(x, tensor, of, ends)

            inputs = (x,) if tensor is None else (x, tensor)
            found = derivatives(plain, inputs, (need_x, need_tensor)[: len(inputs)], [g])
            return found[0], found[1] if tensor is not None else None, None, None
        h = g.to(ctx.like.dtype)
        grad_x = _times(h, lambda e, dtype: of(e, dtype).mT, ends).to(g.dtype) if need_x else None
        return grad_x, _outer(x.to(h.dtype), h, tensor, ends) if need_tensor else None, None, None


def _times(h: Tensor, of: Matrices, ends: Tensor) -> Tensor:
    if _in_one_launch(h, ends):
        return torch._grouped_mm(h.contiguous(), of(None, h.dtype), offs=ends)
    y = None
    for e, a, b in _slices(ends):
        matrix = of(e, h.dtype)
        y = h.new_empty(len(h), matrix.shape[1]) if y is None else y
        torch.mm(h[a:b], matrix, out=y[a:b])
        last = b
    if y is None:
        return h.new_zeros(len(h), of(0, h.dtype).shape[1])
    y[last:] = 0
    return y


def _outer(x: Tensor, g: Tensor, tensor: Tensor, ends: Tensor) -> Tensor:
    """The gradient of each matrix [E, K, M], in its dtype."""
    made = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    for e, a, b in _slices(ends):
        made[e] = x[a:b].T @ g[a:b]
    return made


def _in_one_launch(h: Tensor, ends: Tensor) -> bool:
    return dispatch.path_for(h) == "triton" and h.dtype == torch.bfloat16 and len(h) >= len(ends)
