"""A frozen copy of an adapter, and a block inside which the model computes with it in place of its own.

So the reference of preference training, or a teacher that is the same base with another adapter, costs the memory of
an adapter and not of a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attach import lora_modules


class Factors(NamedTuple):
    """One layer's update, scale * B A."""

    lora_A: Tensor  # [r, in]
    lora_B: Tensor  # [out, r]
    alpha: float
    rslora: bool


@dataclass(frozen=True)
class Snapshot:
    """An adapter apart from any model: the path of each layer, and its factors."""

    layers: dict[str, Factors]


def snapshot(model: nn.Module) -> Snapshot:
    """A copy of the model's adapter as it is now; a layer that is switched off is not in it."""
    return Snapshot(
        {
            name: Factors(m.lora_A.detach().clone(), m.lora_B.detach().clone(), m.alpha, m.rslora)
            for name, m in lora_modules(model).items()
            if m.enabled
        }
    )


@contextmanager
def adapter_swapped(model: nn.Module, other: Snapshot) -> Iterator[None]:
    """Inside, the model's adapter is `other`; layers that `other` lacks compute what their base computes.

    Gradients are off inside: the parameters are the same objects with other values, so a graph made here would be wrong
    as soon as they are put back. ValueError for a layer of `other` that carries no adapter in the model.
    """
    modules = lora_modules(model)
    if unknown := other.layers.keys() - modules.keys():
        raise ValueError(f"the other adapter has layers on which this model carries none: {sorted(unknown)[:3]}")
    before = {name: (m.lora_A.data, m.lora_B.data, m.rank, m.alpha, m.rslora, m.enabled) for name, m in modules.items()}
    try:
        with torch.no_grad():
            for name, module in modules.items():
                module.enabled = name in other.layers
                if module.enabled:
                    a, b, alpha, rslora = other.layers[name]
                    module.lora_A.data, module.lora_B.data = a, b
                    module.rank, module.alpha, module.rslora = len(a), alpha, rslora
            yield
    finally:
        for name, module in modules.items():
            a, b, module.rank, module.alpha, module.rslora, module.enabled = before[name]
            module.lora_A.data, module.lora_B.data = a, b
