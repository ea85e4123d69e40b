"""Interleaving, rotation and the three ways of timing, on a GPU that is a clock in Python."""

import time
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import timing
from benchmarks.timing import CudaClock, Timing, interleave, quartiles, ratio, sets_for


class FakeGPU:
    """As much of torch.cuda as CudaClock uses. Every launch takes 1 ms; a host that waits would show as a gap."""

    def __init__(self, *, captures: bool = True) -> None:
        self.now, self.launches, self.slept, self.captures = 0.0, 0, 0, captures
        self.capturing: list[int] | None = None
        self.strict = False

    def launch(self) -> None:
        if self.capturing is not None:
            self.capturing.append(1)
            return
        self.launches += 1
        self.now += 1e-3

    def Event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()

    def CUDAGraph(self) -> Any:
        gpu = self

        class Graph:
            size = 0

            def replay(self) -> None:
                for _ in range(self.size):
                    gpu.launch()

        return Graph()

    @contextmanager
    def graph(self, graph: Any) -> Any:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = []
        yield
        graph.size, self.capturing = len(self.capturing), None

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    @contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    def current_stream(self) -> Any:
        return self.Stream()

    def synchronize(self) -> None:
        if self.strict:
            raise RuntimeError("called a synchronizing CUDA operation")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.strict = mode == "error"

    def _sleep(self, cycles: int) -> None:
        assert cycles >= 0
        self.slept += 1
        self.now += 1.0

    def memory_allocated(self) -> int:
        return 100

    def reset_peak_memory_stats(self) -> None:
        pass

    def max_memory_allocated(self) -> int:
        return 350


@pytest.mark.parametrize("way", ["graph", "queue"])
def test_a_sample_is_the_time_of_one_call_and_not_the_sleep(way: str) -> None:
    gpu, seen = FakeGPU(), list[int]()

    def call(i: int) -> None:
        seen.append(i)
        gpu.launch()
        gpu.launch()

    sample = CudaClock(gpu).sampler(call, 3, way)
    seen.clear()
    assert sample() == pytest.approx(2e-3)
    assert seen == ([] if way == "graph" else [0, 1, 2])  # a graph replays without the host
    assert bool(gpu.slept) == (way == "queue")


def test_the_wall_clock_counts_the_host_too() -> None:
    sample = CudaClock(FakeGPU()).sampler(lambda i: time.sleep(0.002), 2, "wall")
    assert 0.002 <= sample() < 0.02


def test_what_cannot_be_captured_raises_for_the_caller_to_see() -> None:
    with pytest.raises(RuntimeError, match="capturing"):
        CudaClock(FakeGPU(captures=False)).sampler(lambda i: None, 1, "graph")


def test_what_waits_for_the_gpu_is_never_captured() -> None:
    gpu = FakeGPU()

    def waits(i: int) -> None:
        assert gpu.capturing is None
        gpu.synchronize()

    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaClock(gpu).sampler(waits, 1, "graph")
    assert not gpu.strict


def test_peak_memory_is_above_what_was_there() -> None:
    assert CudaClock(FakeGPU()).peak_bytes(lambda i: None) == 250


def test_what_a_pass_returns_lives_until_it_ends() -> None:
    """Else the allocator would hand the same memory, still in cache, to every call."""
    alive = 0

    class Result:
        def __init__(self) -> None:
            nonlocal alive
            alive += 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = []
    sample = timing.WallClock().sampler(lambda i: (Result(), most.append(alive))[0], 4, "wall")
    sample()
    assert most == [1, 2, 3, 4] and alive == 0


def test_rounds_start_with_another_variant_each_time() -> None:
    order = []

    def sampler(name: str) -> Any:
        return lambda: order.append(name) or 1.0

    taken = interleave({name: sampler(name) for name in "abc"}, seconds=0.0)
    assert {name: len(values) for name, values in taken.items()} == dict.fromkeys("abc", timing.LEAST_ROUNDS)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc" + "bca"


def test_rounds_follow_the_time_there_is() -> None:
    def slow() -> float:
        time.sleep(0.001)
        return 0.001

    assert len(interleave({"slow": slow}, seconds=0.012)["slow"]) in range(timing.LEAST_ROUNDS, 13)
    assert len(interleave({"quick": lambda: 1.0}, seconds=9.0)["quick"]) == timing.MOST_ROUNDS


def test_sets_fill_the_cache_several_times_over() -> None:
    assert sets_for(10, 100) == 40
    assert sets_for(400, 100) == 1
    assert sets_for(1e9, 100) == 1
    assert sets_for(1, 1 << 30, most=16) == 16


def test_ratios_are_taken_round_by_round() -> None:
    """Both sides twice as slow in the second round: the ratio does not move."""
    low, middle, high = ratio(Timing((1.0, 2.0, 1.0), "wall"), Timing((3.0, 6.0, 3.0), "wall"))
    assert (low, middle, high) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles((7.0,)) == (7.0, 7.0, 7.0)
