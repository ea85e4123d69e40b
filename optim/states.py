"""What an optimizer keeps for each element, and where: the flat tensors behind a layout.

A moment (a running mean of gradients or of their squares) is kept in full (fp32; fp64 for fp64 parameters) or as 8-bit
codes of the dynamic map with one fp32 scale for every 256 elements, as bitsandbytes does: the signed map where the
moment has a sign, the unsigned one where it has none. An element's nearest code is found exactly (kernels/blockwise).

Fresh state is zero bytes in either form: code 0 times a scale of 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.blockwise import dequantize_blockwise, quantize_blockwise
from ..kernels.codes import dynamic_code
from .layout import BLOCK


class Moment(NamedTuple):
    """One running mean: its name in state dicts, and whether it can be negative."""

    name: str
    signed: bool


class Field(NamedTuple):
    """One flat tensor: its dtype, and how many elements of the state share one of its entries."""

    dtype: torch.dtype
    per: int


def fields(moments: Sequence[Moment], bits: int, dtype: torch.dtype) -> dict[str, Field]:
    """The flat tensors that keep `moments` of parameters of `dtype` with 8 or 32 bits (fp64 is never cut to either)."""
    if bits == 32:
        return {m.name: Field(torch.promote_types(dtype, torch.float32), 1) for m in moments}
    return {
        name: field
        for m in moments
        for name, field in ((m.name, Field(torch.uint8, 1)), (f"{m.name}_absmax", Field(torch.float32, BLOCK)))
    }


class Slice(NamedTuple):
    """Elements [start, end) of a flat state, as `tensors` that begin at `start`; both are multiples of BLOCK."""

    start: int
    end: int
    tensors: Mapping[str, Tensor]


class Storage(Protocol):
    """Who keeps the flat tensors: `Resident` whole and on the parameters' device, a pager in pieces and anywhere."""

    resident: bool  # whether `slices` gives one slice, the same tensors at every step

    def grow(self, total: int) -> None:
        """Make room for `total` elements (a multiple of BLOCK), if there is less; new ones are zero."""

    def slices(self, wanted: Sequence[tuple[int, int]]) -> Iterator[Slice]:
        """Slices that together hold the spans `wanted` (ascending), in order, each cut at a multiple of CHUNK.

        Whoever iterates changes a slice's tensors in place, with work queued on the device's current stream, before
        asking for the next one, and runs to the end.
        """

    def read(self, spans: Sequence[tuple[int, int]]) -> list[Mapping[str, Tensor]]:
        """The state of each of some spans (ascending, of whole blocks), on any device; Resident gives views."""

    def write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite from element `start` on, with tensors on any device."""


class Resident:
    """Flat tensors that stay on one device."""

    resident = True

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        self.fields = dict(fields)
        self.total = 0
        self.tensors = {name: torch.zeros(0, dtype=f.dtype, device=device) for name, f in self.fields.items()}

    def grow(self, total: int) -> None:
        if total <= self.total:
            return
        grown = {name: old.new_zeros(total // self.fields[name].per) for name, old in self.tensors.items()}
        for name, old in self.tensors.items():
            grown[name][: old.numel()] = old
        self.tensors, self.total = grown, total

    def slices(self, wanted: Sequence[tuple[int, int]]) -> Iterator[Slice]:
        if wanted:
            yield Slice(0, self.total, self.tensors)

    def read(self, spans: Sequence[tuple[int, int]]) -> list[Mapping[str, Tensor]]:
        kept = [(name, self.tensors[name], field.per) for name, field in self.fields.items()]
        return [{name: values[a // per : b // per] for name, values, per in kept} for a, b in spans]

    def write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        for name, values in tensors.items():
            first = start // self.fields[name].per
            self.tensors[name][first : first + values.numel()] = values


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
