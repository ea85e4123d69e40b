"""Quantising and decoding whole matrices."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fourbit import nf4
from fourbit.kernels.dispatch import force_path

from . import gate
from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .peers import bnb, torchao_nf4
from .shapes import Grid, Projection
from .timing import Call, sets_for
from .weights import BYTES_PER_PARAMETER, Weights

HELD_FROM = 64_000_000  # parameters from which decoding is held to a share of the copy bandwidth
NEAREST = 1e-5  # share of codes that a peer may choose differently: ties and reciprocals


def cases(grid: Grid, setting: Setting) -> list[Case]:
    found = []
    for shape in grid.projections:
        point = (shape.model, shape.name, shape.N, shape.K)
        first = 1 if shape.weights >= HELD_FROM else 3
        found.append(Case(Point("dequantize", *point), first, partial(dequantize, shape, setting)))
        found.append(Case(Point("quantize", *point), 4, partial(quantize, shape, setting)))
    return found


def dequantize(shape: Projection, setting: Setting) -> Work:
    dtype, absent = setting.dtype, dict[str, str]()
    moved = (BYTES_PER_PARAMETER + dtype.itemsize) * shape.weights
    sets = sets_for(moved, setting.cache_bytes)
    weights = Weights.random(shape.N, shape.K, setting.device, sets)
    exact = weights.decoded(dtype)

    def ours() -> Call:
        layers = [weights.layer(i) for i in range(sets)]
        return lambda i: layers[i].dequantize(dtype)

    def peer(nested: bool) -> Call:
        states = [bnb.state(stored, (shape.N, shape.K), dtype, nested=nested) for stored in weights.copies]
        return lambda i: bnb.dequantize(weights.copies[i], states[i])

    def close(dense: Tensor) -> float:
        """A peer may round once more, the scale or the code."""
        unit = gate.UNIT[dtype]
        return gate.Bounded(exact.double(), 4 * unit * exact.double().abs()).worst(dense)

    variants = [Variant(OURS, ours, lambda dense: gate.equal([dense], [exact]), own=True)]
    if present(bnb.missing(), absent, "bitsandbytes"):
        variants.append(Variant(bnb.NESTED, lambda: peer(True), close))
        variants.append(Variant(bnb.PLAIN, lambda: peer(False), close))
    wanted = setting.device.type == "cuda" and (shape.N, shape.K) in torchao_nf4.SHAPES
    if wanted and present(torchao_nf4.missing(), absent, torchao_nf4.NAME):
        variants.append(torchao_decoder(weights, sets, setting))
    return Work(variants, 0.0, moved, sets, setting.small_way, absent)


def torchao_decoder(weights: Weights, sets: int, setting: Setting) -> Variant:
    own = cache(lambda: torchao_nf4.quantized(weights.decoded(torch.float32).to(setting.dtype)))

    def make() -> Call:
        copies = [own(), *(torchao_nf4.quantized(torchao_nf4.decoded(own())) for _ in range(sets - 1))]
        decode = torchao_nf4.decoder()
        return lambda i: decode(copies[i])

    def close(dense: Tensor) -> float:
        """Compiled, it may keep in fp32 what op by op is rounded."""
        exact = torchao_nf4.decoded(own()).double()
        return gate.Bounded(exact, 4 * gate.UNIT[setting.dtype] * exact.abs()).worst(dense)

    return Variant(torchao_nf4.NAME, make, close)


def quantize(shape: Projection, setting: Setting) -> Work:
    absent: dict[str, str] = {}
    itemsize = setting.dtype.itemsize
    moved = (itemsize + BYTES_PER_PARAMETER) * shape.weights
    sets = sets_for(moved, setting.cache_bytes)
    dense = [setting.normal(shape.N, shape.K, seed=0, scale=shape.K**-0.5)]
    dense += [dense[0].clone() for _ in range(sets - 1)]
    with force_path("reference"):
        exact = ours_quantized(dense[0])
    variants = [
        Variant(OURS, lambda: lambda i: ours_quantized(dense[i]), lambda given: judge_own(given, exact), own=True)
    ]
    if present(bnb.missing(), absent, "bitsandbytes"):
        make = lambda: lambda i: bnb.quantize(dense[i])  # noqa: E731
        variants.append(Variant(bnb.NESTED, make, lambda given: judge_peer(given, exact)))
    return Work(variants, 0.0, moved, sets, setting.way, absent)


def ours_quantized(dense: Tensor) -> tuple[Tensor, ...]:
    """(packed, codes, nested absmax, offset)."""
    return nf4.quantize(dense, double_quant=True)[:4]


def judge_own(given: Any, exact: tuple[Tensor, ...]) -> float:
    """Bytes and scales are the reference's; the offset is a mean, which another order of summing may round apart."""
    same = gate.equal(given[:1], exact[:1])
    scales = gate.Bounded(_scales(exact), gate.FP32 * 1024 * _scales(exact)).worst(_scales(given))
    return max(same, scales)


def judge_peer(given: Any, exact: tuple[Tensor, ...]) -> float:
    """Nearly every code the same, and every scale within a step of double quantisation."""
    codes = given[0].view(-1) != exact[0].view(-1)
    step = _scales(exact).abs().amax() / 64  # 8-bit codes are coarsest, 1 in 64 of the range, near its ends
    scales = gate.Bounded(_scales(exact), step.expand_as(_scales(exact))).worst(_scales(given))
    return max(float(codes.double().mean()) / NEAREST, scales)


def _scales(quantised: tuple[Tensor, ...]) -> Tensor:
    """What the codes of the scales decode to, in float64."""
    with force_path("reference"):
        return nf4.dequantize_absmax(*quantised[1:]).view(-1).double()
