"""What the pager asks of a device: memory on both sides, copies on side streams, events. In host memory, and on CUDA.

Work on a GPU runs on three streams: compute (the caller's current stream) and one for copies in each direction, so that
a page can arrive while another leaves. A copy runs after the events that it is given and the earlier copies in its
direction, and nothing else is promised. Every event that orders two streams is therefore written out in paging.py;
tests run it on a device that turns a forgotten one into wrong numbers.

No managed memory: it hides its copies, cannot be told what comes next, and over-subscribed can hang a GPU.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["in", "out"]


class Event:
    """A point in a stream's work; here one that has passed."""

    def synchronize(self) -> None:
        """The host waits for it."""


class PageDevice:
    """The two memories and the streams between them. Sizes are bytes; memory is uint8 [size].

    Here both are plain host memory and a copy is done when it returns: what a budget means to an optimizer on the CPU.
    """

    def empty(self, size: int) -> Tensor:
        """Memory on the device. Raises torch.OutOfMemoryError."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def free(self, memory: Tensor) -> None:
        """The pager lets go of memory on the device; every copy that touches it has ended."""

    def pinned(self, size: int) -> Tensor:
        """Memory of the host that copies can run from and to beside other work."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def tidy(self) -> None:
        """Pages are about to come or have gone: free memory that is kept for other work becomes free for all."""

    def room(self, held: int) -> int:
        """What all pages together may take of the device beside everything else, while they hold `held`."""
        return 2**63 - 1

    def mark(self) -> Any:
        """An event: the work queued on the compute stream so far."""
        return Event()

    def use(self, memory: Tensor) -> None:
        """Compute is about to read and write this memory of the device, until the next mark."""

    def wait(self, event: Any) -> None:
        """Compute goes on only after this copy; the time it stands still counts as stalled."""

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        """Queue a copy behind those of its direction and the events; returns its event. Raises if it cannot."""
        target.copy_(source)
        return Event()

    def settle(self) -> None:
        """The host waits until no copy is under way."""

    def stalled(self) -> float:
        """Seconds that compute has waited for copies, as far as known without waiting for the device."""
        return 0.0


class CudaEvent(Event):
    """Begin and end of work on one stream, with times."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.begin.record(stream)

    def close(self) -> "CudaEvent":
        self.end.record(self.stream)
        return self

    def synchronize(self) -> None:
        self.end.synchronize()


class CudaDevice(PageDevice):
    """One CUDA device; compute is the stream that is current when a method is called.

    older_peak: the allocator's peak when the optimizer was made. It tells of loading the model, not of training it."""

    RESERVE = 16  # "auto" leaves one part in so many of the device's memory alone: fragmentation, libraries' workspaces

    def __init__(self, device: torch.device, older_peak: int = 0) -> None:
        self.device = device
        stream = torch.cuda.Stream
        self.streams: dict[Direction, torch.cuda.Stream] = {"in": stream(device), "out": stream(device)}
        self._waits: list[CudaEvent] = []  # stalls whose length is not known yet
        self._stalled = 0.0
        self._peak, self._others, self._tidied = older_peak, 0, False

    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def empty(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        for stream in self.streams.values():
            memory.record_stream(stream)  # else who drops it with a copy under way gives it to others at once
        return memory

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def tidy(self) -> None:
        """So pages get memory of their own; cut out of what activations left, they would be in the way of the next."""
        torch.cuda.empty_cache()
        self._tidied = True

    def room(self, held: int) -> int:
        """All this process can have, less the reserve and the most that all but pages ever took at once.

        That most is a new peak of allocated memory: pages do not move during forward and backward, so at the peak
        everything else took the peak less `held`. Or it is all memory that the allocator has reserved for others, which
        includes what it could not use for being in pieces; before the first `tidy` this may stem from loading the
        model, and does not count for later steps."""
        free, total = torch.cuda.mem_get_info(self.device)
        peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        if peak != self._peak:
            self._peak, self._others = peak, max(self._others, peak - held)
        others = max(self._others, reserved - held)
        if self._tidied:
            self._others = others
        return free + reserved - others - total // self.RESERVE

    def mark(self) -> CudaEvent:
        return CudaEvent(self._compute()).close()

    def wait(self, event: CudaEvent) -> None:
        stall = CudaEvent(self._compute())
        self._compute().wait_event(event.end)
        self._waits.append(stall.close())

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[CudaEvent]) -> CudaEvent:
        stream = self.streams[direction]
        for event in after:
            stream.wait_event(event.end)
        with torch.cuda.stream(stream):
            copied = CudaEvent(stream)
            target.copy_(source, non_blocking=True)
        return copied.close()

    def settle(self) -> None:
        for stream in self.streams.values():
            stream.synchronize()

    def stalled(self) -> float:
        while self._waits and self._waits[0].end.query():
            wait = self._waits.pop(0)
            self._stalled += wait.begin.elapsed_time(wait.end) / 1e3
        return self._stalled


def make_device(device: torch.device, older_peak: int = 0) -> PageDevice:
    """CUDA's memory and streams for its tensors, host memory for all others."""
    return CudaDevice(device, older_peak) if device.type == "cuda" else PageDevice()


def peaks() -> dict[torch.device, int]:
    """The most that was allocated on each CUDA device so far; empty if CUDA is not in use."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {torch.device("cuda", i): torch.cuda.max_memory_allocated(i) for i in range(count)}
