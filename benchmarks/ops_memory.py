"""Device memory of stacked 4-bit LoRA layers, forward and backward, beside the same layers with dense weights.

A QLoRA linear must take one workspace for its decoded weight, whatever the number of layers. What the activations
take is the same for 4-bit and dense layers, so the difference of the peaks is the workspace. Weights lie outside it:
they are there before. GPU only: a CPU's allocator does not say what it had at its peak.
"""

from functools import partial

import torch
from torch import Tensor, nn

from fourbit import AdapterLayer, LoRA

from .cases import OURS, Case, Point, Setting, Variant, Work
from .lora_buffers import ALPHA
from .peers import dense
from .shapes import Grid, Projection
from .timing import Call
from .weights import Weights

DENSE = "ours over dense weights"
LAYERS = (2, 8)  # alternately [N, K] and [K, N]
ROWS = 2048


def cases(grid: Grid, setting: Setting) -> list[Case]:
    if setting.device.type != "cuda":
        return []
    largest = max(grid.projections, key=lambda shape: (shape.model == grid.decoder.model, shape.weights))
    rank = grid.ranks[0]
    point = lambda layers: Point("memory", largest.model, f"{layers} layers", largest.N, largest.K, ROWS, rank)  # noqa: E731
    return [Case(point(n), 1, partial(memory, largest, n, ROWS, rank, setting)) for n in LAYERS]


def memory(shape: Projection, layers: int, rows: int, rank: int, setting: Setting) -> Work:
    sizes = [(shape.N, shape.K), (shape.K, shape.N)]
    weights = [Weights.random(*sizes[i % 2], setting.device, 1, seed=i) for i in range(layers)]
    x = setting.normal(rows, shape.K, seed=1).requires_grad_()
    dtype = setting.dtype

    def stack(quantised: bool) -> Call:
        bases = [each.layer(0) if quantised else dense.module(each.decoded(dtype)) for each in weights]
        model = nn.Sequential(*(AdapterLayer(base, default=LoRA(base, rank, ALPHA)) for base in bases))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def call(i: int) -> Tensor:
            y = model(x)
            torch.autograd.grad(y.square().sum(), [x, *trained])
            return y.detach()

        return call

    truth = x.detach()
    for each in weights:  # adapters start at zero
        truth = truth @ each.decoded(dtype).T

    def judge(y: Tensor) -> float:
        """Each product may round differently by a unit, and they add up through the layers."""
        error = (y.double() - truth.double()).norm() / truth.double().norm()
        return float(error) / (2.0 * layers * torch.finfo(dtype).eps)

    variants = [Variant(OURS, lambda: stack(True), judge, own=True), Variant(DENSE, lambda: stack(False), judge)]
    flops = 4.0 * rows * shape.weights * layers
    extra = {"workspace_bytes": dtype.itemsize * shape.weights}
    return Work(variants, flops, 0.0, 1, setting.way, {}, peak=True, extra=extra)
