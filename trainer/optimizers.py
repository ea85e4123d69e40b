"""The optimizer that a run's options name, over groups of the parameters that it trains."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import optim
from ..errors import InputError
from ..optim.groups import parameter_groups
from ..optim.optimizer import FlatOptimizer
from .config import PAGED, OptimizerName, size_in_bytes


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    weight_decay: float,
    max_grad_norm: float,
    name: OptimizerName = "adamw",
    budget: str = "auto",
    lora_plus: float = 1.0,
    lr_scale: Mapping[str, float] | None = None,
    stochastic_rounding: bool = False,
) -> FlatOptimizer:
    """An optimizer that measures the gradients' norm, clips it where max_grad_norm is above 0, and skips what is not
    finite. Its groups' learning rates are 0, and "lr_scale" of each is the factor on the rate of a step.

    Raises InputError for patterns in lr_scale that match nothing, or leave nothing to train, and for
    stochastic_rounding where nothing that is trained has few enough bits to be rounded so.
    """
    try:
        groups: list[dict[str, Any]] = parameter_groups(
            parameters.items(), lr=0.0, weight_decay=weight_decay, lora_plus=lora_plus, lr_scale=lr_scale
        )
    except ValueError as error:
        raise InputError(f"lr_scale: {error}") from None
    if not groups:
        raise InputError("lr_scale leaves nothing to train: the factor of every parameter is 0")
    if stochastic_rounding and not any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for group in groups for p in group["params"]})
        raise InputError(
            f"stochastic_rounding is for weights in bfloat16, but all that are trained here are {' or '.join(dtypes)}; "
            "it helps where all weights of a model (full) are trained in dtype bfloat16"
        )
    kind = optim.Lion if "lion" in name else optim.AdamW
    return kind(
        groups,
        lr=0.0,
        bits=8 if name.endswith("8bit") else 32,
        budget=_budget(budget) if name.startswith(PAGED) else None,
        max_grad_norm=max_grad_norm or math.inf,
        stochastic_rounding=stochastic_rounding,
    )


def _budget(text: str) -> Any:
    return "auto" if text == "auto" else size_in_bytes(text)


def paging(optimizer: FlatOptimizer) -> dict[str, int | float]:
    """What its pagers did so far, under the names of metrics; empty if it does not page."""
    counters = [pager.counters for pager in optimizer.pagers.values()]
    names = ("hits", "misses", "evictions", "bytes_in", "bytes_out", "stall_seconds")
    return {f"page_{name}": sum(getattr(each, name) for each in counters) for name in names if counters}
