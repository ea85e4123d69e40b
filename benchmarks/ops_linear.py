"""The 4-bit linear, forward: from one row (decoding) to thousands (training)."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.kernels import dispatch
from fourbit.kernels.lora_paths import Group, few_rows

from . import gate
from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .peers import bnb, dense, torchao_nf4
from .shapes import Grid, Projection
from .timing import Call, sets_for
from .weights import BYTES_PER_PARAMETER, Weights

FALLBACK = "ours, decode + F.linear"  # what the dispatcher must never be slower than
GRAPHED_TO = 64  # rows up to which a call is so short that it is timed in a graph
HELD_ONE_ROW = 58_000_000  # weights from which one row is held to a share of the bandwidth
HELD_BATCHES = ((4096, 4096), (14336, 4096), (4096, 14336))  # shapes held to a ratio at 8 to 512 rows
HELD_ROWS = range(8, 513)
TORCHAO_ROWS = (16, 512, 8192)


def cases(grid: Grid, setting: Setting) -> list[Case]:
    found = []
    for shape in grid.projections:
        for M in grid.rows:
            held = (M == 1 and shape.weights >= HELD_ONE_ROW) or (M in HELD_ROWS and (shape.N, shape.K) in HELD_BATCHES)
            point = Point("linear", shape.model, shape.name, shape.N, shape.K, M)
            found.append(Case(point, 1 if held else 3, partial(forward, shape, M, setting)))
    return found


def forward(shape: Projection, M: int, setting: Setting) -> Work:
    N, K, dtype, absent = shape.N, shape.K, setting.dtype, dict[str, str]()
    around = dtype.itemsize * M * (N + K)
    sets = sets_for(BYTES_PER_PARAMETER * N * K + around, setting.cache_bytes)
    weights = Weights.random(N, K, setting.device, sets)
    x = [setting.normal(M, K, seed=1)]
    x += [x[0].clone() for _ in range(sets - 1)]

    @cache
    def truth(rounded: torch.dtype | None) -> gate.Bounded:
        """The product with the weight as rounded to this dtype; None for the exact one, whose scales come late."""
        weight = weights.exact if rounded is None else weights.rounded(rounded)
        return gate.product(x[0], weight, gate.UNIT[dtype], scaled_late=rounded is None)

    own = None if scales_late(x[0], [weights]) else dispatch.product_dtype(x[0])
    judge_own, judge = (lambda y: truth(own).worst(y)), (lambda y: truth(dtype).worst(y))
    judge_late = judge if bnb.FUSED_TO < M else (lambda y: truth(None).worst(y))

    def ours() -> Call:
        layers = [weights.layer(i) for i in range(sets)]
        return lambda i: layers[i](x[i])

    def fallback() -> Call:
        layers = [weights.layer(i) for i in range(sets)]
        return lambda i: F.linear(x[i], layers[i].dequantize(dtype))

    def dense_linear() -> Call:
        matrices = [weights.decoded(dtype)]
        matrices += [matrices[0].clone() for _ in range(sets - 1)]
        return lambda i: dense.linear(x[i], matrices[i])

    variants = [
        Variant(OURS, ours, judge_own, own=True),
        Variant(FALLBACK, fallback, judge, own=True),
        Variant(dense.NAME, dense_linear, judge),
    ]
    if present(bnb.missing(), absent, "bitsandbytes"):
        variants += peer_variants(weights, x, setting, judge_late)
    wanted = setting.device.type == "cuda" and (N, K) in torchao_nf4.SHAPES and M in TORCHAO_ROWS
    if wanted and present(torchao_nf4.missing(), absent, torchao_nf4.NAME):
        variants.append(torchao_variant(weights, x, dtype))
    ways = setting.small_way if M <= GRAPHED_TO else setting.way
    return Work(variants, 2.0 * M * N * K, BYTES_PER_PARAMETER * N * K + around, sets, ways, absent)


def scales_late(x: Tensor, weights: Sequence[Weights]) -> bool:
    """Whether our way for so few rows multiplies unscaled codes, which has a bound of its own."""
    return few_rows(x, Group([each.copies[0] for each in weights]), keep=False)


def peer_variants(weights: Weights, x: list[Tensor], setting: Setting, judge: Callable[[Any], float]) -> list[Variant]:
    """bitsandbytes' linear over nested and plain scales, and its decoder before F.linear."""
    shape, dtype = (weights.N, weights.K), setting.dtype

    def make(function: Callable[..., Tensor], nested: bool) -> Call:
        states = [bnb.state(stored, shape, dtype, nested=nested) for stored in weights.copies]
        return lambda i: function(x[i], weights.copies[i], states[i])

    return [
        Variant(bnb.NESTED, lambda: make(bnb.linear, True), judge),
        Variant(bnb.PLAIN, lambda: make(bnb.linear, False), judge),
        Variant(bnb.DECODED, lambda: make(bnb.decode_linear, True), judge),
    ]


def torchao_variant(weights: Weights, x: list[Tensor], dtype: torch.dtype) -> Variant:
    """Judged against its own decoded weight: it quantises the scales another way."""
    own = cache(lambda: torchao_nf4.quantized(weights.decoded(dtype)))

    def make() -> Call:
        copies = [own(), *(torchao_nf4.quantized(torchao_nf4.decoded(own())) for _ in x[1:])]
        return lambda i: torchao_nf4.linear(x[i], copies[i])

    def judge(y: Tensor) -> float:
        exact = torchao_nf4.decoded(own()).double()
        return gate.product(x[0], exact, gate.UNIT[dtype], scaled_late=True).worst(y)

    return Variant(torchao_nf4.NAME, make, judge)
