"""AdamW and Lion: what one step does to a parameter. The definitions, and the same in place for the CPU.

Both decay weights apart from the gradient ("decoupled", Loshchilov and Hutter, arXiv 1711.05101). All tensors of a call
have one shape and one dtype, fp32 or fp64; a factor is a number, or a 0-d float64 tensor where the host does not know
the step. Operations come in torch.optim's order, so that fp32 results agree to the last bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..kernels.dropout import draw_halves
from .states import Moment

Number = float | Tensor
Tensors = list[Tensor]


class Factors(NamedTuple):
    """What a rule needs to know of one parameter's learning rate and step count."""

    decay: Number  # 1 - lr * weight_decay: the weight's own factor
    size: Number  # of the step
    correction: Number  # what the root of the second moment is divided by; 1 where a rule has none


@dataclass(frozen=True)
class Rule:
    """One optimizer's mathematics.

    factors(group, lr, step) -> Factors; `step` counts from 1.
    define(p, g, moments, factors, group) -> (new p, new moments): new tensors, from which all other forms are tested.
    apply(p, g, moments, group, step): the same in place for the CPU: lists of tensors, and a list for each moment.
    """

    name: str
    moments: tuple[Moment, ...]
    factors: Callable[[dict[str, Any], Number, Number], Factors]
    define: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    apply: Callable[..., None]


def _adamw_factors(group: dict[str, Any], lr: Number, step: Number) -> Factors:
    beta1, beta2 = group["betas"]
    return Factors(1 - lr * group["weight_decay"], lr / (1 - beta1**step), (1 - beta2**step) ** 0.5)


def _adamw(
    p: Tensor, g: Tensor, moments: tuple[Tensor, ...], factors: Factors, group: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    beta1, beta2 = group["betas"]
    mean = moments[0] + (g - moments[0]) * (1 - beta1)
    square = moments[1] * beta2 + g * g * (1 - beta2)
    root = square.sqrt() / factors.correction + group["eps"]
    return p * factors.decay - mean / root * factors.size, (mean, square)


def _adamw_in_place(p: Tensors, g: Tensors, moments: list[Tensors], group: dict[str, Any], step: float) -> None:
    beta1, beta2 = group["betas"]
    before = [torch.tensor(step - 1) for _ in p]  # counted up inside
    adamw(  # type: ignore[misc]
        *(p, g, *moments, [], before),  # type: ignore[arg-type]
        fused=True,  # one pass over memory
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _lion_factors(group: dict[str, Any], lr: Number, step: Number) -> Factors:
    return Factors(1 - lr * group["weight_decay"], lr, 1.0)


def _lion(
    p: Tensor, g: Tensor, moments: tuple[Tensor, ...], factors: Factors, group: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    beta1, beta2 = group["betas"]
    direction = moments[0] * beta1 + g * (1 - beta1)
    direction = torch.where(direction.isnan(), direction, direction.sign())  # whose sign would be 0: NaN must show
    return p * factors.decay - direction * factors.size, (moments[0] + (g - moments[0]) * (1 - beta2),)


def _lion_in_place(p: Tensors, g: Tensors, moments: list[Tensors], group: dict[str, Any], step: float) -> None:
    (mean,), (beta1, beta2) = moments, group["betas"]
    factors = _lion_factors(group, float(group["lr"]), step)
    direction = torch._foreach_mul(mean, beta1)
    torch._foreach_add_(direction, g, alpha=1 - beta1)
    signs = torch._foreach_sign(direction)
    for sign, values in zip(signs, direction, strict=True):
        if not math.isfinite(values.sum()):  # one pass; NaN is looked for only where there may be one
            sign.copy_(torch.where(values.isnan(), values, sign))
    torch._foreach_mul_(p, factors.decay)
    torch._foreach_add_(p, signs, alpha=-float(factors.size))
    torch._foreach_lerp_(mean, g, 1 - beta2)


ADAMW = Rule(
    "adamw", (Moment("exp_avg", True), Moment("exp_avg_sq", False)), _adamw_factors, _adamw, _adamw_in_place
)  # Kingma and Ba, arXiv 1412.6980, algorithm 1
LION = Rule(
    "lion", (Moment("exp_avg", True),), _lion_factors, _lion, _lion_in_place
)  # Chen et al., arXiv 2302.06675, algorithm 2


def round_stochastically(x: Tensor, start: int, step: Tensor, number: int) -> Tensor:
    """fp32 [n] -> bf16 [n]: up or down, each with the probability that makes the mean exact. NaN and infinity stay.

    The draw is a function of parameter `number`, of its `step` (0-d) and of the place in it: element 0 of x is its
    element `start`, a multiple of 8. So nothing is stored, and no cut of the parameters into pieces shows.
    """
    seed = torch.full((), ROUNDING_KEY << 32 | number, dtype=torch.int64, device=x.device)
    draws = draw_halves(start // 8, -(-x.numel() // 8), step.to(torch.int64), seed)[: x.numel()]
    cut = ((x.view(torch.int32) + draws) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), cut, x).to(torch.bfloat16)


ROUNDING_KEY = 0x5F0B  # any: it keeps these draws apart from dropout's, whose keys are drawn
