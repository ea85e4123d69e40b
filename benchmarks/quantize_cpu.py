"""4-bit quantising, decoding and training products on the CPU against bitsandbytes, in both states of memory.

`python -m benchmarks.quantize_cpu` first checks that both give the same bytes and values, and refuses to report if not.
Then every variant of both runs in turn (`timing.interleave`), and the ratios are medians over rounds. It prints a table
and, last, one JSON line. bitsandbytes has a vector decoder for AVX-512 and none for AVX2; the line says which this is.

What `python -m benchmarks --device cpu` does not tell apart decides what decoding costs here: memory at hand, which the
allocator hands out again (it is told to keep what it gets), and new memory, which the operating system maps and clears
page by page (the allocator gives its free memory back before each call). Training decodes many small matrices with
memory at hand: the 210 linears of SmolLM2-135M, with double quantisation, stand for that.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fourbit import nf4

from . import CHECKOUT, machine
from .peers import bnb
from .shapes import SMOLLM2
from .timing import Timing, WallClock, interleave, ratio
from .weights import Weights

COUNTS = {"q/o": 2, "k/v": 2, "gate/up": 2, "down": 1}  # linears of each shape in a layer
CPU = torch.device("cpu")
NEW_MEMORY = "decode, new memory"
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, theirs


class Matrix:
    """One random matrix for both, with plain and with nested scales."""

    def __init__(self, N: int, K: int) -> None:
        self.shape, self.dense = (N, K), torch.randn(N, K) * 0.05
        self.weights = Weights.random(N, K, CPU, sets=1)
        self.stored, self.layer = self.weights.copies[0], self.weights.layer(0)
        self.plain_stored = self.stored._replace(absmax=self.stored.scales, nested_absmax=None, nested_offset=None)
        self.plain, self.nested = (bnb.state(self.stored, (N, K), torch.float32, nested=n) for n in (False, True))

    def decode(self) -> Tensor:
        return nf4.dequantize(self.plain_stored)

    def peer_decode(self) -> Tensor:
        return bnb.dequantize(self.stored, self.plain)

    def decode_nested(self) -> Tensor:
        return self.layer.dequantize()

    def peer_decode_nested(self) -> Tensor:
        return bnb.dequantize(self.stored, self.nested)

    def train(self, x: Tensor) -> Tensor:
        """Forward and the gradient of x."""
        return torch.autograd.grad(self.layer(x).sum(), x)[0]

    def peer_train(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(bnb.linear(x, self.stored, self.nested).sum(), x)[0]

    def differences(self) -> list[str]:
        """What differs between the two, by name: empty when they agree."""
        peer_packed = bnb.quantize(self.dense, nested=False)[0]
        checks = {"packed bytes": (nf4.quantize(self.dense)[0].view(-1), peer_packed.view(-1))}
        checks |= {"values": (self.decode(), self.peer_decode())}
        checks |= {"values, nested": (self.decode_nested(), self.peer_decode_nested())}
        return [f"{self.shape}: {name}" for name, (ours, theirs) in checks.items() if not torch.equal(ours, theirs)]


def one_by_one(functions: Iterable[Callable[[], Any]]) -> None:
    """Call each and drop its result before the next, as a pass through a model does."""
    for function in functions:
        function()


def variants(size: int, rows: list[int]) -> dict[str, Pair]:
    """Everything timed, by name."""
    large = Matrix(size, size)
    kinds = [Matrix(shape.N, shape.K) for shape in SMOLLM2.projections()]
    wrong = [difference for matrix in (large, *kinds) for difference in matrix.differences()]
    if wrong:
        sys.exit("the two disagree, so nothing is reported: " + "; ".join(wrong))
    counts = [COUNTS[shape.name] * SMOLLM2.layers for shape in SMOLLM2.projections()]
    small = [Matrix(*kind.shape) for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    result: dict[str, Pair] = {
        "quantize": (lambda: nf4.quantize(large.dense), lambda: bnb.quantize(large.dense, nested=False)),
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


def measure(pairs: dict[str, Pair], rounds: int) -> dict[str, tuple[Timing, Timing]]:
    """Ours and theirs by variant, in turn."""

    def sampler(name: str, function: Callable[[], Any]) -> Callable[[], float]:
        sample = WallClock().sampler(lambda i: function(), 1, "wall")
        if name != NEW_MEMORY:
            return sample
        return lambda: (LIBC.malloc_trim(0), sample())[1]

    samplers = {(name, side): sampler(name, pair[side]) for name, pair in pairs.items() for side in (0, 1)}
    taken = {key: Timing(tuple(seconds), "wall") for key, seconds in interleave(samplers, 0.0, rounds).items()}
    return {name: (taken[name, 0], taken[name, 1]) for name in pairs}


def report(timings: dict[str, tuple[Timing, Timing]]) -> dict[str, Any]:
    """Print the table; return the medians."""
    figures = {}
    print(f"{'':18} {'ours ms':>9} {'theirs ms':>10} {'ratio':>7} {'quartiles':>13}")
    for name, pair in timings.items():
        (ours, theirs), (low, middle, high) = (1e3 * timing.median for timing in pair), ratio(*pair)
        print(f"{name:18} {ours:9.2f} {theirs:10.2f} {middle:6.2f}x {f'{low:.2f} - {high:.2f}':>13}")
        figures[name] = {"ours_ms": round(ours, 2), "theirs_ms": round(theirs, 2), "ratio": round(middle, 2)}
        figures[name]["ratio_quartiles"] = [round(low, 2), round(high, 2)]
    return figures


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
    figures = report(measure(variants(options.size, options.rows), options.rounds))
    settings = {"size": options.size, "threads": options.threads, "rounds": options.rounds}
    print(json.dumps({"figures": figures, **settings, **machine.facts(CPU)}))


if __name__ == "__main__":
    main()
