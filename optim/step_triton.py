"""A step on CUDA: three launches at most for a group of one dtype, whatever the number of parameters.

1. `_squares`, once a step and only where the norm is wanted: each chunk's sum of squared gradients.
2. `_prepare`, for each group: norm, clipping and the decision to skip (the first group's launch), step counts, and in
   float64 each parameter's factors.
3. `update_triton.update`, for each group and dtype: 32- and 8-bit states in one launch, or one launch for each page.

Kernels find parameters and gradients through a table of addresses, which is copied to the device again only when an
address changed; no gradient is address 0. Grids depend on shapes alone. Partial sums are added in one order, so norms
repeat to the bit. A parameter or gradient that does not lie in memory as its state does is copied there and back, and
fp64 parameters take the reference: some launches more for each such tensor.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.dispatch import on_device
from .addresses import Addresses
from .bank import Bank, Group, Pool
from .layout import CHUNK
from .plain import Control, put_back, step_reference
from .states import Slice
from .update_triton import at, below, update

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def step(pool: Pool, groups: list[Group], max_norm: float | None, found_inf: Tensor | None, rounded: bool) -> Control:
    """One step of every member of the pool that has a gradient. `rounded`: bf16 weights stochastically."""
    if "addresses" not in pool.plans:
        pool.plans["addresses"] = Addresses(pool)
    addresses: Addresses = pool.plans["addresses"]
    weights, gradients = addresses.update()
    pool.plans["table"] = addresses.table
    found = _control(pool, max_norm, found_inf)
    for place, group in enumerate(dict.fromkeys(bank.group for bank in pool.banks.values())):
        _prepare_group(pool, groups[group], group, place == 0, max_norm, found_inf, found)
    for (group, dtype), banks in _together(pool).items():
        if dtype == torch.float64:
            for bank in banks:
                exact = _as_control(found, max_norm)
                if found is not None and exact.scale is not None:
                    exact = exact._replace(scale=exact.scale.double() + found[3].double())
                step_reference(bank, groups[group], pool.steps, exact, False)
        else:
            _update_banks(pool, groups[group], banks, found, rounded and dtype == torch.bfloat16)
    for member, copy in weights:
        put_back(member, copy)
    del gradients  # only now: kernels know them by address alone
    return _as_control(found, max_norm)


def _as_control(found: Tensor | None, max_norm: float | None) -> Control:
    if found is None:
        return Control(None, None, None)
    return Control(found[0], found[1], found[2]) if max_norm is not None else Control(None, found[1], None)


def _control(pool: Pool, max_norm: float | None, found_inf: Tensor | None) -> Tensor | None:
    """fp32 (scale, skip, norm, rest of scale), which the first `_prepare` fills; None without clipping and skipping."""
    if max_norm is not None:
        chunks, kind = _norm_chunks(pool)
        if "partial" not in pool.plans:
            pool.plans["partial"] = torch.empty(len(chunks), dtype=torch.float64, device=pool.device)
        if len(chunks):
            with on_device(chunks):
                _squares[(len(chunks),)](
                    *(pool.plans["table"], chunks, pool.plans["partial"]),
                    KIND=kind,
                    CHUNK=CHUNK,
                    num_warps=8,
                    enable_fp_fusion=True,
                )
    if max_norm is None and found_inf is None:
        return None
    return torch.empty(4, dtype=torch.float32, device=pool.device)


def _norm_chunks(pool: Pool) -> tuple[Tensor, int]:
    """int64 [chunks of all banks, 4]: (row, start, length, kind); and the kind that all are, or -1."""
    if "norm_chunks" not in pool.plans:
        rows = [np.empty((0, 4), np.int64)]
        for bank in pool.banks.values():
            some = _rows(bank).copy()
            some[:, 3] = KINDS[bank.dtype]
            rows.append(some)
        kinds = {KINDS[bank.dtype] for bank in pool.banks.values()}
        table = torch.from_numpy(np.concatenate(rows)).to(pool.device)
        pool.plans["norm_chunks"] = (table, kinds.pop() if len(kinds) == 1 else -1)
    known: tuple[Tensor, int] = pool.plans["norm_chunks"]
    return known


def _rows(bank: Bank) -> Any:
    """The layout's chunks with the parameter's row in the pool for its place in the bank."""
    chunks = bank.layout.chunks()
    chunks[:, 0] = np.array([m.row for m in bank.members], np.int64)[chunks[:, 0]]
    return chunks


def _prepare_group(
    pool: Pool,
    group: Group,
    number: int,
    first: bool,
    max_norm: float | None,
    found_inf: Tensor | None,
    found: Tensor | None,
) -> None:
    lr = group["lr"]
    on_its_device = isinstance(lr, Tensor) and lr.device.type == pool.device.type != "cpu"
    if "factors" not in pool.plans:
        members = torch.tensor([[m.group, m.number] for m in pool.members], dtype=torch.int32)
        pool.plans["members"] = members.to(pool.device)
        pool.plans["factors"] = torch.empty(len(members), 4, dtype=torch.float32, device=pool.device)
    partial = pool.plans.get("partial")
    beta1, beta2 = group["betas"]
    numbers = [0.0 if on_its_device else float(lr), group["weight_decay"], beta1, beta2]
    with on_device(pool.steps):
        _prepare[(1,)](
            *(pool.plans["table"], pool.plans["members"], pool.steps, pool.plans["factors"], partial, found),
            None if found_inf is None else found_inf.to(pool.device, torch.float32),
            lr if on_its_device else None,
            *(0 if partial is None else len(partial), len(pool.members), number),
            float("inf") if max_norm is None else float(max_norm),
            *(half for x in numbers for half in _halves(x)),
            -1.0 if group["maximize"] else 1.0,
            FIRST=first,
            NORM=max_norm is not None,
            CONTROL=found is not None,
            LION=pool.rule.name == "lion",
            PARTS=4096,
            BLOCK=256,
            num_warps=8,
            enable_fp_fusion=True,
        )


def _halves(x: float) -> tuple[float, float]:
    """A float64 as the sum of two fp32, which is what kernels take: 48 of its 53 bits."""
    high = float(np.float32(x))
    return high, float(np.float32(x - high)) if np.isfinite(high) else 0.0


def _together(pool: Pool) -> dict[tuple[int, torch.dtype], list[Bank]]:
    """Banks of one group and dtype, which one launch updates."""
    found: dict[tuple[int, torch.dtype], list[Bank]] = {}
    for (group, dtype, _), bank in pool.banks.items():
        found.setdefault((group, dtype), []).append(bank)
    return found


def _update_banks(pool: Pool, group: Group, banks: list[Bank], found: Tensor | None, rounded: bool) -> None:
    tables = (pool.plans["table"], pool.plans["members"], pool.plans["factors"], found)
    parts = [(bank, part) for bank in banks if bank.storage.resident for part in bank.storage.slices(bank.wanted())]
    if parts:
        update(tables, group, pool.rule.name, [(*_of(bank, part), part) for bank, part in parts], pool.steps, rounded)
    for bank in banks:
        if not bank.storage.resident:
            for part in bank.storage.slices(bank.wanted()):
                update(tables, group, pool.rule.name, [(*_of(bank, part), part)], pool.steps, rounded)


def _of(bank: Bank, part: Slice) -> tuple[Bank, Tensor]:
    """The bank and its table of the chunks that lie in a slice, int64 [chunks, 4]: (row, start, length, offset)."""
    if "chunks" not in bank.plans:
        rows = _rows(bank)
        bank.plans["offsets"] = rows[:, 3]
        bank.plans["chunks"] = torch.from_numpy(rows).to(bank.members[0].parameter.device)
    if ("chunks", part.start, part.end) not in bank.plans:
        first, last = np.searchsorted(bank.plans["offsets"], [part.start, part.end])
        bank.plans["chunks", part.start, part.end] = bank.plans["chunks"][int(first) : int(last)]
    return bank, bank.plans["chunks", part.start, part.end]


@triton.jit
def _squares(addresses, chunks, partial, KIND: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks + 4 * chunk)
    start = tl.multiple_of(tl.load(chunks + 4 * chunk + 1), 256)
    length = tl.load(chunks + 4 * chunk + 2)
    kind = tl.load(chunks + 4 * chunk + 3)
    address = tl.load(addresses + 2 * row + 1)
    length = tl.where(address == 0, 0, length)
    total = tl.full([], 0.0, tl.float64)
    if KIND == 0 or KIND == -1:  # noqa: SIM102  # one is known to the compiler, the other is not
        if kind == 0:
            total = _sum_of_squares(address, start, length, tl.float32, CHUNK)
    if KIND == 1 or KIND == -1:  # noqa: SIM102  # one is known to the compiler, the other is not
        if kind == 1:
            total = _sum_of_squares(address, start, length, tl.bfloat16, CHUNK)
    if KIND == 2 or KIND == -1:  # noqa: SIM102  # one is known to the compiler, the other is not
        if kind == 2:
            total = _sum_of_squares(address, start, length, tl.float16, CHUNK)
    if KIND == 3 or KIND == -1:  # noqa: SIM102  # one is known to the compiler, the other is not
        if kind == 3:
            total = _sum_of_squares(address, start, length, tl.float64, CHUNK)
    tl.store(partial + chunk, total)


@triton.jit
def _sum_of_squares(address, start, length, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    if (length % 16 == 0) & (address % 16 == 0):
        total = _sum(address, start, length, DTYPE, True, CHUNK)
    else:
        total = _sum(address, start, length, DTYPE, False, CHUNK)
    return total


@triton.jit
def _sum(address, start, length, DTYPE: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr):
    i = tl.arange(0, CHUNK)
    values = tl.load(at(address, start, DTYPE, EVEN) + i, mask=below(i, length, EVEN), other=0.0)
    if DTYPE != tl.float64:  # noqa: SIM300
        values = values.to(tl.float32)
    return tl.sum(values * values, axis=0).to(tl.float64)


@triton.jit(do_not_specialize=["parts", "members", "group"])
def _prepare(
    addresses,
    kinds,
    steps,
    factors,
    partial,
    control,
    found_inf,
    lr_tensor,
    parts,
    members,
    group,
    max_norm,
    lr_high,
    lr_low,
    decay_high,
    decay_low,
    beta1_high,
    beta1_low,
    beta2_high,
    beta2_low,
    sign,
    FIRST: tl.constexpr,
    NORM: tl.constexpr,
    CONTROL: tl.constexpr,
    LION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide = tl.zeros([BLOCK], tl.float64)
    scale = tl.full([], 1.0, tl.float32) * sign
    skip = tl.full([], 0.0, tl.float32)
    if CONTROL:
        if FIRST:
            if NORM:
                squares = tl.zeros([PARTS], tl.float64)
                for first in range(0, parts, PARTS):
                    part = first + tl.arange(0, PARTS)
                    squares += tl.load(partial + part, mask=part < parts, other=0.0)
                norm = tl.sqrt(tl.sum(squares, axis=0))
                exact = tl.minimum(max_norm / (norm + 1e-6), 1.0)
                clip = exact.to(tl.float32)
                skip = tl.where(norm < float("inf"), 0.0, 1.0)  # NaN is not
                tl.store(control, clip)
                tl.store(control + 3, (exact - clip.to(tl.float64)).to(tl.float32))
                tl.store(control + 2, norm.to(tl.float32))
                scale = sign * clip
            if found_inf is not None:
                skip = tl.where(tl.load(found_inf) != 0, 1.0, skip)
            tl.store(control + 1, skip)
        else:
            skip = tl.load(control + 1)
            if NORM:
                scale = sign * tl.load(control)
    if lr_tensor is not None:
        lr = wide + tl.load(lr_tensor).to(tl.float64)
    else:
        lr = wide + lr_high + lr_low
    decay = 1.0 - lr * (wide + decay_high + decay_low)
    for first in range(0, members, BLOCK):
        row = first + tl.arange(0, BLOCK)
        mine = (row < members) & (tl.load(kinds + 2 * row, mask=row < members, other=-1) == group)
        mine = mine & (tl.load(addresses + 2 * row + 1, mask=mine, other=0) != 0)
        step = tl.load(steps + row, mask=mine, other=1.0) + tl.where(skip == 0, 1.0, 0.0)
        tl.store(steps + row, step, mask=mine)
        tl.store(factors + 4 * row, decay.to(tl.float32), mask=mine)
        step = tl.maximum(step, 1.0)  # it is 0 where the first step is skipped, and then unused
        size, correction = lr, wide + 1.0
        if not LION:
            size = lr / (1.0 - _power(wide + beta1_high + beta1_low, step))
            correction = 1.0 / tl.sqrt(1.0 - _power(wide + beta2_high + beta2_low, step))
        tl.store(factors + 4 * row + 1, size.to(tl.float32), mask=mine)
        tl.store(factors + 4 * row + 2, correction.to(tl.float32), mask=mine)
        tl.store(factors + 4 * row + 3, scale + tl.zeros([BLOCK], tl.float32), mask=mine)


@triton.jit
def _power(square, step):
    """square ** step in float64, by squaring; step counts in fp32 are exact below 2^24."""
    exponent = step.to(tl.int32)
    power = square * 0.0 + 1.0
    for _ in tl.static_range(24):
        power = tl.where(exponent % 2 == 1, power * square, power)
        square = square * square
        exponent = exponent // 2
    return power
