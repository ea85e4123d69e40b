"""What CudaDevice asks of the allocator, with CUDA's functions replaced: no GPU needed, and none can show this."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fourbit.kernels.page_device import CudaDevice, peaks
from fourbit.optim.paging import Pager
from fourbit.optim.state import CHUNK, Entry, FlatState, Moment

PAGE = 8 * CHUNK


def paged(pages):
    """A pager, and so many pages of one chunk each, which a step wants."""
    pager = Pager(CudaDevice(torch.device("cpu")), "auto")
    pager.page_bytes = PAGE
    state = FlatState(0, torch.float32, 32, (Moment("mean", True), Moment("square", False)))
    entries = [Entry(nn.Parameter(torch.zeros(CHUNK)), i, 0, gradient=torch.zeros(1)) for i in range(pages)]
    pager.add(state, state.join(entries, 0))
    return pager


class Cuda:
    """A device of 16 bytes, its allocator's figures, and what is asked of them in order."""

    def __init__(self, monkeypatch):
        self.total, self.live, self.cached, self.peak, self.pages, self.log = 16, 0, 0, 0, 0, []
        nothing = lambda *_, **__: None
        stream = lambda *_: SimpleNamespace(synchronize=nothing, wait_event=nothing)
        event = lambda **_: SimpleNamespace(
            record=nothing, query=lambda: True, synchronize=nothing, elapsed_time=lambda _: 0.0
        )
        for name, value in {
            "Stream": stream,
            "Event": event,
            "current_stream": stream,
            "stream": lambda _: nullcontext(),
            "mem_get_info": lambda _: (self.total - self.reserved, self.total),
            "memory_reserved": lambda _: self.reserved,
            "max_memory_allocated": lambda _: self.peak,
            "empty_cache": self.empty_cache,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: self.log.append((t.data_ptr(), s)))
        monkeypatch.setattr(CudaDevice, "pinned", lambda _, size: torch.empty(size, dtype=torch.uint8))

    @property
    def reserved(self):
        return self.live + self.cached + self.pages

    def runs(self, need):
        """Forward and backward take `need` more, which the allocator keeps."""
        self.peak = max(self.peak, self.live + self.pages + need)
        self.cached = max(self.cached, need)

    def empty_cache(self):
        self.log.append("empty_cache")
        self.cached = 0


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_auto_learns_what_training_takes_and_forgets_what_loading_took(cuda):
    """Its peak was higher than any of training will be, and is no reason to leave memory alone for ever."""
    cuda.runs(12)  # loading
    cuda.live = 3
    device = CudaDevice(torch.device("cpu"), older_peak=cuda.peak)
    cuda.runs(5)
    assert device.room(0) == 16 - 3 - 12 - 1  # nobody can tell yet what of the cache is activations'
    device.tidy()
    cuda.pages = 1
    cuda.runs(5)
    assert device.room(1) == 16 - 3 - 5 - 1
    device.tidy()  # pages come
    cuda.pages = 7
    cuda.runs(4)
    assert device.room(7) == 7  # a shorter sequence is no reason to take more
    device.tidy()
    cuda.runs(6)
    assert device.room(7) == 6
    assert cuda.peak == 3 + 7 + 6  # now it is training's


def test_a_peak_of_training_counts_even_when_its_memory_has_been_given_back(cuda):
    cuda.live = 3
    device = CudaDevice(torch.device("cpu"), older_peak=4)
    cuda.runs(8)
    cuda.empty_cache()
    assert device.room(0) == 16 - 3 - 8 - 1


def test_pieces_of_memory_that_nobody_can_use_are_not_counted_as_room(cuda):
    """Others reserved 9 for the 5 they have at most at once."""
    cuda.live = 3
    device = CudaDevice(torch.device("cpu"), older_peak=0)
    device.tidy()
    cuda.runs(2)
    cuda.cached = 6
    assert device.room(0) == 16 - 9 - 1


def test_memory_of_pages_is_known_to_both_copying_streams(cuda):
    """So it is not given to others while a copy is under way, also when the optimizer is dropped."""
    device = CudaDevice(torch.device("cpu"))
    memory = device.empty(100)
    assert [entry[0] for entry in cuda.log] == 2 * [memory.data_ptr()]
    assert [entry[1] for entry in cuda.log] == [device.streams["in"], device.streams["out"]]


def test_pages_get_memory_of_their_own(cuda):
    """What is cached goes back before pages come, and what they took goes back when they leave."""
    cuda.total = 1 << 40
    pager = paged(4)
    for _ in range(3):
        assert len(list(pager.visit())) == 4
    assert cuda.log[0] == "empty_cache" and cuda.log.count("empty_cache") == 1
    assert len(cuda.log) == 1 + 2 * 4
    pager.evict_all()
    assert cuda.log[-1] == "empty_cache"


def test_a_few_bytes_of_room_more_move_no_pages(monkeypatch, cuda):
    """The allocator would have to give its cache back and take it again."""
    pager = paged(100)
    held = []
    for pages in (80, 81, 85, 79, 80, 84, 95, 99, 100):
        monkeypatch.setattr(pager.device, "room", lambda _, pages=pages: PAGE * pages)
        list(pager.visit())
        held.append(pager.held // PAGE)
    assert held == [80, 80, 80, 79, 79, 79, 95, 95, 100]
    assert cuda.log.count("empty_cache") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there CUDA may have been used")
def test_no_peaks_without_cuda():
    assert peaks() == {}
