"""What a step does to weights and moments: the rules of AdamW and Lion, applied in plain PyTorch.

`update_reference` goes parameter by parameter, on any device. `update_cpu` gathers neighbours in a workspace that stays
in the cache over all the operations of a step: small parameters many at a time, because a call of PyTorch costs more
than a thousand elements, large ones in pieces.

Both rules decay weights apart from the gradient ("decoupled", Loshchilov and Hutter, arXiv 1711.05101). Operations come
in torch.optim's order, so that fp32 results agree to the last bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..kernels.dispatch import path_for
from ..kernels.dropout import draw_halves
from .state import BLOCK, Entry, FlatState, Moment, Segment, Slice, decode, encode, whole

Rounding = Literal["stochastic", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
NARROW = (torch.bfloat16, torch.float16)  # what is rounded so
Group = dict[str, Any]  # a parameter group of torch.optim
Tensors = list[Tensor]
Defined = tuple[Tensor, tuple[Tensor, ...]]  # a weight and its moments, new ones

# Elements of a batch by the bits of the state. 8 bits take some fifty calls a batch, and each costs as much as some ten
# thousand elements in it.
BATCH = {32: 1 << 16, 8: 1 << 18}
ROUNDING_KEY = 0x5F0B  # any: it keeps the draws of stochastic rounding apart from dropout's, whose keys are drawn


@dataclass(frozen=True)
class Rule:
    """One optimizer's mathematics. All tensors of a call have one shape and one dtype, fp32 or fp64.

    define(p, g, moments, group, step) -> (new p, new moments): new tensors, from which all other forms are tested.
    apply(p, g, moments, group, step): the same in place for the CPU. `step` counts from 1."""

    name: str
    moments: tuple[Moment, ...]
    define: Callable[..., Defined]
    apply: Callable[..., None]


def _adamw(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], group: Group, step: float) -> Defined:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    mean = moments[0] + (g - moments[0]) * (1 - beta1)
    square = moments[1] * beta2 + g * g * (1 - beta2)
    root = square.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
    return p * (1 - lr * group["weight_decay"]) - mean / root * (lr / (1 - beta1**step)), (mean, square)


def _adamw_in_place(p: Tensor, g: Tensor, moments: Tensors, group: Group, step: float) -> None:
    beta1, beta2 = group["betas"]
    before = torch.tensor(step - 1, dtype=torch.float32, device="cpu")  # counted up inside
    adamw(
        *([p], [g], [moments[0]], [moments[1]], [], [before]),
        fused=True,  # one pass over memory
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _lion(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], group: Group, step: float) -> Defined:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    direction = moments[0] * beta1 + g * (1 - beta1)
    direction = torch.where(direction.isnan(), direction, direction.sign())  # whose sign would be 0: NaN must show
    return p * (1 - lr * group["weight_decay"]) - direction * lr, (moments[0] + (g - moments[0]) * (1 - beta2),)


def _lion_in_place(p: Tensor, g: Tensor, moments: Tensors, group: Group, step: float) -> None:
    (mean,), lr, (beta1, beta2) = moments, float(group["lr"]), group["betas"]
    direction = (mean * beta1).add_(g, alpha=1 - beta1)
    sign = direction.sign()
    if not math.isfinite(direction.sum()):  # one pass; NaN is looked for only where there may be one
        sign = torch.where(direction.isnan(), direction, sign)
    p.mul_(1 - lr * group["weight_decay"]).add_(sign, alpha=-lr)
    mean.lerp_(g, 1 - beta2)


MEAN, SQUARE = Moment("exp_avg", True), Moment("exp_avg_sq", False)
# Kingma and Ba, arXiv 1412.6980, algorithm 1; Chen et al., arXiv 2302.06675, algorithm 2
ADAMW = Rule("adamw", (MEAN, SQUARE), _adamw, _adamw_in_place)
LION = Rule("lion", (MEAN,), _lion, _lion_in_place)


def rounding_key(seed: int, number: int) -> int:
    """The 32 bits from which parameter `number` of an optimizer is rounded: no two of one share them."""
    return (seed * 0x9E3779B9 + number) % (1 << 32)


def round_stochastically(x: Tensor, dtype: torch.dtype, start: int, step: float, key: int) -> Tensor:
    """fp32 [n] -> bf16 or fp16 [n]: up or down, each with the probability that makes the mean exact (of fp16's
    subnormals to 2^-16 of their spacing). NaN and infinity stay.

    The draw is a function of the parameter's `key`, of its `step` and of the place in it: element 0 of x is its
    element `start`, a multiple of 8. So nothing is stored, and no cut of the parameters into pieces shows."""
    seed = torch.full((), ROUNDING_KEY << 32 | key, dtype=torch.int64, device=x.device)
    count = torch.full((), int(step), dtype=torch.int64, device=x.device)
    draws = draw_halves(start // 8, -(-x.numel() // 8), count, seed)[: x.numel()]
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        cut = ((bits + draws) & -65536).view(torch.float32)
    else:  # numbers between two powers of two are 2^-10 of the lower one apart; below 2^-14, 2^-24
        exponent = ((bits >> 23) & 255).clamp_(min=127 - 14)
        size = x.abs() * ((127 + 127 + 10 - exponent) << 23).view(torch.float32)  # in units of that
        whole = size.floor()
        up = (size - whole) * 65536 > draws
        cut = ((whole + up) * ((exponent - 10) << 23).view(torch.float32)).copysign(x)
    return torch.where(torch.isfinite(x), cut, x).to(dtype)


class Control(NamedTuple):
    """What a step learns from all gradients together; 0-d tensors on their device."""

    skip: Tensor | None  # nonzero: nothing may change
    norm: Tensor | None  # of all gradients before clipping
    scale: Tensor | None = None  # what gradients are multiplied by to clip them, where the host must know


def take_control(entries: Sequence[Entry], max_norm: float | None, found_inf: Tensor | None, steps: Tensor) -> Control:
    """The norm is taken where max_norm is given (torch.nn.utils.clip_grad_norm_'s rule), and then must be finite."""
    skip = None if found_inf is None else found_inf.to(steps.device).view(()) != 0
    if max_norm is None:
        return Control(None if skip is None else skip.float(), None)
    norm = gradient_norm(entries, steps.device)
    skip = ~torch.isfinite(norm) if skip is None else ~torch.isfinite(norm) | skip
    return Control(skip.float(), norm.float(), (max_norm / (norm + 1e-6)).clamp(max=1.0))


def gradient_norm(entries: Sequence[Entry], device: torch.device) -> Tensor:
    """Of each gradient in at least fp32, of those in float64; of DTensors with the parts of all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for groups in dict.fromkeys(entry.groups for entry in entries):
        gradients = [e.gradient for e in entries if e.groups == groups and e.gradient is not None and e.size]
        norms: Tensors = [torch.zeros((), dtype=torch.float32, device=device)]
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            some = [g for g in gradients if g.dtype == dtype]
            norms += torch._foreach_norm(some, dtype=torch.promote_types(dtype, torch.float32))
        squares = torch.stack([n.double() for n in norms]).square().sum()
        for group in groups:
            torch.distributed.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def step(
    rule: Rule,
    entries: Sequence[Entry],
    steps: Tensor,
    parts: Iterator[Slice],
    groups: list[Group],
    max_norm: float | None,
    found_inf: Tensor | None,
    rounded: bool,
) -> Control:
    """One step of all entries that have a gradient; `steps` counts those of each. `rounded`: 16-bit ones at random."""
    control = take_control(entries, max_norm, found_inf, steps)
    if control.skip is None or not control.skip.item():
        steps += steps.new_tensor([float(e.gradient is not None) for e in entries])
        work = update_cpu if path_for(steps) == "cpu" else update_reference
        scale, known = 1.0 if control.scale is None else control.scale.item(), steps.tolist()
        for part in parts:
            work(part, rule, groups[part.state.group], known, scale, rounded and part.state.dtype in NARROW)
    return control


def update_reference(part: Slice, rule: Rule, group: Group, steps: list[float], scale: float, rounded: bool) -> None:
    """A slice's step by the rule's definition; `steps` by row count this step, gradients are multiplied by `scale`."""
    for segment in part.state.segments(part.start, part.end):
        entry, start, length, offset = segment
        if entry.gradient is None:
            continue
        step, wide = steps[entry.row], torch.promote_types(entry.dtype, torch.float32)
        weights, gradient = (t.view(-1) for t in _weights_and_gradient(segment))
        first = offset - part.start
        moments = tuple(decode(m, part.tensors, first, first + length) for m in rule.moments)
        new, moments = rule.define(weights.to(wide), gradient.to(wide) * scale, moments, group, step)
        weights.copy_(round_stochastically(new, entry.dtype, start, step, entry.key) if rounded else new)
        for moment, values in zip(rule.moments, moments, strict=True):
            encode(moment, values, part.tensors, first)


class Batch(NamedTuple):
    """Neighbouring elements [start, end) of a slice, whole blocks, of parameters that took as many steps."""

    start: int
    end: int
    segments: list[Segment]
    weights: list[Tensor]  # of the workspace, for each segment
    gradients: list[Tensor]
    padding: list[slice]  # behind segments, in the workspace


def update_cpu(part: Slice, rule: Rule, group: Group, steps: list[float], scale: float, rounded: bool) -> None:
    """A slice's step; `steps` by row count this step, gradients are multiplied by `scale`.

    Loops over vectors do a remainder element by element, which may round in another way. Whole blocks leave none, so
    that results do not depend on how parameters are cut and gathered."""
    for batch in _batches(part, steps):
        p, g = (t[: batch.end - batch.start] for t in _workspace(part.state))
        weights, gradients = zip(*map(_weights_and_gradient, batch.segments), strict=True)
        in_place = len(weights) == 1 and weights[0].dtype == p.dtype and not batch.padding
        if in_place:
            p, g = weights[0].view(-1), gradients[0].view(-1)
        else:
            torch._foreach_copy_(batch.weights, weights)
            torch._foreach_copy_(batch.gradients, gradients)
        moments = [decode(m, part.tensors, batch.start, batch.end) for m in rule.moments]
        for padding in batch.padding:  # it counts in the scale of an 8-bit block
            for values in (g, *moments):
                values[padding] = 0
        step = steps[batch.segments[0].entry.row]
        rule.apply(p, g if scale == 1 else g * scale, moments, group, step)
        for moment, values in zip(rule.moments, moments, strict=True):
            encode(moment, values, part.tensors, batch.start)
        if rounded:
            for (entry, start, _, _), old, new in zip(batch.segments, weights, batch.weights, strict=True):
                values = round_stochastically(new.view(-1), entry.dtype, start, step, entry.key)
                old.copy_(values.view(old.shape))
        elif not in_place:
            torch._foreach_copy_(weights, batch.weights)


def _weights_and_gradient(segment: Segment) -> tuple[Tensor, Tensor]:
    entry, start, length, _ = segment
    assert entry.weights is not None and entry.gradient is not None
    if length == entry.size:
        return entry.weights, entry.gradient
    return entry.weights.view(-1)[start : start + length], entry.gradient.view(-1)[start : start + length]


def _batches(part: Slice, steps: list[float]) -> list[Batch]:
    """The batches of a slice, made once for each pattern of gradients that are there and steps that differ."""
    present = [e for e in part.state.entries if e.gradient is not None]
    least = min((steps[e.row] for e in present), default=0.0)
    pattern = [(e.row, steps[e.row] - least) for e in present]
    known = part.state.batches.get(part.start)
    if known is None or known[0] != pattern:
        batches = [_batch(part, segments) for segments in _cut(part, steps)]
        known = part.state.batches[part.start] = (pattern, batches)
    return cast(list[Batch], known[1])


def _cut(part: Slice, steps: list[float]) -> list[list[Segment]]:
    most, end, cut = BATCH[part.state.bits], 0, list[list[Segment]]()
    segments = [s for s in part.state.segments(part.start, part.end) if s.entry.gradient is not None]
    for entry, start, length, offset in segments:
        for first in range(0, length, most):
            piece = Segment(entry, start + first, min(most, length - first), offset + first)
            goes_on = cut and piece.offset == end and steps[cut[-1][0].entry.row] == steps[entry.row]
            end = piece.offset + whole(piece.length)
            if goes_on and end - cut[-1][0].offset <= most:
                cut[-1].append(piece)
            else:
                cut.append([piece])
    return cut


def _batch(part: Slice, segments: list[Segment]) -> Batch:
    first = segments[0].offset
    places = [slice(offset - first, offset - first + length) for _, _, length, offset in segments]
    shapes = [torch.Size([s.length]) if s.length < s.entry.size else s.entry.shape for s in segments]
    weights, gradients = (
        [flat[place].view(shape) for place, shape in zip(places, shapes, strict=True)]
        for flat in _workspace(part.state)
    )
    padding = [slice(place.stop, whole(place.stop)) for place in places if place.stop % BLOCK]
    start = first - part.start
    return Batch(start, start + whole(places[-1].stop), segments, weights, gradients, padding)


def _workspace(state: FlatState) -> Tensor:
    """[2, elements] for gathered weights and gradients, as wide as the step computes."""
    if "workspace" not in state.batches:
        wide = torch.promote_types(state.dtype, torch.float32)
        state.batches["workspace"] = torch.zeros(2, BATCH[state.bits], dtype=wide, device="cpu")
    workspace: Tensor = state.batches["workspace"]
    return workspace
