"""Up to how many rows of x decoding inside the product wins on this GPU: `python -m benchmarks.tune [--minutes N]`.

For every shape, dtype and number of rows it times the kernel for few rows and the fallback (decode, then F.linear), in
turn. The border is the most rows up to which no point is slower than the fallback; it ends with the line that belongs
into BORDER in kernels/border.py. A wrong result of the kernel ends in exit code 1, and so does a run out of time.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.kernels import dispatch

from . import gate, machine
from .cases import Setting
from .shapes import CUDA, Grid, Projection
from .timing import LEAST_ROUNDS, Clock, Timing, clock_for, interleave, ratio, sets_for
from .weights import BYTES_PER_PARAMETER, Weights

ROWS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
GRAPHED_TO = 64
SLOWER = 0.98  # of the fallback's speed: the noise of two equal calls
DTYPES = (torch.bfloat16, torch.float16)
POINT_SECONDS = 0.15


@dataclass(frozen=True)
class Point:
    """How many times as long the fallback takes, for one shape and number of rows."""

    M: int
    speed: float


class Products:
    """x and a weight in as many copies as it takes to stay out of the cache."""

    def __init__(self, shape: Projection, M: int, setting: Setting) -> None:
        moved = BYTES_PER_PARAMETER * shape.weights + setting.dtype.itemsize * M * (shape.N + shape.K)
        self.sets, self.dtype = sets_for(moved, setting.cache_bytes, most=32), setting.dtype
        self.weights = Weights.random(shape.N, shape.K, setting.device, self.sets)
        first = setting.normal(M, shape.K, seed=1)
        self.x = [first, *(first.clone() for _ in range(self.sets - 1))]
        self.layers = [self.weights.layer(i) for i in range(self.sets)]

    def inside(self, i: int) -> Tensor:
        from fourbit.kernels import matmul4bit_triton

        return matmul4bit_triton.matmul(self.x[i], self.weights.copies[i], None)

    def fallback(self, i: int) -> Tensor:
        return F.linear(self.x[i], self.layers[i].dequantize(self.dtype))

    def error(self) -> float:
        """Of the kernel, in units of its bound."""
        bound = gate.product(self.x[0], self.weights.exact, gate.UNIT[self.dtype], scaled_late=True)
        return bound.worst(self.inside(0))


def measure(shape: Projection, M: int, setting: Setting, clock: Clock) -> Point:
    work = Products(shape, M, setting)
    if not (error := work.error()) <= 1:
        raise SystemExit(f"WRONG: {shape.N}x{shape.K} M={M}: error {error:.3g} times its bound")
    way = (setting.small_way if M <= GRAPHED_TO else setting.way)[0]
    calls = {"inside": work.inside, "fallback": work.fallback}
    samplers = {key: clock.sampler(call, work.sets, way) for key, call in calls.items()}
    taken = interleave(samplers, POINT_SECONDS, LEAST_ROUNDS)
    inside, fallback = (Timing(tuple(taken[key]), way) for key in calls)
    low, middle, high = ratio(inside, fallback)
    print(
        f"{str(setting.dtype).removeprefix('torch.')} {shape.N}x{shape.K} M={M}: {1e6 * inside.median:.1f} us, "
        f"fallback / inside {middle:.3f} ({low:.3f}-{high:.3f})"
    )
    return Point(M, middle)


def border_of(points: Sequence[Point]) -> int:
    """The most rows up to which no point is slower than the fallback; 0 if one row already is."""
    rows = sorted({point.M for point in points})
    slow = min((point.M for point in points if point.speed < SLOWER), default=rows[-1] + 1)
    return max((M for M in rows if slow > M), default=0)


def main(argv: Sequence[str] | None = None, grid: Grid = CUDA, device: torch.device | None = None) -> int:
    """`grid` and `device` replace the defaults: for tests."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="give up after this long (default 9)")
    deadline = time.monotonic() + 60 * parser.parse_args(argv).minutes
    if device is None and not torch.cuda.is_available():
        parser.error("tuning measures a GPU, and torch sees none here")
    device = device or torch.device("cuda", torch.cuda.current_device())
    clock, points = clock_for(device), list[Point]()
    settings = [Setting(device, dtype, machine.cache_bytes(device)) for dtype in DTYPES]
    for M in ROWS:
        for shape in {(p.N, p.K): p for p in grid.projections}.values():
            for setting in settings:
                if time.monotonic() > deadline:
                    print(f"out of time at {M} rows: nothing is known of more")
                    return 1
                points.append(measure(shape, M, setting, clock))
        if border_of(points) < M:
            break
    about = f"{dispatch.architecture(device)}, torch {torch.__version__}"
    print(f'kernels/border.py:\n    "{dispatch.model(device)}": {border_of(points)},  # {about}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
