"""Optimizer state in pages: on the device while a byte budget lasts, in pinned host memory otherwise.

Every flat state is cut into pages, all in one table in the order in which a step visits them. What fits the budget
stays on the device (resident pages, the last of the table), each in a frame of its own. The others are streamed through
one or two staging frames: a page is copied in, updated, and copied out at once, while the other frame holds the next
page, already copied in or on its way. After the last page come the first ones again, for the next step: their copies
run during the next forward and backward. Which bytes an update reads and writes does not depend on any of this, so
paged and unpaged steps are equal bit for bit.

A page never has its only valid copy where something may overwrite it: the table changes after a copy is queued, so one
that cannot be queued changes nothing, and the next copy into a frame waits for the one out of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.page_device import PageDevice
from .state import CHUNK, Field, FlatState, Slice, whole

ALIGNMENT = 16  # bytes: kernels read vectors of so many
IDLE = 4  # a page without use while as many times all pages had it makes room for others
PAGE_BYTES = 16 * 2**20  # large enough for a copy to reach full speed, small enough that two are little memory

Budget = int | Literal["auto"]


def check_budget(budget: Budget) -> Budget:
    """The budget itself; InputError if it cannot be one."""
    if budget != "auto" and (not isinstance(budget, int) or budget <= 0):
        raise InputError(f'the optimizer budget is "auto" or a positive number of bytes, got {budget!r}')
    return budget


def check_room(budget: Budget, states: Iterable[tuple[Mapping[str, Field], int]]) -> None:
    """InputError if the budget has no room for the least page, one chunk or all there is, of any (fields, elements)."""
    least = max((sizes(fields, min(elements, CHUNK))[1] for fields, elements in states), default=0)
    if budget != "auto" and least > budget:
        raise InputError(f"an optimizer budget of {budget} bytes is less than one page of state; the least is {least}")


def sizes(fields: Mapping[str, Field], elements: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Where a page of so many elements has its fields (first byte, bytes), and the bytes of all."""
    parts, size = dict[str, tuple[int, int]](), 0
    for name, field in fields.items():
        parts[name] = size, field.count(elements) * field.dtype.itemsize
        size = whole(sum(parts[name]), ALIGNMENT)
    return parts, size


class Frame:
    """Memory on the device that has room for one page."""

    def __init__(self, memory: Tensor, born: Any) -> None:
        self.memory = memory
        self.born = born  # an event: work that may still use this memory for something else
        self.page: Page | None = None  # that is there, or on its way


class Page:
    """Elements [start, end) of one flat state, and where they are. Without frame and host memory it is blank: zero."""

    def __init__(self, state: FlatState, start: int, end: int) -> None:
        self.state, self.start, self.end = state, start, end
        self.entries = [segment.entry for segment in state.segments(start, end)]
        self.parts, self.size = sizes(state.fields, end - start)
        self.host: Tensor | None = None
        self.frame: Frame | None = None
        self.resident = False  # it has a frame of its own
        self.used = 0  # when a step last worked on it, in pages that steps have worked on
        self.dirty = False  # newer in its frame than on the host, and no copy out is queued
        self.arriving: Any = None  # event of the copy in, until compute waits for it
        self.leaving: Any = None  # event of the last copy out

    def wanted(self) -> bool:
        """Whether a step works on it: one of its parameters has a gradient."""
        return any(entry.gradient is not None for entry in self.entries)

    def slice(self, memory: Tensor) -> Slice:
        """Its tensors in memory that holds it."""
        fields = self.state.fields
        tensors = {name: memory[at : at + size].view(fields[name].dtype) for name, (at, size) in self.parts.items()}
        return Slice(self.state, self.start, self.end, tensors)


@dataclass
class Counters:
    """What paging did since the optimizer was made; bytes and seconds are sums."""

    hits: int = 0  # pages that were on the device when their update was due
    misses: int = 0  # pages that were copied in for it
    evictions: int = 0  # pages that left the device
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0  # the device's compute stood still for a copy
    peak_bytes: int = 0  # most ever on the device, resident pages and staging together


class Pager:
    """The page table of an optimizer's state, and what moves the pages.

    budget: bytes that resident pages and staging may take together, never exceeded; or "auto": what is left beside the
    model, looked up at every step. Below two pages, steps run with one staging frame: copies and updates take turns."""

    def __init__(self, device: PageDevice, budget: Budget, cap: int | None = None) -> None:
        self.device, self.budget = device, budget
        self.page_bytes = PAGE_BYTES
        if budget != "auto":  # at most an eighth, so that staging takes a quarter; pinned memory is a power of two
            self.page_bytes = min(PAGE_BYTES, 1 << max(budget // 8, 1).bit_length() - 1)
        self.counters = Counters()
        self.held = 0  # bytes of the device in our hands
        self.pages: list[Page] = []  # in the order of a step
        self._staging: list[Frame] = []
        self._stale = self._visiting = False
        self._used = 0  # pages that steps have worked on
        self._cap = cap  # "auto" takes no more, as a forecast said or since memory ran out

    def add(self, state: FlatState, start: int) -> None:
        """Blank pages for what has joined a flat state from element `start` on: whole chunks, one at least."""
        length = max(CHUNK, self.page_bytes // sizes(state.fields, CHUNK)[1] * CHUNK)
        for first in range(start, state.total, length):
            self.pages.append(Page(state, first, min(state.total, first + length)))
        self._stale = True

    def visit(self) -> Iterator[Slice]:
        """Each page on which a step works, on the device. What changes it is queued before the next is asked for."""
        if self._visiting:
            raise RuntimeError("pages are visited by one step after the other")
        self._visiting = True
        try:
            self._fit()
            order = [page for page in self.pages if page.wanted()]
            streamed = [page for page in order if not page.resident]
            done = 0
            self._fetch(streamed, done)
            for page in order:
                self._used = page.used = self._used + 1
                self.counters.misses += page.arriving is not None
                self.counters.hits += page.arriving is None
                yield page.slice(self._arrive(page))
                if not page.resident:
                    self._write_back(page)
                    done += 1
                    self._fetch(streamed, done)
        finally:
            self._visiting = False
            self.counters.stall_seconds = self.device.stalled()

    def read(self) -> Iterator[Slice]:
        """Every page in host memory, not to be written to."""
        for page in self.pages:
            if page.frame is not None and (page.dirty or page.host is None):
                yield page.slice(page.frame.memory[: page.size].to("cpu", copy=True))
            elif page.host is None:
                yield page.slice(torch.zeros(page.size, dtype=torch.uint8, device="cpu"))
            else:
                if page.leaving is not None:
                    page.leaving.synchronize()
                yield page.slice(page.host)

    def fill(self) -> Iterator[Slice]:
        """Every page in host memory, to be written to before the first step."""
        return (page.slice(self._host(page)) for page in self.pages)

    def host_bytes(self) -> int:
        return sum(page.size for page in self.pages if page.host is not None)

    def evict_all(self) -> int:
        """Bring every page to the host and give back all memory of the device; returns the bytes given back.

        The next step brings pages back: as many as before under a fixed budget; under "auto" half as many at most,
        since what they were evicted for will come again."""
        if self._visiting:
            raise RuntimeError("pages cannot be evicted while a step visits them")
        held = self.held
        if self.budget == "auto" and held:
            self.device.room(held)  # it learns from the peak that was reached with these pages in place
            self._cap = held // 2
        self._stale = True
        self._clear(set())
        return held

    def close(self) -> None:
        """Let go of all memory, and of what it held, once no copy can reach it any more."""
        self.device.settle()
        for frame in [*self._staging, *(page.frame for page in self.pages if page.resident)]:
            assert frame is not None
            self._close(frame)
        self.pages, self._staging = [], []

    # How many frames, and which pages stay.

    def _fit(self) -> None:
        largest, total = max((page.size for page in self.pages), default=0), sum(page.size for page in self.pages)
        least, long_ago = min(total, 2 * largest), self._used - IDLE * len(self.pages)
        self._stale |= any(page.resident and page.used < long_ago for page in self.pages)
        if self.budget != "auto":
            limit, wanted = self.budget, self._stale
        else:
            limit = max(least, min(self.device.room(self.held), total if self._cap is None else self._cap))
            complete = all(page.resident for page in self.pages) and limit >= total
            few = limit < min(total, self.held + self.held // 8)
            # A few pages more are not worth that the allocator gives back its memory and takes it again.
            wanted = self._stale or self.held > limit or not (complete or few)
        if not wanted:
            return
        while True:
            try:
                self._arrange(limit, largest, total)
                break
            except torch.OutOfMemoryError:
                if self.budget != "auto" or limit <= largest:
                    raise
                if limit > least:
                    limit = self._cap = max(least, min(limit - 1, self.held // 2))
                else:  # for this step alone: there may be room again
                    limit = largest
        self._stale = False

    def _arrange(self, limit: int, largest: int, total: int) -> None:
        """Evict what `limit` bytes have no room for, then take in what they have room for."""
        staging = 0 if total <= limit else 2 if limit >= 2 * largest else 1
        left, stay = limit - staging * largest, set[Page]()
        for page in sorted(self.pages, key=lambda page: page.used >= self._used - IDLE * len(self.pages))[::-1]:
            if page.size <= left:
                stay.add(page)
                left -= page.size
        resident = {page for page in self.pages if page.resident}
        if stay == resident and [frame.memory.numel() for frame in self._staging] == staging * [largest]:
            return
        self._clear(stay)
        for _ in range(staging):
            self._staging.append(self._open(largest))
        for page in self.pages:
            if page in stay and not page.resident:
                self._take_in(page)

    def _clear(self, stay: set[Page]) -> None:
        """Bring all pages but resident ones in `stay` to the host, wait for that, and give back their memory."""
        pages = [page for page in self.pages if page.frame is not None and not (page.resident and page in stay)]
        for page in pages:
            if page.dirty or page.host is None:
                self._write_back(page)
        for page in pages:
            for event in (page.arriving, page.leaving):
                if event is not None:
                    event.synchronize()
            frame = page.frame
            assert frame is not None
            frame.page = page.frame = page.arriving = page.leaving = None
            self.counters.evictions += 1
            if page.resident:
                page.resident = False
                self._close(frame)
        while self._staging:
            self._close(self._staging.pop())
        self.device.tidy()

    def _take_in(self, page: Page) -> None:
        """Give a page a frame of its own on the device."""
        frame = self._open(page.size)
        if page.host is None:
            frame.memory.zero_()
            frame.page, page.frame = page, frame
        else:
            try:
                self._load(page, frame)
            except BaseException:
                self._close(frame)
                raise
        page.resident = True

    def _open(self, size: int) -> Frame:
        frame = Frame(self.device.empty(size), self.device.mark())
        self.held += size
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.held)
        return frame

    def _close(self, frame: Frame) -> None:
        self.held -= frame.memory.numel()
        self.device.free(frame.memory)

    # Moving pages.

    def _fetch(self, streamed: Sequence[Page], place: int) -> None:
        """Have the next pages from `place` on in staging, or on their way. After the last comes the first."""
        count = len(streamed)
        coming = [streamed[(place + i) % count] for i in range(min(count, len(self._staging)))]
        for page in coming:
            if page.frame is None:
                self._load(page, next(frame for frame in self._staging if frame.page not in coming))

    def _load(self, page: Page, frame: Frame) -> None:
        """Queue a page's copy into a frame, behind the copies out of the frame and to the page's host memory."""
        former = frame.page
        if former is not None and former.dirty:
            self._write_back(former)  # a step ended before it could
        after = [frame.born, page.leaving, None if former is None else former.leaving]
        after = [event for event in after if event is not None]
        page.arriving = self.device.copy("in", frame.memory[: page.size], self._host(page), after)
        if former is not None:
            former.frame = former.arriving = None
            self.counters.evictions += 1
        frame.page, page.frame = page, frame
        self.counters.bytes_in += page.size

    def _arrive(self, page: Page) -> Tensor:
        """Let compute wait until the page is there, and hand its memory over to be changed.

        Its last copy out may still read: what that brings to the host is out of date either way, and copied again."""
        assert page.frame is not None
        if page.arriving is not None:
            self.device.wait(page.arriving)
        page.arriving, page.dirty = None, True
        self.device.use(page.frame.memory)
        if page.resident:
            page.host = None  # out of date from now on, and not needed soon
        return page.frame.memory[: page.size]

    def _write_back(self, page: Page) -> None:
        assert page.frame is not None
        memory = page.frame.memory[: page.size]
        page.leaving = self.device.copy("out", self._host(page), memory, [self.device.mark()])
        page.dirty = False
        self.counters.bytes_out += page.size

    def _host(self, page: Page) -> Tensor:
        if page.host is None:
            page.host = self.device.pinned(page.size).zero_()
        return page.host
