"""Pages of a flat state, the slots they lie in, and the flat state made of them (pager.py moves them)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .page_device import Event
from .states import Field, Slice

if TYPE_CHECKING:
    from .pager import Pager

ALIGNMENT = 16  # bytes: kernels read vectors of so many


class Slot:
    """Memory on the device for one page at a time."""

    def __init__(self, memory: Tensor, born: Event) -> None:
        self.memory = memory
        self.born = born  # work that may still use this memory for something else
        self.page: Page | None = None
        self.updated: Page | None = None  # the page last updated here; unless written, this is its only valid copy


class Page:
    """Elements [start, end) of one flat state, and where they are.

    dirty: the device's copy is newer than the host's, unless `written` has ended. A page without slot and without host
    memory is blank: all zero, never touched.
    """

    def __init__(self, start: int, end: int, fields: Mapping[str, Field]) -> None:
        self.start, self.end = start, end
        self.number = 0  # in the table
        self.parts: dict[str, tuple[int, int, Field]] = {}  # name -> first byte, bytes, field
        self.size = 0
        for name, field in fields.items():
            size = (end - start) // field.per * field.dtype.itemsize
            self.parts[name] = self.size, size, field
            self.size += -(-size // ALIGNMENT) * ALIGNMENT
        self.host: Tensor | None = None
        self.slot: Slot | None = None
        self.home: Slot | None = None  # where it was last updated
        self.resident = self.dirty = self.fetched = False
        self.expected = True  # it was wanted the last time its state was visited
        self.arriving: Event | None = None
        self.written: Event | None = None

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        return {name: memory[at : at + size].view(field.dtype) for name, (at, size, field) in self.parts.items()}


class PagedState:
    """One flat state in pages: a states.Storage."""

    resident = False

    def __init__(self, pager: "Pager", fields: Mapping[str, Field], page_elements: int) -> None:
        self.pager, self.fields, self.page_elements = pager, dict(fields), page_elements
        self.pages: list[Page] = []
        self.total = 0

    def grow(self, total: int) -> None:
        """Make room for `total` elements. The last page may be short; it is made anew when it grows."""
        partial = self.pages.pop() if self.pages and self.total % self.page_elements else None
        first = partial.start if partial else self.total
        kept = self.pager.remove(partial) if partial else {}
        for start in range(first, total, self.page_elements):
            self.pages.append(Page(start, min(total, start + self.page_elements), self.fields))
        self.total = total
        self.pager.refit()
        if kept:
            self.write(first, kept)

    def slices(self, wanted: Sequence[tuple[int, int]]) -> Iterator[Slice]:
        for page in self.pages:
            page.expected = any(start < page.end and page.start < end for start, end in wanted)
        for page, memory in self.pager.visit(self, [page for page in self.pages if page.expected]):
            yield Slice(page.start, page.end, page.tensors(memory))

    def read(self, start: int, end: int) -> Mapping[str, Tensor]:
        """New tensors in host memory."""
        parts = [(page, self.pager.read(page)) for page in self.pages if page.start < end and start < page.end]
        return {
            name: torch.cat([_cut(page, tensors[name], field, start, end) for page, tensors in parts])
            if parts
            else torch.zeros(0, dtype=field.dtype, device="cpu")
            for name, field in self.fields.items()
        }

    def write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        end = start + max(values.numel() * self.fields[name].per for name, values in tensors.items())
        for page in self.pages:
            if page.start < end and start < page.end:
                into = self.pager.open(page)
                for name, values in tensors.items():
                    per = self.fields[name].per
                    first = max(page.start - start, 0) // per
                    target = _cut(page, into[name], self.fields[name], start, start + values.numel() * per)
                    target.copy_(values[first : first + target.numel()])


def _cut(page: Page, tensor: Tensor, field: Field, start: int, end: int) -> Tensor:
    """What of a page's tensor belongs to elements [start, end) of the state."""
    low, high = max(start, page.start) - page.start, min(end, page.end) - page.start
    return tensor[low // field.per : -(-high // field.per)]
