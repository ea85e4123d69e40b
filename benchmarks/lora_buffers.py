"""What the LoRA cases share: inputs and adapters in every set, our layer over them, and the published method's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fourbit import AdapterLayer, LoRA

from .cases import Setting
from .peers import bnb, fused_lora
from .shapes import Projection
from .timing import Call
from .weights import BYTES_PER_PARAMETER, Weights

ALPHA = 32.0  # alpha / rank is a power of two for both ranks, so scaling never rounds
NAMES = ("y", "dx", "dA", "dB")


class Buffers:
    """x and the gradient of y, in every set, and the adapter, in the run's dtype."""

    def __init__(self, shape: Projection, M: int, rank: int, setting: Setting, sets: int, seed: int = 0) -> None:
        self.setting, self.sets, self.rank = setting, sets, rank
        self.x = copies(setting.normal(M, shape.K, seed=seed + 1), sets)
        self.grad = copies(setting.normal(M, shape.N, seed=seed + 2), sets)
        self.A = setting.normal(rank, shape.K, seed=seed + 3, scale=shape.K**-0.5)
        self.B = setting.normal(shape.N, rank, seed=seed + 4, scale=rank**-0.5)
        for x in self.x:
            x.requires_grad_()

    def ours(self, weights: Weights, i: int, dropout: float) -> AdapterLayer:
        """fp32 masters of the adapter, as `attach` makes them."""
        base = weights.layer(i)
        part = LoRA(base, self.rank, ALPHA, dropout)
        part.lora_A = nn.Parameter(self.A.float())
        part.lora_B = nn.Parameter(self.B.float())
        return AdapterLayer(base, default=part).train()

    def gradients(self, y: Tensor, A: Tensor, B: Tensor, i: int) -> dict[str, Tensor]:
        return dict(zip(NAMES, (y, *torch.autograd.grad(y, [self.x[i], A, B], self.grad[i])), strict=True))


def factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """A and B of a layer of ours."""
    part = layer.adapters["default"]
    return part.lora_A, part.lora_B


def copies(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def lora_bytes(shape: Projection, M: int, setting: Setting) -> tuple[float, float]:
    """The least that forward and backward move of weights (decoded inside the products), and of activations."""
    return 2 * BYTES_PER_PARAMETER * shape.weights, setting.dtype.itemsize * M * (3 * shape.K + 2 * shape.N)


def fused(weights: Sequence[Weights], buffers: Sequence[Buffers], setting: Setting) -> Call:
    """The published method over one weight or several that share the first's x; a dict of results for each."""
    first, adapters = buffers[0], []
    for each in buffers:
        adapters.append((each.A.clone().requires_grad_(), each.B.clone().requires_grad_()))
    state = lambda w, i: bnb.state(w.copies[i], (w.N, w.K), setting.dtype, nested=True)  # noqa: E731
    frozen = [[(w.copies[i], state(w, i)) for w in weights] for i in range(first.sets)]
    scale = ALPHA / first.rank

    def call(i: int) -> list[dict[str, Tensor]]:
        ys = fused_lora.linears(first.x[i], frozen[i], adapters, scale)
        return grouped_gradients(ys, adapters, first.x[i], [each.grad[i] for each in buffers])

    return call


def grouped_gradients(
    ys: Sequence[Tensor], adapters: Sequence[tuple[Tensor, Tensor]], x: Tensor, grads: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """One dict a projection; "dx" is the sum over all and stands in the first."""
    flat = [tensor for pair in adapters for tensor in pair]
    dx, *rest = torch.autograd.grad(list(ys), [x, *flat], list(grads))
    found = [{"y": y, "dA": rest[2 * i], "dB": rest[2 * i + 1]} for i, y in enumerate(ys)]
    found[0]["dx"] = dx
    return found
