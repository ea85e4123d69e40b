"""Dense layers with one input as one product for several rows on a CPU, whose weight lies as oneDNN's kernels read it.

In fp32 that takes half to two thirds of the time of a plain product with 8 to 32 rows (AVX2); for one row it is slower.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

ROWS = 8  # that it is laid out for; others above one are served as well


def can_pack(layers: Sequence[Any]) -> TypeGuard[Sequence[nn.Linear]]:
    """Whether these are plain layers of fp32, all with a bias or none, on a CPU for which torch has these kernels."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    kinds = {(layer.weight.device.type, layer.weight.dtype, layer.bias is None) for layer in layers}
    here = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return here and len(kinds) == 1 and kinds <= {("cpu", torch.float32, True), ("cpu", torch.float32, False)}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in], plain or laid out, by oneDNN; no gradient."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class Packed(nn.Module):
    """x [..., in] -> the outputs of all layers, [..., sum of out]; it has no gradient."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class Part(nn.Module):
    """A layer of a `Packed` by itself, which computes them all for it, with the layer's hooks."""

    joined: tuple[Packed, tuple["Part", ...]]  # what `project` asks for

    def __init__(self, layer: nn.Linear, first: int) -> None:
        super().__init__()
        vars(self).update({name: held for name, held in vars(layer).items() if "hook" in name})
        self.out_features, self.first = layer.out_features, first
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The layer's, [out, in], made anew."""
        return self.joined[0].weight.to_dense()[self.first : self.first + self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        return self.joined[0](x)[..., self.first : self.first + self.out_features]


def packed(layers: Sequence[nn.Linear]) -> list[Part]:
    """What stands for each of these layers, which share their input; for layers that `can_pack`."""
    ends = [0]
    for layer in layers:
        ends.append(ends[-1] + layer.out_features)
    parts = tuple(Part(layer, first) for layer, first in zip(layers, ends, strict=False))
    whole = Packed(layers)
    for part in parts:
        vars(part)["joined"] = whole, parts  # no child of it: that would be a circle of modules
    return [*parts]
