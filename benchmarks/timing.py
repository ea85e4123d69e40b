"""How long variants of one op take, measured in turn so that clocks, heat and neighbours disturb all of them alike.

A sample is one pass of a variant over all its buffer sets, divided by their number. The sets together are several times
larger than the last-level cache, and what a pass returns is kept until it ends, so that no call finds its weights or
its output in cache (`sets_for`). On a GPU a sample is taken in one of three ways, and every figure says which:

    graph   a CUDA graph of the pass, timed by events: no launch cost at all; for kernels of a few microseconds
    queue   events around a pass that the host enqueues while the GPU sleeps, so that it never waits for the host
    wall    the host's clock from the first launch to the last result: launch cost included, as a training loop sees it

On a CPU every sample is "wall".
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Call = Callable[[int], Any]  # runs the op on buffer set i and returns what it made
Sampler = Callable[[], float]  # seconds of one call
Key = TypeVar("Key")  # what a variant is called by

LEAST_ROUNDS, MOST_ROUNDS = 5, 25
CACHES = 4  # the sets of a variant are this many times the last-level cache
SLEEP_CYCLES_PER_SECOND = 2e9  # a GPU's clock, at most about this
LONGEST_SLEEP = 0.05  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one for each round, in the order taken; `timed` is how: graph, queue or wall."""

    seconds: tuple[float, ...]
    timed: str

    @property
    def quartiles(self) -> tuple[float, float, float]:
        return quartiles(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(ours: Timing, theirs: Timing) -> tuple[float, float, float]:
    """Quartiles of theirs over ours, round by round: above 1, ours is quicker."""
    return quartiles([b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)])


def interleave(samplers: Mapping[Key, Sampler], seconds: float, least: int = LEAST_ROUNDS) -> dict[Key, list[float]]:
    """Samples of every variant, a round at a time and each round starting with another one, for about `seconds`.

    The first sample of each warms up and only tells how many rounds there is time for.
    """
    names = list(samplers)
    with no_collection():
        pilot = time.perf_counter()
        for name in names:
            samplers[name]()
        pilot = time.perf_counter() - pilot
        rounds = max(least, min(MOST_ROUNDS, int(seconds / max(pilot, 1e-9))))
        taken: dict[Key, list[float]] = {name: [] for name in names}
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(samplers[name]())
    return taken


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector stays out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sets_for(bytes_a_call: float, cache_bytes: int, most: int = 64) -> int:
    """How many buffer sets a variant rotates through: CACHES times the cache, and no more than `most`."""
    return max(1, min(most, -(-CACHES * cache_bytes // max(1, int(bytes_a_call)))))


class WallClock:
    """The host's clock, for ops on a CPU."""

    ways = ("wall",)

    def sampler(self, call: Call, sets: int, way: str) -> Sampler:
        def sample() -> float:
            start = time.perf_counter()
            kept = [call(i) for i in range(sets)]
            seconds = time.perf_counter() - start
            del kept  # after the clock has stopped, as a training step drops it later
            return seconds / sets

        return sample

    def peak_bytes(self, call: Call) -> int | None:
        """What a call takes above what is there before it; not known on a CPU."""
        return None


class CudaClock:
    """CUDA events, graphs and the host's clock around a synchronised pass. `cuda` is torch.cuda, or a test's double."""

    ways = ("graph", "queue", "wall")

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def sampler(self, call: Call, sets: int, way: str) -> Sampler:
        """Samples `call` in this way; raises what the capture raises if it cannot be captured."""
        make = {"graph": self._graph, "queue": self._queue, "wall": self._wall}[way]
        return make(call, sets)

    def _graph(self, call: Call, sets: int) -> Sampler:
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):  # compiles and initialises outside the capture
            for i in range(min(sets, 2)):
                call(i)
            self.cuda.synchronize()
            self._never_waits(call)
        self.cuda.current_stream().wait_stream(side)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            kept = [call(i) for i in range(sets)]
        del kept  # the graph's own memory pool keeps the buffers apart

        def sample() -> float:
            start, end = self._events()
            self.cuda.synchronize()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / sets

        return sample

    def _never_waits(self, call: Call) -> None:
        """Raises if the call waits for the GPU: a capture that fails half-way would spoil every later one."""
        self.cuda.set_sync_debug_mode("error")
        try:
            call(0)
        finally:
            self.cuda.set_sync_debug_mode("default")

    def _queue(self, call: Call, sets: int) -> Sampler:
        host = self._host_seconds(call, sets)

        def sample() -> float:
            start, end = self._events()
            self.cuda.synchronize()
            self.cuda._sleep(int(min(1.5 * host, LONGEST_SLEEP) * SLEEP_CYCLES_PER_SECOND))
            start.record()
            kept = [call(i) for i in range(sets)]
            end.record()
            end.synchronize()
            del kept
            return float(start.elapsed_time(end)) / 1e3 / sets

        return sample

    def _host_seconds(self, call: Call, sets: int) -> float:
        """How long the host takes to enqueue a pass, once warm."""
        kept = [call(i) for i in range(sets)]
        self.cuda.synchronize()
        start = time.perf_counter()
        kept = [call(i) for i in range(sets)]
        seconds = time.perf_counter() - start
        del kept
        self.cuda.synchronize()
        return seconds

    def _wall(self, call: Call, sets: int) -> Sampler:
        def sample() -> float:
            self.cuda.synchronize()
            start = time.perf_counter()
            kept = [call(i) for i in range(sets)]
            self.cuda.synchronize()
            seconds = time.perf_counter() - start
            del kept
            return seconds / sets

        return sample

    def _events(self) -> tuple[Any, Any]:
        return self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)

    def peak_bytes(self, call: Call) -> int:
        """Device memory that one call takes above what is allocated before it, at its peak, results included."""
        self.cuda.synchronize()
        before = int(self.cuda.memory_allocated())
        self.cuda.reset_peak_memory_stats()
        kept = call(0)
        self.cuda.synchronize()
        del kept
        return int(self.cuda.max_memory_allocated()) - before


Clock = WallClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else WallClock()
