"""Several LoRA projections of one input (q/k/v, gate/up), forward and backward, in one pass and apart."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from fourbit.lora.project import project

from . import gate
from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .lora_buffers import ALPHA, Buffers, factors, fused, grouped_gradients, lora_bytes
from .ops_linear import scales_late
from .peers import bnb, fused_lora, peft_lora
from .shapes import Grid, Projection
from .timing import Call, sets_for
from .weights import Weights

APART = "ours, apart"
USUAL_ROWS = (2048, 8192)


def cases(grid: Grid, setting: Setting) -> list[Case]:
    found, rank = [], grid.ranks[0]
    for model in dict.fromkeys(shape.model for shape in grid.projections):
        for name, shapes in groups([shape for shape in grid.projections if shape.model == model]).items():
            for M in grid.rows:
                point = Point("grouped", model, name, 0, shapes[0].K, M, rank)
                found.append(Case(point, 4 if M in USUAL_ROWS else 5, partial(grouped, shapes, M, rank, setting)))
    return found


def groups(shapes: Sequence[Projection]) -> dict[str, list[Projection]]:
    """The projections of one model that share their input."""
    by_name = {shape.name: shape for shape in shapes}
    found = {}
    if {"q/o", "k/v"} <= by_name.keys():
        found["q, k, v"] = [by_name["q/o"], by_name["k/v"], by_name["k/v"]]
    if "gate/up" in by_name:
        found["gate, up"] = [by_name["gate/up"]] * 2
    return found


def grouped(shapes: Sequence[Projection], M: int, rank: int, setting: Setting) -> Work:
    absent: dict[str, str] = {}
    moved = sum(sum(lora_bytes(shape, M, setting)) for shape in shapes)
    sets = sets_for(moved, setting.cache_bytes, most=8)
    weights = [Weights.random(s.N, s.K, setting.device, sets, seed=i) for i, s in enumerate(shapes)]
    buffers = [Buffers(shape, M, rank, setting, sets, seed=10 * i) for i, shape in enumerate(shapes)]
    x = buffers[0].x

    @cache
    def truths(late: bool) -> list[dict[str, gate.Bounded]]:
        found = []
        for each, weight in zip(buffers, weights, strict=True):
            exact = weight.exact if late else weight.rounded(setting.dtype)
            truth = gate.LoRATruth(x[0].detach(), each.grad[0], exact, each.A, each.B, ALPHA / rank, scaled_late=late)
            found.append(truth.outputs())
        unit = gate.UNIT[setting.dtype]
        parts = [truth.pop("dx") for truth in found]
        dx = sum(part.exact for part in parts)
        sums = (len(parts) - 1) * unit * sum(part.exact.abs() for part in parts)  # of parts as they are rounded
        found[0]["dx"] = gate.Bounded(dx, sum(part.bound for part in parts) + sums)
        return found

    def judge(given: list[dict[str, Tensor]], late: bool) -> float:
        pairs = zip(truths(late), given, strict=True)
        return max(bounded.worst(one[name]) for truth, one in pairs for name, bounded in truth.items())

    def called(layers: list[list[nn.Module]], adapter: Callable[[Any], Any], together: Any = None) -> Call:
        def call(i: int) -> list[dict[str, Tensor]]:
            ys = together(x[i], layers[i]) if together else [layer(x[i]) for layer in layers[i]]
            return grouped_gradients(ys, [adapter(layer) for layer in layers[i]], x[i], [b.grad[i] for b in buffers])

        return call

    pairs = list(zip(buffers, weights, strict=True))

    def ours(apart: bool) -> Call:
        layers = [[b.ours(w, i, 0.0) for b, w in pairs] for i in range(sets)]
        if apart:
            return called(layers, factors)
        return called(layers, factors, project)

    def peft() -> Call:
        base = lambda b, w, i: bnb.module(w.copies[i], (w.N, w.K), setting.dtype)  # noqa: E731
        layers = [
            [peft_lora.linear(base(b, w, i), b.A, b.B, ALPHA, 0.0).train() for b, w in pairs] for i in range(sets)
        ]
        return called(layers, peft_lora.adapter)

    own_late, peer_late = scales_late(x[0], weights), bnb.FUSED_TO >= M
    judge_own = partial(judge, late=own_late)
    variants = [
        Variant(OURS, lambda: ours(False), judge_own, own=True),
        Variant(APART, lambda: ours(True), judge_own, own=True),
    ]
    if present(bnb.missing(), absent, "bitsandbytes"):
        variants.append(Variant(fused_lora.NAME, lambda: fused(weights, buffers, setting), partial(judge, late=False)))
        if present(peft_lora.missing(), absent, "peft"):
            variants.append(Variant(peft_lora.QLORA, peft, partial(judge, late=peer_late)))
    total = sum(shape.weights for shape in shapes)
    flops = 4.0 * M * total + sum(6.0 * M * rank * (shape.N + shape.K) for shape in shapes)
    return Work(variants, flops, moved, sets, setting.way, absent, peak=True)
