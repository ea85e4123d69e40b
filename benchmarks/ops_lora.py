"""One 4-bit linear with LoRA, forward and backward: what QLoRA training is made of."""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.kernels.dropout import draw_seed, keep_mask, keep_scale

from . import gate
from .cases import GATE_SEED, OURS, Case, Point, Setting, Variant, Work, present
from .lora_buffers import ALPHA, Buffers, copies, factors, fused, lora_bytes
from .ops_linear import scales_late
from .peers import bnb, dense, fused_lora, peft_lora
from .shapes import Grid, Projection
from .timing import Call, sets_for
from .weights import Weights

HELD_ROWS = (2048, 8192)


def cases(grid: Grid, setting: Setting) -> list[Case]:
    found = []
    for shape in grid.projections:
        for M, rank, dropout in product(grid.rows, grid.ranks, grid.dropouts):
            plain = rank == grid.ranks[0] and dropout == 0
            priority = 5 if not plain else 1 if M in HELD_ROWS else 4
            point = Point("qlora", shape.model, shape.name, shape.N, shape.K, M, rank, dropout)
            if rank <= min(shape.N, shape.K):
                build = partial(qlora, shape, M, rank, dropout, setting)
                found.append(Case(point, priority, build))
    return found


def qlora(shape: Projection, M: int, rank: int, dropout: float, setting: Setting) -> Work:
    absent: dict[str, str] = {}
    moved = sum(lora_bytes(shape, M, setting))
    sets = sets_for(moved, setting.cache_bytes, most=16)
    weights = Weights.random(shape.N, shape.K, setting.device, sets)
    buffers = Buffers(shape, M, rank, setting, sets)

    @cache
    def truth(name: str, late: bool) -> dict[str, gate.Bounded]:
        mask = {"none": lambda: None, "ours": lambda: our_mask(M, shape.K, dropout, setting)}
        mask["torch"] = lambda: torch_mask(buffers.x[0], dropout)
        x, g = buffers.x[0].detach(), buffers.grad[0]
        weight = weights.exact if late else weights.rounded(setting.dtype)
        return gate.LoRATruth(x, g, weight, buffers.A, buffers.B, ALPHA / rank, mask[name](), late).outputs()

    def judge(name: str, late: bool) -> Callable[[Any], float]:
        return lambda given: max(bounded.worst(given[part]) for part, bounded in truth(name, late).items())

    def judge_frozen(given: Any) -> float:
        x, g, weight = buffers.x[0].detach(), buffers.grad[0], weights.rounded(setting.dtype)
        unit = gate.UNIT[setting.dtype]
        worst = gate.product(x, weight, unit).worst(given["y"])
        return max(worst, gate.product(g, weight.T, unit).worst(given["dx"]))

    def ours() -> Call:
        layers = [buffers.ours(weights, i, dropout) for i in range(sets)]
        return lambda i: buffers.gradients(layers[i](buffers.x[i]), *factors(layers[i]), i)

    def peft(base: Callable[[int], nn.Module]) -> Call:
        layers = [peft_lora.linear(base(i), buffers.A, buffers.B, ALPHA, dropout).train() for i in range(sets)]
        return lambda i: buffers.gradients(layers[i](buffers.x[i]), *peft_lora.adapter(layers[i]), i)

    def frozen_dense() -> Call:
        matrices = copies(weights.decoded(setting.dtype), sets)

        def call(i: int) -> dict[str, Tensor]:
            y = F.linear(buffers.x[i], matrices[i])
            return {"y": y, "dx": torch.autograd.grad(y, buffers.x[i], buffers.grad[i])[0]}

        return call

    matrix = cache(lambda i: dense.module(weights.decoded(setting.dtype)))
    packed = lambda i: bnb.module(weights.copies[i], (shape.N, shape.K), setting.dtype)  # noqa: E731
    dropped, peer_late = dropout > 0, bnb.FUSED_TO >= M
    own_judge = judge("ours" if dropped else "none", scales_late(buffers.x[0], [weights]))
    variants = [Variant(OURS, ours, own_judge, own=True)]
    variants.append(Variant(dense.NAME, frozen_dense, judge_frozen))
    bitsandbytes = present(bnb.missing(), absent, "bitsandbytes")
    mask = "torch" if dropped else "none"
    if present(peft_lora.missing(), absent, "peft"):
        variants.append(Variant(peft_lora.DENSE, lambda: peft(matrix), judge(mask, False)))
        if bitsandbytes:
            variants.append(Variant(peft_lora.QLORA, lambda: peft(packed), judge(mask, peer_late)))
    if bitsandbytes and not dropped:  # the published method has no dropout
        make = lambda: fused([weights], [buffers], setting)  # noqa: E731
        variants.append(Variant(fused_lora.NAME, make, lambda given: judge("none", False)(given[0])))
    flops = 4.0 * M * shape.weights + 6.0 * M * rank * (shape.N + shape.K)
    return Work(variants, flops, moved, sets, setting.way, absent, peak=True)


def our_mask(M: int, K: int, dropout: float, setting: Setting) -> Tensor:
    """What our dropout multiplies with after torch.manual_seed(GATE_SEED)."""
    torch.manual_seed(GATE_SEED)
    return keep_mask((M, K), dropout, draw_seed(setting.device)).double() * keep_scale(dropout)


def torch_mask(x: Tensor, dropout: float) -> Tensor:
    """What F.dropout multiplies x with after torch.manual_seed(GATE_SEED)."""
    torch.manual_seed(GATE_SEED)
    return (F.dropout(torch.ones_like(x), dropout) != 0).double() / (1 - dropout)
