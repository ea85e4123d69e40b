"""4-bit quantising, decoding and multiplying on the CPU against bitsandbytes, in one process and in turn.

`python -m benchmarks.quantize_cpu` first checks that both give the same bytes and values, and refuses to report if
not. Then each round runs every variant of both once, in alternating order, and the ratios are medians over rounds. It
prints a table and, last, one JSON line. bitsandbytes has a vector decoder for AVX-512 and none for AVX2; the line
says which this is.

Memory decides what decoding costs, so it is timed in both states: with memory at hand, which the allocator hands out
again (it is told to keep what it gets), and in new memory, which the operating system maps and clears page by page (the
allocator gives its free memory back before each call). Training decodes many small matrices with memory at hand: the
210 linears of SmolLM2-135M, with double quantisation, stand for that.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional as peer
from torch import Tensor

from fourbit.kernels.nf4 import dequantize, dequantize_absmax, linear4bit, quantize, quantize_absmax

from . import CHECKOUT

SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30

NEW_MEMORY = "decode, new mem."
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, theirs


class Matrix:
    """One random matrix quantised by both, with plain and with nested scales."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.dense = torch.randn(shape) * 0.05
        self.packed, self.absmax = quantize(self.dense)
        self.codes, self.nested, self.offset = quantize_absmax(self.absmax)
        self.peer_packed, self.plain_state = peer.quantize_4bit(self.dense, quant_type="nf4")
        self.state = peer.quantize_4bit(self.dense, quant_type="nf4", compress_statistics=True)[1]

    def decode(self) -> Tensor:
        return dequantize(self.packed, self.absmax, self.shape)

    def peer_decode(self) -> Tensor:
        result: Tensor = peer.dequantize_4bit(self.peer_packed, self.plain_state)
        return result

    def decode_nested(self) -> Tensor:
        return dequantize(self.packed, dequantize_absmax(self.codes, self.nested, self.offset), self.shape)

    def peer_decode_nested(self) -> Tensor:
        result: Tensor = peer.dequantize_4bit(self.peer_packed, self.state)
        return result

    def train(self, x: Tensor) -> Tensor:
        """Forward and the gradient of x."""
        y = linear4bit(x, self.packed, self.codes, self.shape, nested_absmax=self.nested, offset=self.offset)
        return torch.autograd.grad(y.sum(), x)[0]

    def peer_train(self, x: Tensor) -> Tensor:
        y = bitsandbytes.matmul_4bit(x, self.peer_packed, self.state)
        return torch.autograd.grad(y.sum(), x)[0]

    def differences(self) -> list[str]:
        """What differs between the two, by name: empty when they agree."""
        checks = {"packed bytes": (self.packed, self.peer_packed), "scales": (self.absmax, self.plain_state.absmax)}
        for dtype in (torch.float32, torch.bfloat16):
            self.plain_state.dtype = dtype
            theirs = peer.dequantize_4bit(self.peer_packed, self.plain_state)
            checks[f"values in {dtype}"] = dequantize(self.packed, self.absmax, self.shape, dtype=dtype), theirs
        self.plain_state.dtype = torch.float32
        return [f"{self.shape}: {name}" for name, (ours, theirs) in checks.items() if not torch.equal(ours, theirs)]


def one_by_one(functions: Iterable[Callable[[], Any]]) -> None:
    """Call each and drop its result before the next, as a pass through a model does."""
    for function in functions:
        function()


def variants(size: int, rows: list[int]) -> dict[str, Pair]:
    """Everything timed, by name."""
    large = Matrix((size, size))
    small = [Matrix(shape) for shape in SMOLLM2]
    wrong = [difference for matrix in (large, *small[:7]) for difference in matrix.differences()]
    if wrong:
        sys.exit("the two disagree, so nothing is reported: " + "; ".join(wrong))
    result: dict[str, Pair] = {
        "quantize": (lambda: quantize(large.dense), lambda: peer.quantize_4bit(large.dense, quant_type="nf4")),
        "decode": (large.decode, large.peer_decode),
        NEW_MEMORY: (large.decode, large.peer_decode),
        "decode SmolLM2": (
            lambda: one_by_one(matrix.decode_nested for matrix in small),
            lambda: one_by_one(matrix.peer_decode_nested for matrix in small),
        ),
    }
    for n in rows:
        x = torch.randn(n, size, requires_grad=True)
        result[f"train, {n} rows"] = (lambda x=x: large.train(x), lambda x=x: large.peer_train(x))
    return result


class Timing:
    """Milliseconds of the timed calls of one side: on the clock, and of the CPU (all threads)."""

    def __init__(self) -> None:
        self.wall, self.cpu = list[float](), list[float]()

    def run(self, function: Callable[[], Any], *, keep: bool) -> None:
        """Time one call; its result is dropped after the clock stops, as a training step drops it later."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        del result
        if keep:
            self.wall.append(1e3 * wall)
            self.cpu.append(1e3 * cpu)


def measure(pairs: dict[str, Pair], rounds: int) -> dict[str, tuple[Timing, Timing]]:
    """Ours and theirs by variant, in turn; the first round warms up and is dropped."""
    timings = {name: (Timing(), Timing()) for name in pairs}
    for i in range(rounds + 1):
        for name, pair in pairs.items():
            for side in (0, 1) if i % 2 else (1, 0):
                if name == NEW_MEMORY:
                    LIBC.malloc_trim(0)
                timings[name][side].run(pair[side], keep=i > 0)
    return timings


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of theirs over ours, round by round."""
    return statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive")


def report(timings: dict[str, tuple[Timing, Timing]]) -> dict[str, Any]:
    """Print the table; return the medians. On a busy machine CPU time, less disturbed, stands beside the clock's."""
    figures = {}
    print(f"{'':16} {'ours ms':>9} {'theirs ms':>10} {'ratio':>7} {'quartiles':>13}", end="")
    print(f"   CPU: {'ours':>8} {'theirs':>8} ratio")
    for name, (ours, theirs) in timings.items():
        low, ratio, high = ratios(ours.wall, theirs.wall)
        cpu_ratio = ratios(ours.cpu, theirs.cpu)[1]
        wall, cpu = (
            [statistics.median(t) for t in pair] for pair in ((ours.wall, theirs.wall), (ours.cpu, theirs.cpu))
        )
        spread = f"{low:.2f} - {high:.2f}"
        print(f"{name:16} {wall[0]:9.2f} {wall[1]:10.2f} {ratio:6.2f}x {spread:>13}", end="")
        print(f"        {cpu[0]:8.2f} {cpu[1]:8.2f} {cpu_ratio:5.2f}x")
        figures[name] = {"ours_ms": round(wall[0], 2), "theirs_ms": round(wall[1], 2), "ratio": round(ratio, 2)}
        figures[name] |= {"ratio_quartiles": [round(low, 2), round(high, 2)], "cpu_ratio": round(cpu_ratio, 2)}
    return figures


def cpu_share(timings: dict[str, tuple[Timing, Timing]]) -> float:
    """CPU time over wall time of the quantisers, which have work for one thread: below about 0.9 others were busy."""
    pair = timings["quantize"]
    return sum(sum(t.cpu) for t in pair) / sum(sum(t.wall) for t in pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the large matrix")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 256], help="rows of x in the products")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # bitsandbytes' OpenMP reads it when it is loaded
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, "-m", "benchmarks.quantize_cpu", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, cwd=CHECKOUT).returncode)
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    LIBC.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    timings = measure(variants(options.size, options.rows), options.rounds)
    figures = report(timings)
    print(
        json.dumps(
            {
                "quantize_ratio": figures["quantize"]["ratio"],
                "decode_ratio": figures["decode"]["ratio"],
                "decode_new_memory_ratio": figures[NEW_MEMORY]["ratio"],
                "decode_smollm2_ratio": figures["decode SmolLM2"]["ratio"],
                "figures": figures,
                "size": options.size,
                "threads": options.threads,
                "rounds": options.rounds,
                "cpu_share": round(cpu_share(timings), 2),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "machine": platform.machine(),
                "versions": {name: metadata.version(name) for name in ("torch", "bitsandbytes")},
            }
        )
    )


if __name__ == "__main__":
    main()
