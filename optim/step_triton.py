"""A step on CUDA: torch's norm where it is wanted, and two kinds of launches, whatever the number of parameters.

1. `step_factors_kernel`, for each group: clipping and the decision to skip (the first group's launch), step counts, and
   in float64 each parameter's factors.
2. `optimizer_update_kernel` (update_triton.py), for each group, dtype and width of state, or for each page.

Kernels find parameters and gradients through a table of addresses, which is copied to the device again only when an
address changed; no gradient is address 0. Grids depend on shapes alone.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels.codes import dynamic_code, dynamic_midpoints
from ..kernels.launch import is_fake, launch
from .state import CHUNK, Entry, FlatState, Slice
from .update import NARROW, Control, Group, Rule, gradient_norm
from .update_triton import DTYPES, TILE_SIZE, optimizer_update_kernel


class Tables:
    """What kernels find parameters, gradients and state by, on their device; made anew when parameters join."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], states: Iterable[FlatState], steps: Tensor) -> None:
        self.rule, self.entries, self.steps, device = rule, entries, steps, steps.device
        self.addresses = torch.empty(len(entries), 2, dtype=torch.int64, device=device)  # of parameter and gradient
        self._known: list[int] = []  # what they are
        numbers = np.array([[e.group, e.key] for e in entries], np.uint32).view(np.int32)
        self.numbers = torch.from_numpy(numbers).to(device)
        self.factors = torch.empty(len(entries), 4, dtype=torch.float32, device=device)
        rows = {state: state.chunks() for state in states}
        self._offsets = {state: chunks[:, 3] for state, chunks in rows.items()}
        self._chunks = {state: torch.from_numpy(chunks).to(device) for state, chunks in rows.items()}
        self.groups = list(dict.fromkeys(state.group for state in rows))

    def find(self) -> None:
        found: list[int] = []
        for entry in self.entries:
            if entry.weights is None or entry.gradient is None or is_fake(entry.weights):
                found += (0, 0)
            else:  # empty tensors have no address, but a gradient
                found += (entry.weights.data_ptr(), entry.gradient.data_ptr() or 16)
        if found != self._known:
            values = torch.from_numpy(np.array(found, np.int64)).view(-1, 2)
            values = values.pin_memory() if self.addresses.device.type == "cuda" else values
            self.addresses.copy_(values, non_blocking=True)  # pinned memory is not reused before it has been read
            self._known = found

    def chunks(self, part: Slice) -> Tensor:
        """The chunks that lie in a slice, int64 [chunks, 4]: (row, start, length, offset)."""
        first, last = np.searchsorted(self._offsets[part.state], [part.start, part.end])
        return self._chunks[part.state][int(first) : int(last)]


def step(
    tables: Tables,
    parts: Iterator[Slice],
    groups: list[Group],
    max_norm: float | None,
    found_inf: Tensor | None,
    rounded: bool,
) -> Control:
    """One step of all entries that have a gradient. `rounded`: weights of 16 bits stochastically."""
    tables.find()
    norm = None if max_norm is None else gradient_norm(tables.entries, tables.steps.device)
    control = None if max_norm is None and found_inf is None else tables.factors.new_empty(2)  # scale, skip
    for group in tables.groups:
        settings = groups[group]
        doubles = float(settings["lr"]), settings["weight_decay"], *settings["betas"]
        launch(step_factors_kernel, (1,))(
            *(tables.addresses, tables.numbers, tables.steps, tables.factors),
            *(norm, 0.0 if max_norm is None else float(max_norm)),
            control,
            None if found_inf is None else found_inf.to(tables.steps.device, torch.float32),
            *(len(tables.entries), group),
            *(np.float64(x).view(np.int64).item() for x in doubles),
            FIRST=group == tables.groups[0],
            LION=tables.rule.name == "lion",
            BLOCK=256,
            num_warps=8,
            enable_fp_fusion=True,
        )
    for part in parts:
        _update(tables, control, groups[part.state.group], part, rounded)
    increment_version([entry.weights for entry in tables.entries if entry.weights is not None])  # as torch's ops do
    if control is None:
        return Control(None, None)
    return Control(control[1], None if norm is None else norm.float())


def _update(tables: Tables, control: Tensor | None, group: Group, part: Slice, rounded: bool) -> None:
    """One launch over the chunks of a slice."""
    chunks, device, dtype = tables.chunks(part), tables.steps.device, part.state.dtype
    if not len(chunks):
        return
    beta1, beta2 = group["betas"]
    maps = [of(s, device) for of in (dynamic_code, dynamic_midpoints) for s in (True, False)]
    launch(optimizer_update_kernel, (len(chunks) * (CHUNK // TILE_SIZE),))(
        (tables.addresses, tables.numbers, tables.factors, tables.steps),
        *(control, (chunks, part.start, *part.tensors.values()), tuple(maps) if part.state.bits == 8 else None),
        (beta1, 1 - beta1, beta2, 1 - beta2, group.get("eps", 0.0)),
        DTYPE=DTYPES[dtype],
        LION=tables.rule.name == "lion",
        ROUNDED=rounded and dtype in NARROW,
        num_warps=8,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["entries", "max_norm", "group", "lr", "weight_decay", "beta1", "beta2"])
def step_factors_kernel(
    addresses, numbers, steps, factors, norm, max_norm, control, found_inf, entries, group,
    lr: tl.int64, weight_decay: tl.int64, beta1: tl.int64, beta2: tl.int64,
    FIRST: tl.constexpr, LION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each parameter's update is multiplied by, its step count, and whether the step is skipped.

    lr, weight_decay and betas come as the bits of a float64; Triton would make an fp32 of the number. Their type is
    stated: those of 0.0 would be an int32, and a program of its own.
    """
    wide = tl.zeros([BLOCK], tl.float64)
    scale = tl.full([], 1.0, tl.float32)
    skip = tl.full([], 0.0, tl.float32)
    if control is not None:
        if FIRST:
            if norm is not None:
                total = tl.load(norm)
                scale = tl.minimum(max_norm / (total + 1e-6), 1.0).to(tl.float32)
                skip = tl.where(total < float("inf"), 0.0, 1.0)  # NaN is not
                tl.store(control, scale)
            if found_inf is not None:
                skip = tl.where(tl.load(found_inf) != 0, 1.0, skip)
            tl.store(control + 1, skip)
        else:
            skip = tl.load(control + 1)
            if norm is not None:
                scale = tl.load(control)
    lr = wide + _float64(lr)
    decay = 1.0 - lr * _float64(weight_decay)
    for first in range(0, entries, BLOCK):
        row = first + tl.arange(0, BLOCK)
        mine = (row < entries) & (tl.load(numbers + 2 * row, mask=row < entries, other=-1) == group)
        mine = mine & (tl.load(addresses + 2 * row + 1, mask=mine, other=0) != 0)
        step = tl.load(steps + row, mask=mine, other=1.0) + tl.where(skip == 0, 1.0, 0.0)
        tl.store(steps + row, step, mask=mine)
        tl.store(factors + 4 * row, decay.to(tl.float32), mask=mine)
        step = tl.maximum(step, 1.0)  # it is 0 where the first step is skipped, and then unused
        size, correction = lr, wide + 1.0
        if not LION:
            size = lr / (1.0 - _power(wide + _float64(beta1), step))
            correction = 1.0 / tl.sqrt(1.0 - _power(wide + _float64(beta2), step))
        tl.store(factors + 4 * row + 1, size.to(tl.float32), mask=mine)
        tl.store(factors + 4 * row + 2, correction.to(tl.float32), mask=mine)
        tl.store(factors + 4 * row + 3, scale + tl.zeros([BLOCK], tl.float32), mask=mine)


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(square, step):
    """square ** step in float64, by squaring; step counts in fp32 are exact below 2^24."""
    exponent = step.to(tl.int32)
    power = square * 0.0 + 1.0
    for _ in range(24):
        power = tl.where(exponent % 2 == 1, power * square, power)
        square = square * square
        exponent = exponent // 2
    return power
