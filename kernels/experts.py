"""Mixture of experts: rows sorted by the expert that they go to, and a product with one matrix for each expert's rows.

The rows of an expert stand together, so each product is one of a slice, and what is in 4 bits is decoded an expert at a
time, in forward and again in backward. On CUDA, with at least a row an expert, torch's grouped product does all in one
launch, with all experts decoded at once, and needs no word from the device on where slices end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .lora_paths import times_frozen

Decode = Callable[[Any, torch.dtype], Tensor]  # matrix e [K, M] in that dtype; of None all of them [E, K, M]


def sorted_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Of index [T, k], the experts of each token: its places [T k] in the order of their experts, int64, those of one
    expert in their own order; and where each expert's end there, int32 [experts]."""
    flat = index.reshape(-1)
    counts = torch.zeros(experts, dtype=torch.int32, device=flat.device)
    counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return flat.argsort(stable=True), counts.cumsum(0, dtype=torch.int32)


def grouped_product(x: Tensor, matrices: Tensor | Decode, ends: Tensor) -> Tensor:
    """y [N, M] in x's dtype, whose rows between ends[e - 1] and ends[e] are those of x [N, K] times matrix e [K, M].

    ends: int32 [E]; rows after the last end are 0. The matrices are a tensor [E, K, M], which gets gradients, or what
    decodes frozen ones: called again in backward, so that no dense one is kept.
    """
    if dispatch.path_for(x) == "triton" and x.dtype == torch.bfloat16 and len(x) >= len(ends):
        if callable(matrices):
            return times_frozen(x, partial(matrices, None), False, ends)
        if all(size % 8 == 0 for size in matrices.shape[1:]):  # it wants rows of whole 16 bytes
            return torch._grouped_mm(x, matrices.to(x.dtype), offs=ends)
    stops = ends.tolist()
    *parts, rest = x.split([b - a for a, b in zip([0, *stops], [*stops, len(x)], strict=True)])
    if callable(matrices):
        made = [times_frozen(part, partial(matrices, e), False) for e, part in enumerate(parts) if len(part)]
    else:
        made = [part @ matrix for part, matrix in zip(parts, matrices.to(x.dtype).unbind(0), strict=True)]
    width = matrices(0, x.dtype).shape[1] if callable(matrices) and not made else made[0].shape[1]
    return torch.cat([*made, rest.new_zeros(len(rest), width)])
