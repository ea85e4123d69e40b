"""Pages of a flat state, the slots they lie in, and the flat state made of them (pager.py moves them)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .layout import CHUNK
from .page_device import Event
from .states import Field, Slice

if TYPE_CHECKING:
    from .pager import Pager

ALIGNMENT = 16  # bytes: kernels read vectors of so many
PAGE_BYTES = 16 * 2**20  # large enough for a copy to reach full speed, small enough that two are little memory

Budget = int | Literal["auto"]


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
        self._wanted: Sequence[tuple[int, int]] | None = None  # the last step's spans, and the pages that they lie in
        self._order: list[Page] = []

    def grow(self, total: int) -> None:
        """Make room for `total` elements. The last page may be short; it is made anew when it grows."""
        if total <= self.total:
            return
        check_pages(self.pager.budget, [Page(0, min(total, self.page_elements), self.fields).size])
        partial = self.pages[-1] if self.pages and self.total % self.page_elements else None
        first = partial.start if partial else self.total
        kept = self.pager.remove(partial) if partial else {}
        if partial:
            self.pages.pop()
        for start in range(first, total, self.page_elements):
            self.pages.append(Page(start, min(total, start + self.page_elements), self.fields))
        self.total, self._wanted = total, None
        self.pager.refit()
        if kept:
            self.write(first, kept)

    def slices(self, wanted: Sequence[tuple[int, int]]) -> Iterator[Slice]:
        if wanted != self._wanted:
            self._expect(wanted)
        for page, memory in self.pager.visit(self, self._order):
            yield Slice(page.start, page.end, page.tensors(memory))

    def _expect(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Note which pages a step needs. Pages and spans ascend, so one pass over both will do."""
        place = 0
        for page in self.pages:
            while place < len(wanted) and wanted[place][1] <= page.start:
                place += 1
            page.expected = place < len(wanted) and wanted[place][0] < page.end
        self._wanted, self._order = wanted, [page for page in self.pages if page.expected]

    def read(self, spans: Sequence[tuple[int, int]]) -> list[Mapping[str, Tensor]]:
        """New tensors in host memory. Each page is brought there once, however many spans lie in it."""
        found: list[Mapping[str, Tensor]] = [
            {name: torch.empty((b - a) // f.per, dtype=f.dtype, device="cpu") for name, f in self.fields.items()}
            for a, b in spans
        ]
        first = 0
        for page in self.pages:
            while first < len(spans) and spans[first][1] <= page.start:
                first += 1
            after = next((i for i in range(first, len(spans)) if spans[i][0] >= page.end), len(spans))
            tensors = self.pager.read(page) if first < after else {}
            for (start, end), into in zip(spans[first:after], found[first:after], strict=True):
                for name, source in tensors.items():
                    part, per = _cut(page, source, self.fields[name], start, end), self.fields[name].per
                    at = max(page.start - start, 0) // per
                    into[name][at : at + part.numel()] = part
        return found

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


def check_budget(budget: Budget) -> Budget:
    """The budget itself; InputError if it cannot be one."""
    if budget != "auto" and (not isinstance(budget, int) or budget <= 0):
        raise InputError(f'the optimizer budget is "auto" or a positive number of bytes, got {budget!r}')
    return budget


def page_bytes_for(budget: Budget, most: int = PAGE_BYTES) -> int:
    """At most an eighth of the budget, so that staging takes a quarter. A power of two, as pinned memory is."""
    return most if budget == "auto" else min(most, 1 << max(budget // 8, 1).bit_length() - 1)


def page_elements_for(fields: Mapping[str, Field], page_bytes: int) -> int:
    """Elements of a page: whole chunks, one at least."""
    return max(1, page_bytes // sum(CHUNK // f.per * f.dtype.itemsize for f in fields.values())) * CHUNK


def check_room(budget: Budget, states: Iterable[tuple[Mapping[str, Field], int]]) -> None:
    """InputError if the budget has no room for the largest page of flat states of such fields and elements each."""
    pages = ((fields, min(total, page_elements_for(fields, page_bytes_for(budget)))) for fields, total in states)
    check_pages(budget, [Page(0, elements, fields).size for fields, elements in pages])


def check_pages(budget: Budget, sizes: Iterable[int]) -> None:
    """InputError when the largest page (bytes) does not fit a fixed budget, naming the least that would do."""
    least = max(sizes, default=0)
    if budget != "auto" and least > budget:
        raise InputError(f"an optimizer budget of {budget} bytes is less than one page of state; the least is {least}")


def _cut(page: Page, tensor: Tensor, field: Field, start: int, end: int) -> Tensor:
    """What of a page's tensor belongs to elements [start, end) of the state."""
    low, high = max(start, page.start) - page.start, min(end, page.end) - page.start
    return tensor[low // field.per : -(-high // field.per)]
