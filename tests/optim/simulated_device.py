"""A device made of host memory whose copies take effect only where an event demands them: what the pager is tested on.

Real streams forgive: a copy that was not waited for has mostly arrived by then. Here it has not:

- A queued copy runs when something waits for it, no sooner, and with it only what its own events and its direction's
  order demand. (With `seed`, some queued copies whose events have come run at random moments: any order that real
  streams may take.)
- A copy that may run before compute is through with its memory on the device delivers garbage.
- Fresh and freed memory is garbage: every byte 255, which is NaN in the floating formats.
"""

import random
from collections import deque

import torch

from fourbit.kernels.page_device import PageDevice

GARBAGE = 255


class CopyError(RuntimeError):
    """An injected failure to queue a copy."""


class SimulatedEvent:
    """A queued copy, or (without memory) a mark in compute's work, which has always happened."""

    def __init__(self, device, tick, target=None, source=None, after=(), stream=None):
        self.device, self.tick, self.target, self.source, self.after, self.stream = (
            *(device, tick, target, source, after, stream),
        )
        self.ran = stream is None
        self.on_time = True  # it cannot run before compute is through with its memory

    def synchronize(self):
        self.device.finish(self)


class SimulatedDevice(PageDevice):
    """capacity: bytes of its memory; others: what all but pages take of it."""

    def __init__(self, *, capacity=2**63, seed=None):
        self.capacity, self.others = capacity, 0
        self.held = self.peak = 0  # bytes of its memory in the pager's hands, now and at most
        self.waits = 0
        self._random = None if seed is None else random.Random(seed)
        self._streams = {"in": deque(), "out": deque()}
        self._knows = {"in": 0, "out": 0}  # the tick of compute that the stream has waited for
        self._used = {}  # address of memory on the device -> tick of its last use by compute
        self._tick = self._host_knows = 0
        self._fail_in = None

    def fail_copy(self, number):
        """The copy queued as the `number`-th from now (0 the next) fails."""
        self._fail_in = number

    def empty(self, size):
        if self.held + size + self.others > self.capacity:
            raise torch.OutOfMemoryError(f"simulated device: {size} bytes asked, {self.held + self.others} taken")
        self.held += size
        self.peak = max(self.peak, self.held)
        memory = torch.full((size,), GARBAGE, dtype=torch.uint8, device="cpu")
        self.use(memory)  # what compute did before with this memory may still be under way
        return memory

    def free(self, memory):
        self.held -= memory.numel()
        self._used.pop(memory.data_ptr(), None)
        memory.fill_(GARBAGE)

    def pinned(self, size):
        return torch.full((size,), GARBAGE, dtype=torch.uint8, device="cpu")

    def room(self, held):
        return self.capacity - self.others

    def queued(self):
        """Copies that have not run."""
        return sum(map(len, self._streams.values()))

    def mark(self):
        return SimulatedEvent(self, self._tick)

    def use(self, memory):
        self._tick += 1
        self._used[memory.data_ptr()] = self._tick

    def wait(self, event):
        self.waits += 1
        self.run(event)

    def stalled(self):
        return float(self.waits)

    def copy(self, direction, target, source, after):
        fails = self._fail_in == 0
        self._fail_in = None if self._fail_in is None or fails else self._fail_in - 1
        if fails:
            raise CopyError(f"injected: copy {direction} of {target.numel()} bytes")
        knows = self._knows[direction] = max(self._knows[direction], self._host_knows, *(e.tick for e in after))
        event = SimulatedEvent(self, knows, target, source, after, self._streams[direction])
        on_device = target if direction == "in" else source
        event.on_time = knows >= self._used[on_device.data_ptr()]
        event.stream.append(event)
        for stream in self._streams.values() if self._random else ():
            while stream and all(e.ran for e in stream[0].after) and self._random.random() < 0.5:
                self._perform(stream.popleft())
        return event

    def finish(self, event):
        """The host waits for it, and what it queues from now on comes later."""
        self.run(event)
        self._host_knows = max(self._host_knows, event.tick)

    def run(self, event):
        """Run a copy, and before it what its events and the order of its stream demand."""
        while not event.ran:
            first = event.stream[0]
            for earlier in first.after:
                self.run(earlier)
            if not first.ran:  # else one of them was waiting for it too
                event.stream.popleft()
                self._perform(first)

    def _perform(self, event):
        event.ran = True
        if event.on_time:
            event.target.copy_(event.source)
        else:
            event.target.fill_(GARBAGE)

    def settle(self):
        for stream in self._streams.values():
            while stream:
                self.finish(stream[-1])
