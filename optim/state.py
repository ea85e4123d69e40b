"""The flat state of an optimizer: what is kept for each element of its parameters, and whose lies where.

Parameters of one group, dtype and width share flat tensors (`FlatState`). Each parameter has a span of them that starts
at a multiple of BLOCK, the block of 8-bit states, so that no block belongs to two parameters. Spans are only appended:
what lies somewhere stays there when parameters join. Kernels work on chunks: pieces of one parameter inside one window
of CHUNK elements. So every cut of the flat state at a multiple of CHUNK (a page) also is a cut between chunks.

A moment (a running mean of gradients or of their squares) is kept in full (fp32; fp64 for fp64 parameters) or as 8-bit
codes of the dynamic map with one fp32 scale (absmax) for every 256 elements, as bitsandbytes does: the signed map where
the moment has a sign, the unsigned one where it has none. An element's nearest code is found exactly
(kernels/blockwise). Fresh state is zero bytes in either form: code 0 times a scale of 0.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..kernels.blockwise import dequantize_blockwise, quantize_blockwise
from ..kernels.codes import dynamic_code
from ..kernels.launch import is_fake

BLOCK = 256
CHUNK = 4096


class Moment(NamedTuple):
    """One running mean: its name in state dicts, and whether it can be negative."""

    name: str
    signed: bool


class Field(NamedTuple):
    """One flat tensor: its dtype, and how many elements of the state share one of its entries."""

    dtype: torch.dtype
    per: int

    def count(self, elements: int) -> int:
        """Its entries for so many elements."""
        return -(-elements // self.per)

    def shape(self, parameter: Tensor) -> torch.Size:
        """Of what this process keeps for a parameter: shaped as its part of it, or a row of scales."""
        scales = [1] * hasattr(parameter, "placements") + [self.count(largest_shard(parameter))]
        return local(parameter).shape if self.per == 1 else torch.Size(scales)


def fields(moments: Sequence[Moment], bits: int, dtype: torch.dtype) -> dict[str, Field]:
    """The flat tensors that keep `moments` of parameters of `dtype` with 8 or 32 bits (fp64 is never cut to either)."""
    if bits == 32:
        return {m.name: Field(torch.promote_types(dtype, torch.float32), 1) for m in moments}
    kept = {"": Field(torch.uint8, 1), "_absmax": Field(torch.float32, BLOCK)}
    return {m.name + suffix: field for m in moments for suffix, field in kept.items()}


def whole(size: int, unit: int = BLOCK) -> int:
    """The least multiple of `unit` that is `size` or more."""
    return -(-size // unit) * unit


class Kind(NamedTuple):
    """What a parameter must stay while it has state."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} on {self.device}"


def owned(view: Tensor) -> Tensor:
    """The same memory in a storage of its own: files refuse parts of another's, or write all of it."""
    return view if view.is_meta or is_fake(view) else from_dlpack(view)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: of a DTensor its shard. Known by the method, for the import takes seconds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def largest_shard(parameter: Any) -> int:
    """Elements of the largest part that a rank holds: every rank keeps room, and scales, for as many."""
    shape = list(parameter.shape)
    for i, placement in enumerate(getattr(parameter, "placements", ())):
        if not placement.is_replicate():
            shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh.size(i))
    return math.prod(shape)


def as_dtensor(own: Tensor, p: Any, per: int) -> Tensor:
    """What this process keeps for a DTensor, as one: cut as p, or [ranks, ...] where `per` elements share an entry."""
    if not hasattr(p, "placements"):
        return own
    from torch.distributed.tensor import DTensor, Shard

    placements = p.placements if per == 1 else [Shard(0)] * p.device_mesh.ndim
    shape = p.shape if per == 1 else torch.Size([p.device_mesh.size(), own.numel()])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


@dataclass(eq=False)
class Entry:
    """One parameter; and from when it joins a flat state on, where it is kept."""

    parameter: Any  # an nn.Parameter, which may be a DTensor
    number: int  # among all parameters of the optimizer, as in state dicts
    group: int
    key: int = 0  # of its draws, where it is rounded stochastically
    kind: Kind | None = None  # when it joined
    weights: Tensor | None = None  # while a step runs: the parameter itself, or a contiguous copy of it
    gradient: Tensor | None = None  # while a step runs, contiguous; None: there is none

    def join(self, state: "FlatState", row: int, start: int) -> None:
        """row: in step counts and the tables of kernels; start: of its span."""
        p, placements = local(self.parameter), enumerate(getattr(self.parameter, "placements", ()))
        self.shape, self.dtype, self.size = p.shape, p.dtype, p.numel()
        self.groups = tuple(self.parameter.device_mesh.get_group(i) for i, cut in placements if not cut.is_replicate())
        self.shapes = {name: field.shape(self.parameter) for name, field in state.fields.items()}
        self.kind = Kind(p.shape, p.dtype, p.device)
        self.state, self.row, self.start = state, row, start


class Segment(NamedTuple):
    """A piece of one parameter: its elements [start, start + length), kept in the flat state from `offset` on."""

    entry: Entry
    start: int
    length: int
    offset: int


@dataclass(eq=False)
class FlatState:
    """The state of parameters of one group, one dtype and one width."""

    group: int
    dtype: torch.dtype
    bits: int
    moments: Sequence[Moment]
    entries: list[Entry] = field(default_factory=list)
    total: int = 0  # elements
    tensors: dict[str, Tensor] | None = None  # by field; None while it has none, or keeps them in pages
    batches: dict[Any, Any] = field(default_factory=dict)  # how the quick form on the CPU cuts it (update.py)

    def __post_init__(self) -> None:
        self.fields = fields(self.moments, self.bits, self.dtype)

    def grown(self, sizes: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Its tensors with room for parameters of these sizes to join: first what there is, then zeros."""
        total = whole(self.total, CHUNK) + sum(map(whole, sizes))
        grown = {n: torch.zeros(f.count(total), dtype=f.dtype, device=device) for n, f in self.fields.items()}
        for name, old in (self.tensors or {}).items():
            grown[name][: old.numel()] = old
        return grown

    def join(self, entries: Sequence[Entry], row: int) -> int:
        """Append spans; rows count from `row`. Returns where the first begins: at a chunk, so on pages of their own."""
        start = self.total = whole(self.total, CHUNK)
        for i, entry in enumerate(entries):
            entry.join(self, row + i, self.total)
            self.total += whole(largest_shard(entry.parameter))
        self.entries += entries
        self.batches.clear()
        return start

    def unpaged(self) -> "Slice":
        """All of it, where it is not paged."""
        return Slice(self, 0, self.total, self.tensors or {})

    def views(self, entry: Entry, steps: Tensor) -> dict[str, Tensor]:
        """A parameter's step count and its part of the flat tensors, moments shaped like it; of paged ones nothing."""
        found = {"step": owned(steps[entry.row])}
        for name, tensor in (self.tensors or {}).items():
            shape, per = entry.shapes[name], self.fields[name].per
            view = tensor[entry.start // per :][: shape.numel()].view(shape)
            found[name] = as_dtensor(owned(view), entry.parameter, per)
        return found

    def empty(self, entry: Entry) -> dict[str, Tensor]:
        """New tensors in host memory for what `views` gives."""
        made = {n: torch.empty(entry.shapes[n], dtype=f.dtype, device="cpu") for n, f in self.fields.items()}
        return {name: as_dtensor(own, entry.parameter, self.fields[name].per) for name, own in made.items()}

    def segments(self, start: int, end: int) -> list[Segment]:
        """What of which parameters lies in [start, end) of the flat state, in order; padding left out."""
        found = []
        for index in range(max(bisect_right(self.entries, start, key=lambda e: e.start) - 1, 0), len(self.entries)):
            entry = self.entries[index]
            if entry.start >= end:
                break
            low, high = max(start, entry.start), min(end, entry.start + entry.size)
            if low < high:
                found.append(Segment(entry, low - entry.start, high - low, low))
        return found

    def chunks(self) -> NDArray[np.int64]:
        """All chunks in order as rows of (row, start, length, offset), int64 [chunks, 4], as in Segment."""
        parts = [np.empty((0, 4), np.int64)]
        for entry in self.entries:
            first, last = entry.start, entry.start + entry.size
            cuts = np.r_[first, np.arange((first // CHUNK + 1) * CHUNK, last, CHUNK), last]
            if entry.size:
                columns = np.full(len(cuts) - 1, entry.row), cuts[:-1] - first, np.diff(cuts), cuts[:-1]
                parts.append(np.stack(columns, axis=1))
        return np.concatenate(parts)


class Slice(NamedTuple):
    """Elements [start, end) of a flat state, as `tensors` that begin at `start`, a multiple of CHUNK."""

    state: FlatState
    start: int
    end: int
    tensors: Mapping[str, Tensor]

    def copy(self, found: Mapping[Entry, Mapping[str, Tensor]], *, back: bool = False) -> None:
        """Copy what parameters have here to tensors of their own, by entry and field; or `back` from them."""
        for entry, start, length, offset in self.state.segments(self.start, self.end):
            for name, kept in self.state.fields.items():
                here = self.tensors[name][(offset - self.start) // kept.per :][: kept.count(length)]
                there = local(found[entry][name]).reshape(-1)[start // kept.per :][: kept.count(length)]
                (here if back else there).copy_(there if back else here)


def decode(moment: Moment, tensors: Mapping[str, Tensor], start: int, end: int) -> Tensor:
    """A moment's elements [start, end) of flat tensors: a view of full ones, else a new fp32 tensor. 256 | start."""
    values = tensors[moment.name][start:end]
    if values.dtype != torch.uint8:
        return values
    absmax = tensors[f"{moment.name}_absmax"][start // BLOCK : -(-end // BLOCK)]
    return dequantize_blockwise(values, absmax, dynamic_code(moment.signed, values.device), BLOCK)


def encode(moment: Moment, values: Tensor, tensors: Mapping[str, Tensor], start: int) -> None:
    """Put a moment back where `decode` took it; nothing to do if that was a view."""
    target = tensors[moment.name][start : start + values.numel()]
    if target.dtype != torch.uint8:
        if target.data_ptr() != values.data_ptr():
            target.copy_(values)
        return
    codes, absmax = quantize_blockwise(values, dynamic_code(moment.signed, values.device), BLOCK)
    target.copy_(codes)
    tensors[f"{moment.name}_absmax"][start // BLOCK : start // BLOCK + absmax.numel()] = absmax
