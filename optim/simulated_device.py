"""A device made of host memory whose copies take effect only where an event demands them.

It serves optimizers on the CPU, so a budget means the same there, and it is what the pager's rules are tested on. Real
streams forgive: a copy that was not waited for has mostly arrived by then. Here it has not:

- A queued copy runs when something waits for it, no sooner, and with it only what its own events and its direction's
  order demand. (With `seed`, some queued copies whose events have come run at random moments: any order that real
  streams may take.)
- A copy that may run before compute is through with its memory on the device delivers garbage.
- Fresh and freed memory is garbage: every byte 255, which is NaN in the floating formats.

Its clock is a model: copies take size / bandwidth in each direction, compute takes what `work` says, waits add up.
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .page_device import Direction

GARBAGE = 255


class CopyError(RuntimeError):
    """An injected failure of a copy."""


class SimulatedEvent:
    """A queued copy, or (without memory) a mark in compute's work, which has always happened."""

    def __init__(self, device: "SimulatedDevice", tick: int, begin: float, end: float) -> None:
        self.device, self.tick, self.begin, self.end = device, tick, begin, end
        self.stream: deque[SimulatedEvent] | None = None
        self.target: Tensor | None = None
        self.source: Tensor | None = None
        self.after: Sequence[SimulatedEvent] = ()
        self.on_time = True  # it cannot run before compute is through with its memory
        self.fails = False
        self.ran = True
        self.error: CopyError | None = None

    def done(self) -> bool:
        return self.ran and self.error is None

    def synchronize(self) -> None:
        self.device.finish(self)
        if self.error is not None:
            raise self.error

    def times(self) -> tuple[float, float]:
        return self.begin, self.end


class SimulatedDevice:
    """capacity: bytes of its memory; others: what all but pages take of it. bandwidth: bytes a second each way."""

    def __init__(self, *, capacity: int = 2**63, bandwidth: float = 25e9, seed: int | None = None) -> None:
        self.capacity, self.others, self.bandwidth = capacity, 0, bandwidth
        self.held = self.peak = 0  # bytes of its memory in the pager's hands, now and at most
        self.clock = 0.0
        self._random = None if seed is None else random.Random(seed)
        self._streams: dict[Direction, deque[SimulatedEvent]] = {"in": deque(), "out": deque()}
        self._free_at: dict[Direction, float] = {"in": 0.0, "out": 0.0}
        self._knows: dict[Direction, int] = {"in": 0, "out": 0}  # the tick of compute that the stream has waited for
        self._used: dict[int, int] = {}  # address of memory on the device -> tick of its last use by compute
        self._tick = self._host_knows = 0
        self._stalled = 0.0
        self._fail_in: int | None = None
        self._fail_late = False

    def fail_copy(self, number: int, late: bool = False) -> None:
        """The copy queued as the `number`-th from now (0 the next) fails: when it is queued, or late, when it runs."""
        self._fail_in, self._fail_late = number, late

    def work(self, seconds: float) -> None:
        """Compute is busy for so long."""
        self.clock += seconds

    def empty(self, size: int) -> Tensor:
        if self.held + size + self.others > self.capacity:
            raise torch.OutOfMemoryError(f"simulated device: {size} bytes asked, {self.held + self.others} taken")
        self.held += size
        self.peak = max(self.peak, self.held)
        memory = torch.full((size,), GARBAGE, dtype=torch.uint8, device="cpu")
        self.use(memory)  # what compute did before with this memory may still be under way
        return memory

    def free(self, memory: Tensor) -> None:
        self.held -= memory.numel()
        self._used.pop(memory.data_ptr(), None)
        memory.fill_(GARBAGE)

    def pinned(self, size: int) -> Tensor:
        return torch.full((size,), GARBAGE, dtype=torch.uint8, device="cpu")

    def tidy(self) -> None:
        """Nothing to do: all its free memory is free for everything."""

    def room(self, held: int) -> int:
        return self.capacity - self.others

    def queued(self) -> int:
        """Copies that have not run."""
        return sum(map(len, self._streams.values()))

    def mark(self) -> SimulatedEvent:
        return SimulatedEvent(self, self._tick, self.clock, self.clock)

    def use(self, memory: Tensor) -> None:
        self._tick += 1
        self._used[memory.data_ptr()] = self._tick

    def wait(self, event: Any) -> None:
        self._stalled += max(0.0, event.end - self.clock)
        self.clock = max(self.clock, event.end)
        self.run(event)
        if event.error is not None:
            raise event.error

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[Any]) -> SimulatedEvent:
        fails = self._fail_in == 0
        self._fail_in = None if self._fail_in is None or fails else self._fail_in - 1
        if fails and not self._fail_late:
            raise CopyError(f"injected: copy {direction} of {target.numel()} bytes")
        self._knows[direction] = max(self._knows[direction], self._host_knows, *(e.tick for e in after))
        begin = max(self._free_at[direction], self.clock, *(e.end for e in after), 0.0)
        self._free_at[direction] = end = begin + target.numel() / self.bandwidth
        event = SimulatedEvent(self, self._knows[direction], begin, end)
        event.target, event.source, event.after, event.fails, event.ran = target, source, after, fails, False
        on_device = target if direction == "in" else source
        event.on_time = self._knows[direction] >= self._used[on_device.data_ptr()]
        event.stream = self._streams[direction]
        event.stream.append(event)
        self._run_some()
        return event

    def finish(self, event: SimulatedEvent) -> None:
        """The host waits for it, and what it queues from now on comes later."""
        self.run(event)
        self._host_knows = max(self._host_knows, event.tick)

    def run(self, event: SimulatedEvent) -> None:
        """Run a copy, and before it what its events and the order of its stream demand."""
        while not event.ran:
            assert event.stream is not None
            first = event.stream[0]
            for earlier in first.after:
                self.run(earlier)
            if not first.ran:  # else one of them was waiting for it too
                event.stream.popleft()
                self._perform(first)

    def _perform(self, event: SimulatedEvent) -> None:
        assert event.target is not None and event.source is not None
        event.ran = True
        event.error = next((e.error for e in event.after if e.error is not None), None)
        if event.fails:
            event.error = CopyError(f"injected: copy of {event.target.numel()} bytes")
            event.target[: event.target.numel() // 2].fill_(GARBAGE)  # it got half the way
        elif event.error is None and event.on_time:
            event.target.copy_(event.source)
        elif event.error is None:
            event.target.fill_(GARBAGE)

    def _run_some(self) -> None:
        for stream in self._streams.values() if self._random else ():
            while stream and all(e.ran for e in stream[0].after) and self._random and self._random.random() < 0.5:
                self._perform(stream.popleft())

    def settle(self) -> None:
        for stream in self._streams.values():
            while stream:
                self.finish(stream[-1])

    def stalled(self) -> float:
        return self._stalled
