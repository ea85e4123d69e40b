"""What LoRA adds to the forward pass of a frozen 4-bit linear."""

from functools import cache, partial
from itertools import product

from fourbit.kernels import dispatch

from . import gate
from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .lora_buffers import ALPHA, Buffers
from .ops_linear import scales_late
from .peers import bnb, peft_lora
from .shapes import Grid, Projection
from .timing import Call, sets_for
from .weights import BYTES_PER_PARAMETER, Weights

FROZEN, PEER_FROZEN = "ours, frozen", "bitsandbytes, frozen"
HELD_ROWS = 8192
FROM_ROWS = 512  # below it the cost is that of launches


def cases(grid: Grid, setting: Setting) -> list[Case]:
    found = []
    for shape, M, rank in product(grid.projections, grid.rows, grid.ranks):
        if min(FROM_ROWS, max(grid.rows)) <= M and rank <= min(shape.N, shape.K):
            held = rank == grid.ranks[0] and M == HELD_ROWS
            point = Point("lora_cost", shape.model, shape.name, shape.N, shape.K, M, rank)
            found.append(Case(point, 1 if held else 5, partial(lora_cost, shape, M, rank, setting)))
    return found


def lora_cost(shape: Projection, M: int, rank: int, setting: Setting) -> Work:
    """Forward with gradients wanted, as training runs it, with the adapter and without."""
    absent: dict[str, str] = {}
    dtype = setting.dtype
    moved = BYTES_PER_PARAMETER * shape.weights + dtype.itemsize * M * (shape.N + shape.K)
    sets = sets_for(moved, setting.cache_bytes, most=16)
    weights = Weights.random(shape.N, shape.K, setting.device, sets)
    buffers = Buffers(shape, M, rank, setting, sets)

    @cache
    def truth(adapted: bool, late: bool) -> gate.Bounded:
        x = buffers.x[0].detach()
        weight = weights.exact if late else weights.rounded(dtype if adapted else dispatch.product_dtype(x))
        if not adapted:
            return gate.product(x, weight, gate.UNIT[dtype], scaled_late=late)
        whole = gate.LoRATruth(x, buffers.grad[0], weight, buffers.A, buffers.B, ALPHA / rank, scaled_late=late)
        return whole.outputs()["y"]

    def ours(enabled: bool) -> Call:
        layers = [buffers.ours(weights, i, 0.0) for i in range(sets)]
        for layer in layers:
            layer.active = {"default": 1.0} if enabled else {}
        return lambda i: layers[i](buffers.x[i])

    def peer(adapted: bool) -> Call:
        bases = [bnb.module(stored, (shape.N, shape.K), dtype) for stored in weights.copies]
        if adapted:
            bases = [peft_lora.linear(base, buffers.A, buffers.B, ALPHA, 0.0) for base in bases]
        return lambda i: bases[i](buffers.x[i])

    own_late, peer_late = scales_late(buffers.x[0], [weights]), bnb.FUSED_TO >= M
    variants = [
        Variant(OURS, lambda: ours(True), lambda y: truth(True, own_late).worst(y), own=True),
        Variant(FROZEN, lambda: ours(False), lambda y: truth(False, own_late).worst(y), own=True),
    ]
    if present(bnb.missing(), absent, "bitsandbytes"):
        variants.append(Variant(PEER_FROZEN, lambda: peer(False), lambda y: truth(False, peer_late).worst(y)))
        if present(peft_lora.missing(), absent, "peft"):
            variants.append(Variant(peft_lora.QLORA, lambda: peer(True), lambda y: truth(True, peer_late).worst(y)))
    flops = 2.0 * M * shape.weights + 2.0 * M * rank * (shape.N + shape.K)
    return Work(variants, flops, moved, sets, setting.way, absent)
