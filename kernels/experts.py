"""Mixture of experts: a product with one matrix for each expert's rows, which stand together.

What is in 4 bits is decoded an expert at a time, small ones together, in forward and again in backward. On CUDA, with a
row an expert or more, torch's grouped product is one launch, and needs no word from the device on where slices end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .lora_paths import WHOLE

PLAIN = Tensor.__torch_function__, torch.nn.Parameter.__torch_function__  # of classes; a mode around changes nothing
Decode = Callable[[Any, torch.dtype], Tensor]  # what an index takes of [E, K, M], decoded in that dtype; of None all


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """y [N, M] in x's dtype, whose rows between ends[e - 1] and ends[e] are those of x [N, K] times matrices[e] [K, M].

    ends: int32 [E]. Rows after the last end are 0, but in one launch on CUDA, which leaves them unwritten, here and in
    the gradient of x: use none of them. Gradients flow to x and to the matrices."""
    if type(matrices).__torch_function__ not in PLAIN:  # they make the product, from 4 bits or with adapters
        return torch._grouped_mm(x, matrices, offs=ends)
    if _in_one_launch(x, ends) and all(size % 8 == 0 for size in matrices.shape[1:]):  # rows of whole 16 bytes
        return torch._grouped_mm(x, matrices.to(x.dtype), offs=ends)
    parts = x.tensor_split(_stops(x, ends))
    made = [part @ matrix for part, matrix in zip(parts, matrices.to(x.dtype).unbind(0), strict=False)]
    return torch.cat([*made, parts[-1].new_zeros(len(parts[-1]), matrices.shape[2])])


class GroupedFrozen(torch.autograd.Function):
    """The same with frozen matrices of `shape` [E, K, M], decoded, and again in backward; `stored` as TimesFrozen's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Decode, shape: Sequence[int], ends: Tensor, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(ends, *stored)
        ctx.of = decode, shape
        if _in_one_launch(x, ends):
            return torch._grouped_mm(x.contiguous(), decode(None, x.dtype), offs=ends)
        stops = _stops(x, ends)
        y, step = x.new_empty(len(x), shape[2]), max(1, WHOLE // max(1, shape[1] * shape[2]))  # small ones at once
        for first in range(0, shape[0], step):
            starts = ([0, *stops])[first : first + step + 1]
            if starts[0] < starts[-1]:
                dense = decode(slice(first, first + step), x.dtype)
                for matrix, a, b in zip(dense, starts, starts[1:], strict=False):
                    torch.mm(x[a:b], matrix, out=y[a:b])
        y[stops[-1] :] = 0
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (decode, (e, k, m)), kept = ctx.of, ctx.saved_tensors
        turned: Decode = lambda i, dtype: decode(i, dtype).mT  # noqa: E731  # typed
        return GroupedFrozen.apply(g, turned, (e, m, k), *kept), None, None, *[None] * len(kept)


def _stops(x: Tensor, ends: Tensor) -> list[int]:
    """`ends` on the host; on meta, where a forecast asks for sizes alone, equal parts."""
    return [len(x) * i // len(ends) for i in range(1, len(ends) + 1)] if ends.is_meta else ends.tolist()


def _in_one_launch(x: Tensor, ends: Tensor) -> bool:
    return dispatch.path_for(x) == "triton" and x.dtype == torch.bfloat16 and len(x) >= len(ends)
