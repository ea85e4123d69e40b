"""Optimizer state in pages: on the device while a byte budget lasts, in pinned host memory otherwise.

The flat state of every layout (states.Storage) is cut into pages, all in one table in the order in which a step visits
them. What fits the budget stays on the device (resident pages, the last of the table). The others are streamed through
one or two staging slots: a page is copied in, updated, and copied out at once, while its slot's twin holds the next
page, already copied in or on its way. After the last page come the first ones again, for the next step: their copies
run during the next forward and backward. Which bytes an update reads and writes does not depend on any of this, so
paged and unpaged steps are equal bit for bit.

A page never has its only valid copy where something may overwrite it: the table changes after a copy is queued, the
next copy into a slot waits for the one out of it, and after a failed copy `_recover` looks at what did arrive.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .page_device import CudaDevice, Device
from .pages import PAGE_BYTES, Budget, Page, PagedState, Slot, check_budget, page_bytes_for, page_elements_for
from .simulated_device import SimulatedDevice
from .states import Field


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
    """The page table of one device's optimizer state, and what moves the pages.

    budget: bytes that resident pages and staging may take together, never exceeded; or "auto": what is left beside the
    model, looked up at every step. Below one page is an InputError that names the least; below two, steps run with one
    staging slot, so copies and updates take turns.
    """

    def __init__(self, device: Device, budget: Budget, page_bytes: int = PAGE_BYTES) -> None:
        self.device, self.budget = device, check_budget(budget)
        self.page_bytes = page_bytes_for(budget, page_bytes)
        self.counters = Counters()
        self.held = 0  # bytes of the device in our hands
        self.states: list[PagedState] = []
        self.pages: list[Page] = []  # of all states, in the order of a step
        self._streamed: list[Page] = []
        self._places: dict[Page, int] = {}  # in _streamed
        self._slots: list[Slot] = []
        self._staging: list[Slot] = []
        self._stale = self._visiting = False
        self._visited: list[PagedState] = []  # in this step
        self._cap: int | None = None  # "auto" takes no more since memory ran out

    def state(self, fields: Mapping[str, Field], page_elements: int | None = None) -> PagedState:
        """An empty flat state. Its pages come after those of states made before, until a step shows another order."""
        state = PagedState(self, fields, page_elements or page_elements_for(fields, self.page_bytes))
        self.states.append(state)
        return state

    def refit(self) -> None:
        """The table has changed."""
        self.pages = [page for state in self.states for page in state.pages]
        for number, page in enumerate(self.pages):
            page.number = number
        self._stale = True

    def visit(self, state: PagedState, order: Sequence[Page]) -> Iterator[tuple[Page, Tensor]]:
        """Each page of `order` (some of the state's, in their order) with the memory on the device that holds it.

        Work that changes the memory is queued on the compute stream before the next page is asked for.
        """
        if self._visiting:
            raise RuntimeError("the pages of a step are visited one state after the other")
        self._visiting = True
        try:
            begins = state in self._visited
            if begins:
                self._follow()
            self._visited.append(state)
            if self._stale or (begins and self.budget == "auto"):
                self._fit()
            self._fetch(next((self._places[page] for page in order if not page.resident), None))
            for page in order:
                self.counters.misses += page.fetched
                self.counters.hits += not page.fetched
                yield page, self._arrive(page)
                if not page.resident:
                    self._write_back(page)
                    self._fetch(self._places[page] + 1)
        except BaseException:  # also when the caller stops half-way
            self._recover()
            raise
        finally:
            self._visiting = False
            self.counters.stall_seconds = self.device.stalled()

    def _follow(self) -> None:
        """A step has ended. Put the table in its order, if it went another way, so that the next one is foreseen."""
        went = [self.states.index(state) for state in self._visited]
        if went != sorted(went):
            self.states = [*self._visited, *(state for state in self.states if state not in self._visited)]
            self.refit()
        self._visited.clear()

    def read(self, page: Page) -> Mapping[str, Tensor]:
        """A page's tensors in host memory. They may be views: do not write to them."""
        if page.slot is not None and (page.host is None or (page.dirty and page.written is None)):
            if page.arriving is not None:
                self.device.wait(page.arriving)
            return page.tensors(page.slot.memory[: page.size].to("cpu", copy=True))
        self._settle(page)
        blank = torch.zeros(page.size if page.host is None else 0, dtype=torch.uint8, device="cpu")
        return page.tensors(blank if page.host is None else page.host)

    def open(self, page: Page) -> Mapping[str, Tensor]:
        """A page's tensors, to be overwritten by work on the compute stream: on the device if resident."""
        if page.resident and page.slot is not None:
            return page.tensors(self._arrive(page))
        self._vacate(page)
        return page.tensors(self._host(page))

    def remove(self, page: Page) -> Mapping[str, Tensor]:
        """Forget a page; returns what it held in host memory, nothing if it was blank."""
        if page.host is None and page.slot is None:
            return {}
        kept = {name: tensor.clone() for name, tensor in self.read(page).items()}
        self._vacate(page)
        return kept

    def evict_all(self) -> int:
        """Bring every page to the host and give back all memory of the device; returns the bytes given back.

        The next step brings pages back: as many as before under a fixed budget; under "auto" half as many at most,
        since what they were evicted for will come again.
        """
        if self._visiting:
            raise RuntimeError("pages cannot be evicted while a step visits them")
        held = self.held
        if self.budget == "auto" and held:
            self.device.room(held)  # it learns from the peak that was reached with these pages in place
            self._cap = held // 2
        self._stale = True
        self._evict([page for page in self.pages if page.slot is not None])
        self._close_staging()
        self.device.tidy()
        return held

    def renewed(self) -> "Pager":
        """A pager without states that counts on where this one stopped."""
        pager = Pager(self.device, self.budget, self.page_bytes)
        pager.counters, pager._cap = self.counters, self._cap
        return pager

    def close(self) -> None:
        """Let go of all memory, and of what it held, once no copy can reach it any more."""
        self.device.settle()
        for slot in list(self._slots):
            self._close(slot)
        self.states, self.pages, self._staging = [], [], []

    # How many slots, and which pages stay.

    def _fit(self) -> None:
        largest, total = max((page.size for page in self.pages), default=0), sum(page.size for page in self.pages)
        if self.budget != "auto":
            self._arrange(self.budget)
        else:
            least = min(total, 2 * largest)
            limit = max(least, min(self.device.room(self.held), self._cap if self._cap is not None else total))
            if not self._stale and self.held <= limit < min(total, self.held + self.held // 8):
                return  # a few pages more are not worth that the allocator gives back its memory and takes it again
            while not self._arranged(limit):
                if limit == least:
                    self._arrange(largest)
                    break
                limit = self._cap = max(least, min(limit - 1, self.held // 2))
        self._streamed = [page for page in self.pages if not page.resident]
        self._places = {page: place for place, page in enumerate(self._streamed)}
        self._stale = False

    def _arranged(self, limit: int) -> bool:
        try:
            self._arrange(limit)
        except torch.OutOfMemoryError:
            return False
        return True

    def _arrange(self, limit: int) -> None:
        """Evict what `limit` bytes have no room for, then take in what they have room for."""
        sizes = [page.size for page in self.pages] or [0]
        staging = 0 if sum(sizes) <= limit else 2 if limit >= 2 * max(sizes) else 1
        left, keep = limit - staging * max(sizes), set[Page]()
        for page in reversed(self.pages):
            if page.size <= left:
                keep.add(page)
                left -= page.size
        leaving = [page for page in self.pages if page.resident and page not in keep]
        coming = [page for page in self.pages if page in keep and not page.resident]
        self._evict(leaving)
        other = len(self._staging) != staging or any(slot.memory.numel() < max(sizes) for slot in self._staging)
        if other:
            self._close_staging()
        if leaving or coming or other:
            self.device.tidy()
        while len(self._staging) < staging:
            self._staging.append(self._open(max(sizes)))
        for page in coming:
            self._take_in(page)

    def _take_in(self, page: Page) -> None:
        """Give a page a place of its own on the device."""
        self._vacate(page)
        slot = self._open(page.size)
        if page.host is None:
            slot.memory.zero_()
            slot.page, page.slot = page, slot
        else:
            try:
                self._load(page, slot)
            except BaseException:
                self._close(slot)
                raise
        page.resident = True

    def _open(self, size: int) -> Slot:
        slot = Slot(self.device.empty(size), self.device.mark())
        self._slots.append(slot)
        self.held += size
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.held)
        return slot

    def _close(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self.held -= slot.memory.numel()
        self.device.free(slot.memory)

    def _close_staging(self) -> None:
        for slot in self._staging:
            for page in (slot.updated, slot.page):
                if page is not None and slot in (page.slot, page.home):
                    self._vacate(page)
        while self._staging:
            self._close(self._staging.pop())

    # Moving pages.

    def _fetch(self, place: int | None) -> None:
        """Have the next streamed pages from `place` on in staging, or on their way. After the last comes the first."""
        if place is None:
            return
        count = len(self._streamed)
        ahead = (self._streamed[(place + i) % count] for i in range(count))
        wanted = list(islice((page for page in ahead if page.expected), len(self._staging)))
        for page in wanted:
            if page.slot is None:
                self._load(page, next(slot for slot in self._staging if slot.page not in wanted))

    def _load(self, page: Page, slot: Slot) -> None:
        """Queue a page's copy into a slot, behind the copy out of it.

        That one also is behind the last copy of this page to the host: a page leaves its slot when the next one is
        queued to come in, behind its copy out; and copies in keep their order.
        """
        former, updated = slot.page, slot.updated
        if former is not None and former.dirty and former.written is None:
            self._write_back(former)  # an earlier attempt failed
        last = updated.written if updated is not None else None
        after = [slot.born] if last is None else [slot.born, last]
        arriving = self.device.copy("in", slot.memory[: page.size], self._host(page), after)
        if former is not None:
            former.slot = None
            self.counters.evictions += 1
        slot.page, page.slot, page.arriving, page.fetched = page, slot, arriving, True
        self.counters.bytes_in += page.size

    def _arrive(self, page: Page) -> Tensor:
        """Let compute wait until the page is there, and hand it over to be changed.

        Its last copy out may still read: what that brings to the host is out of date either way, and copied again.
        """
        slot = page.slot
        assert slot is not None
        if page.arriving is not None:
            self.device.wait(page.arriving)
        page.arriving, page.fetched = None, False
        self.device.use(slot.memory)
        page.dirty, page.written = True, None
        if page.resident:
            page.host = None  # out of date from now on, and not needed soon
        slot.updated, page.home = page, slot
        return slot.memory[: page.size]

    def _write_back(self, page: Page) -> None:
        assert page.slot is not None
        host = self._host(page)
        page.written = self.device.copy("out", host, page.slot.memory[: page.size], [self.device.mark()])
        self.counters.bytes_out += page.size

    def _host(self, page: Page) -> Tensor:
        if page.host is None:
            page.host = self.device.pinned(page.size)
            page.host.zero_()
        return page.host

    def _settle(self, page: Page) -> None:
        """The host waits until no copy of this page is under way."""
        try:
            for event in (page.arriving, page.written):
                if event is not None:
                    event.synchronize()
        except BaseException:
            self._recover()
            raise
        if page.written is not None:
            page.dirty, page.written, page.home = False, None, None

    def _evict(self, pages: Sequence[Page]) -> None:
        for page in pages:
            if page.dirty and page.written is None:
                self._write_back(page)
        for page in pages:
            self._vacate(page)

    def _vacate(self, page: Page) -> None:
        """Bring a page to the host, if it is on the device; give back its place, if that was its own."""
        if page.slot is not None and (page.host is None or (page.dirty and page.written is None)):
            self._write_back(page)
        self._settle(page)
        slot = page.slot
        if slot is None:
            return
        page.slot = slot.page = None
        self.counters.evictions += 1
        if page.resident:
            page.resident = False
            self._close(slot)

    def _recover(self) -> None:
        """After a failure: let all copies end, and make the table say what is where."""
        self.device.settle()
        for slot in list(self._slots):
            page = slot.page
            if page is not None and page.arriving is not None and not page.arriving.done():
                page.slot = slot.page = page.arriving = None
                page.fetched = False
                if page.resident:
                    page.resident = False
                    self._close(slot)
        for slot in self._slots:
            page = slot.updated
            if page is not None and page.home is slot and page.written is not None and not page.written.done():
                page.written = None
                if slot.page is None:
                    slot.page, page.slot = page, slot
        for page in self.pages:
            if page.slot is None:
                page.arriving = None
        self._stale = True


def make_device(device: torch.device, older_peak: int = 0) -> Device:
    """CUDA's streams, or for tensors of the CPU their simulation."""
    return CudaDevice(device, older_peak) if device.type == "cuda" else SimulatedDevice()
