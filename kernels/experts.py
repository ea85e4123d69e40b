"""Mixture of experts: rows sorted by the expert that they go to, and a product with one matrix for each expert's rows.

The rows of an expert stand together, so each product is one of a slice, and what is in 4 bits is decoded an expert at a
time, in forward and again in backward. On CUDA, with at least a row an expert, torch's grouped product does all in one
launch, with all experts decoded at once, and needs no word from the device on where slices end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .lora_paths import WHOLE

Decode = Callable[[Any, torch.dtype], Tensor]  # what an index takes of [E, K, M], decoded in that dtype; of None all


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """y [N, M] in x's dtype, whose rows between ends[e - 1] and ends[e] are those of x [N, K] times matrices[e] [K, M].

    ends: int32 [E]; rows after the last end are 0. Gradients flow to x and to the matrices.
    """
    if _in_one_launch(x, ends) and all(size % 8 == 0 for size in matrices.shape[1:]):  # rows of whole 16 bytes
        return torch._grouped_mm(x, matrices.to(x.dtype), offs=ends)
    parts = x.tensor_split(ends.tolist())
    made = [part @ matrix for part, matrix in zip(parts, matrices.to(x.dtype).unbind(0), strict=False)]
    return torch.cat([*made, parts[-1].new_zeros(len(parts[-1]), matrices.shape[2])])


def grouped_frozen(x: Tensor, decode: Decode, shape: Sequence[int], ends: Tensor) -> Tensor:
    """The same with frozen matrices of `shape` [E, K, M], which are decoded, and again in backward; none is kept."""
    y: Tensor = _Frozen.apply(x, decode, shape, ends, None if _in_one_launch(x, ends) else ends.tolist())
    return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Decode, shape: Sequence[int], ends: Tensor, stops: Any) -> Tensor:
        ctx.of = decode, shape, ends, stops
        if stops is None:
            return torch._grouped_mm(x.contiguous(), decode(None, x.dtype), offs=ends)
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
        decode, (experts, rows, columns), ends, stops = ctx.of
        back = lambda index, dtype: decode(index, dtype).mT  # noqa: E731
        return _Frozen.apply(g, back, (experts, columns, rows), ends, stops), None, None, None, None


def _in_one_launch(x: Tensor, ends: Tensor) -> bool:
    return dispatch.path_for(x) == "triton" and x.dtype == torch.bfloat16 and len(x) >= len(ends)
