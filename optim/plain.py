"""Steps in plain PyTorch: parameter by parameter on any device (the reference), and in batches on a CPU.

The reference reads nothing back from the device: step counts, clipping and the decision to skip stay tensors. On a CPU
reading costs nothing, so the quick form works with numbers. It gathers small parameters into a batch, because a call
of PyTorch costs more than a thousand elements, and takes large ones in pieces that stay in the cache over all the
operations of a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.dispatch import path_for
from .bank import Bank, Group, Member, Pool
from .layout import BLOCK, Segment
from .rules import Factors, round_stochastically
from .states import Slice, decode, encode, fields

# By the bits of the state: elements at a time, and of a parameter that is worth gathering with others. 8 bits take some
# fifty calls a batch, each of which costs as much as some ten thousand elements in it.
BATCH = {32: 1 << 16, 8: 1 << 18}
SMALL = {32: 1 << 13, 8: 1 << 16}


class Control(NamedTuple):
    """What a step learns from all gradients together; 0-d tensors on their device."""

    scale: Tensor | None  # what gradients are multiplied by to clip them
    skip: Tensor | None  # nonzero: nothing may change
    norm: Tensor | None  # of all gradients before clipping


def step(pool: Pool, groups: list[Group], max_norm: float | None, found_inf: Tensor | None, rounded: bool) -> Control:
    """One step of every member of the pool that has a gradient. `rounded`: bf16 weights stochastically."""
    present = [m for m in pool.members if m.gradient is not None]
    found = control([g for m in present if (g := m.gradient) is not None], max_norm, found_inf, pool.device)
    if path_for(pool.steps) == "cpu":
        if found.skip is None or not found.skip.item():
            _step_cpu(pool, groups, present, 1.0 if found.scale is None else found.scale.item(), rounded)
        return found
    counted = torch.tensor([float(m.gradient is not None) for m in pool.members]).to(pool.device)
    pool.steps += counted if found.skip is None else torch.where(found.skip != 0, 0.0, counted)
    for bank in pool.banks.values():
        step_reference(bank, groups[bank.group], pool.steps, found, rounded and bank.dtype == torch.bfloat16)
    return found


def _step_cpu(pool: Pool, groups: list[Group], present: list[Member], scale: float, rounded: bool) -> None:
    if len(present) == len(pool.members):
        pool.steps += 1
    else:
        pool.steps[[m.row for m in present]] += 1
    steps = pool.steps.tolist()
    for bank in pool.banks.values():
        step_cpu(bank, groups[bank.group], steps, scale, rounded and bank.dtype == torch.bfloat16)


def control(gradients: list[Tensor], max_norm: float | None, found_inf: Tensor | None, device: torch.device) -> Control:
    """The norm is taken where max_norm is given (torch.nn.utils.clip_grad_norm_'s rule), and then must be finite."""
    if max_norm is None:
        skip = None if found_inf is None else (found_inf.to(device).view(()) != 0).float()
        return Control(None, skip, None)
    norm = _norm(gradients, device)
    skip = ~torch.isfinite(norm)
    if found_inf is not None:
        skip = skip | (found_inf.to(device).view(()) != 0)
    return Control((max_norm / (norm + 1e-6)).clamp(max=1.0), skip.float(), norm.float())


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Of each gradient in at least fp32, of those in float64."""
    gradients = [g for g in gradients if g.numel()]
    norms: list[Tensor] = []
    for dtype in {g.dtype: None for g in gradients}:
        some = [g for g in gradients if g.dtype == dtype]
        norms += torch._foreach_norm(some, dtype=torch.promote_types(dtype, torch.float32))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))


def step_reference(bank: Bank, group: Group, steps: Tensor, control: Control, rounded: bool) -> None:
    """One step of every member that has a gradient; `steps` of the pool count this step, unless it is skipped."""
    for part in bank.storage.slices(bank.wanted()):
        for segment, member in _present(bank, part):
            step = steps[member.row]
            # A first step that is skipped stays step 0, which has no factors; its results are dropped.
            factors = bank.rule.factors(group, group["lr"], step.double().clamp(min=1))
            first = segment.offset - part.start
            region = _region(bank, part, first, segment.length) if control.skip is not None else []
            before = [tensor.clone() for tensor in region]
            _define(bank, group, part, segment, factors, control, step if rounded else None)
            for tensor, old in zip(region, before, strict=True):
                tensor.copy_(torch.where(control.skip != 0, old, tensor))  # type: ignore[arg-type]


def _define(
    bank: Bank, group: Group, part: Slice, segment: Segment, factors: Factors, control: Control, step: Tensor | None
) -> None:
    """A segment's step by the rule's definition. `step` is given where bf16 is to be rounded stochastically."""
    member, first = bank.members[segment.place], segment.offset - part.start
    assert member.gradient is not None
    weights, where = member.flattened(member.parameter), slice(segment.start, segment.start + segment.length)
    wide = torch.promote_types(bank.dtype, torch.float32)
    p, g = (flat[where].to(wide) for flat in (weights, member.flattened(member.gradient)))
    g = g if control.scale is None else g * control.scale
    moments = tuple(decode(m, part.tensors, first, first + segment.length) for m in bank.rule.moments)
    new, moments = bank.rule.define(p, -g if group["maximize"] else g, moments, factors, group)
    narrow = new.to(bank.dtype) if step is None else round_stochastically(new, segment.start, step, member.number)
    weights[where] = narrow if control.skip is None else torch.where(control.skip != 0, weights[where], narrow)
    put_back(member, weights)
    for moment, values in zip(bank.rule.moments, moments, strict=True):
        encode(moment, values, part.tensors, first)


def _present(bank: Bank, part: Slice) -> Iterator[tuple[Segment, Member]]:
    """What of members with a gradient lies in a slice."""
    for segment in bank.layout.segments(part.start, part.end):
        member = bank.members[segment.place]
        if member.gradient is not None:
            yield segment, member


def _region(bank: Bank, part: Slice, first: int, length: int) -> list[Tensor]:
    """Views of a slice's tensors where they keep elements [first, first + length)."""
    kept = fields(bank.rule.moments, bank.bits, bank.dtype)
    return [part.tensors[name][first // f.per : -(-(first + length) // f.per)] for name, f in kept.items()]


def put_back(member: Member, weights: Tensor) -> None:
    """Where `flattened` had to copy a parameter, the copy goes back."""
    if member.flat(member.parameter) is None:
        member.parameter.copy_(member.shaped(weights))


@dataclass
class Batch:
    """Elements [start, end) of a slice, for one call of the rule: a piece of one member, or several whole members."""

    members: list[Member]
    start: int
    end: int
    first: int = 0  # of a piece, in its member
    weights: list[Tensor] = field(default_factory=list)  # gathered members: parameter-shaped views of the workspace,
    gradients: list[Tensor] = field(default_factory=list)  # which they are copied to
    moments: list[list[Tensor]] = field(
        default_factory=list
    )  # members as they lie: views of the state shaped like them


def step_cpu(bank: Bank, group: Group, steps: list[float], scale: float, rounded: bool) -> None:
    """One step of every member that has a gradient; `steps` by row count this step."""
    scale = -scale if group["maximize"] else scale
    for part in bank.storage.slices(bank.wanted()):
        for batch in _batches(bank, part, steps):
            step = steps[batch.members[0].row]
            if batch.moments:
                gradients = [_laid_out(m) for m in batch.members]
                gradients = gradients if scale == 1 else list(torch._foreach_mul(gradients, scale))
                bank.rule.apply([m.parameter for m in batch.members], gradients, batch.moments, group, step)
            else:
                work = _gathered if batch.weights else _piece
                work(bank, group, part, batch, scale, step, rounded)


def _laid_out(member: Member) -> Tensor:
    """The gradient with the strides of the state."""
    g = member.gradient
    assert g is not None
    return g if g.stride() == member.strides else member.shaped(member.flattened(g))


def _gathered(bank: Bank, group: Group, part: Slice, batch: Batch, scale: float, step: float, rounded: bool) -> None:
    p, g = (t[: _blocks(batch.end - batch.start)] for t in _workspace(bank))
    parameters: list[Tensor] = [m.parameter for m in batch.members]
    g.zero_()  # padding must not hold another batch's gradients: it would count in the scale of an 8-bit block
    torch._foreach_copy_(batch.gradients, [q.grad for q in parameters])  # type: ignore[misc]
    torch._foreach_copy_(batch.weights, parameters)
    _apply(bank, group, part, batch, (p, g if scale == 1 else g.mul_(scale)), step)
    if not rounded:
        torch._foreach_copy_(parameters, batch.weights)
        return
    for member, new in zip(batch.members, batch.weights, strict=True):
        flat = new.as_strided((new.numel(),), (1,))
        member.parameter.copy_(member.shaped(round_stochastically(flat, 0, torch.tensor(step), member.number)))


def _piece(bank: Bank, group: Group, part: Slice, batch: Batch, scale: float, step: float, rounded: bool) -> None:
    member, length = batch.members[0], batch.end - batch.start
    assert member.gradient is not None
    weights = member.flattened(member.parameter)
    old = weights[batch.first : batch.first + length]
    p = _widened(old)  # itself, if it is as wide and whole blocks
    g = _widened(member.flattened(member.gradient)[batch.first : batch.first + length])
    _apply(bank, group, part, batch, (p, g if scale == 1 else g * scale), step)
    if rounded:
        old.copy_(round_stochastically(p[:length], batch.first, torch.tensor(step), member.number))
    elif p.data_ptr() != old.data_ptr():
        old.copy_(p[:length])
    put_back(member, weights)


def _widened(piece: Tensor) -> Tensor:
    """In at least fp32, and filled up with zeros to whole blocks."""
    wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
    return wide if _blocks(len(piece)) == len(piece) else nn.functional.pad(wide, (0, _blocks(len(piece)) - len(piece)))


def _apply(bank: Bank, group: Group, part: Slice, batch: Batch, work: tuple[Tensor, Tensor], step: float) -> None:
    """The rule in place on (weights, gradients) and on the batch's part of the state, all in whole blocks.

    Loops over vectors do a remainder element by element, which may round in another way. Whole blocks leave none, so
    that results do not depend on how parameters are cut and gathered.
    """
    length = batch.end - batch.start
    end = batch.start + (_blocks(length) if bank.bits == 32 else length)  # codes beyond the end mean nothing
    moments = [_widened(decode(m, part.tensors, batch.start, end)) for m in bank.rule.moments]
    bank.rule.apply([work[0]], [work[1]], [[values] for values in moments], group, step)
    for moment, values in zip(bank.rule.moments, moments, strict=True):
        encode(moment, values[: end - batch.start], part.tensors, batch.start)


def _blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _batches(bank: Bank, part: Slice, steps: list[float]) -> list[Batch]:
    """The batches of a slice, made once for each pattern of gradients that are there and steps that differ."""
    present = [m for m in bank.members if m.gradient is not None]
    least = min((steps[m.row] for m in present), default=0.0)
    pattern = [(m.index, steps[m.row] - least, m.parameter.stride()) for m in present]
    key = (part.start, part.end, *(t.data_ptr() for t in part.tensors.values()))
    known = bank.plans.get(key)
    if known is None or known[0] != pattern:
        known = bank.plans[key] = (pattern, list(_cut(bank, part, steps)))
    batches: list[Batch] = known[1]
    return batches


def _cut(bank: Bank, part: Slice, steps: list[float]) -> Iterator[Batch]:
    """Small members are gathered, large ones taken as they lie where that is possible, and else piece by piece."""
    gathered, direct = Batch([], 0, 0), dict[float, Batch]()
    for segment, member in _present(bank, part):
        start, whole = segment.offset - part.start, segment.length == bank.layout.sizes[segment.place]
        end, step = start + segment.length, steps[member.row]
        # Codes behind the end of a parameter are no zeros: they must not be decoded.
        if whole and segment.length <= SMALL[bank.bits] and (bank.bits == 32 or segment.length % BLOCK == 0):
            if gathered.members and not _fits(bank, gathered, start, end, step == steps[gathered.members[0].row]):
                yield gathered
                gathered = Batch([], 0, 0)
            _join(bank, gathered, member, start, end)
        elif whole and segment.length % BLOCK == 0 and _lies_flat(bank, member):
            batch = direct.setdefault(step, Batch([], 0, 0, moments=[[] for _ in bank.rule.moments]))
            batch.members.append(member)
            for views, moment in zip(batch.moments, bank.rule.moments, strict=True):
                views.append(member.shaped(part.tensors[moment.name][start:end]))
        else:
            for first in range(0, segment.length, BATCH[bank.bits]):
                last = min(first + BATCH[bank.bits], segment.length)
                yield Batch([member], start + first, start + last, segment.start + first)
    yield from ([gathered] if gathered.members else [])
    yield from direct.values()


def _fits(bank: Bank, batch: Batch, start: int, end: int, same_step: bool) -> bool:
    """Whether elements [start, end) can join a gathered batch: right behind it, as it is one part of the state."""
    return (
        same_step and start == batch.start + _blocks(batch.end - batch.start) and end - batch.start <= BATCH[bank.bits]
    )


def _lies_flat(bank: Bank, member: Member) -> bool:
    """Whether the rule can work on a parameter, its gradient and its state where they are."""
    full = bank.bits == 32 and bank.dtype in (torch.float32, torch.float64)
    return full and member.flat(member.parameter) is not None


def _join(bank: Bank, batch: Batch, member: Member, start: int, end: int) -> None:
    batch.start = batch.start if batch.members else start
    batch.members.append(member)
    batch.end = end
    for views, flat in zip((batch.weights, batch.gradients), _workspace(bank), strict=True):
        views.append(member.shaped(flat[start - batch.start :]))


def _workspace(bank: Bank) -> Tensor:
    """[2, elements] for gathered weights and gradients, as wide as the step computes."""
    if "workspace" not in bank.plans:
        bank.plans["workspace"] = torch.zeros(2, BATCH[bank.bits], dtype=torch.promote_types(bank.dtype, torch.float32))
    return bank.plans["workspace"]
