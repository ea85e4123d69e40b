"""The two rates that bound every op on this machine: copying memory, and multiplying matrices. Measured first.

Copying counts bytes read plus bytes written. The product is square, in the run's dtype and on normal values: zeros
would run at another clock.
"""

from dataclasses import dataclass

import torch

from .cases import Setting
from .timing import Clock, Timing, interleave

SIZES = {"cuda": (1 << 30, 8192), "cpu": (1 << 28, 2048)}  # bytes of the copy, side of the product
SECONDS = {"cuda": 1.5, "cpu": 4.0}


@dataclass(frozen=True)
class Ceilings:
    copy: Timing
    copy_bytes: float
    matmul: Timing
    matmul_flops: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second, at best: a busy machine must not lower what it is measured against."""
        return self.copy_bytes / min(self.copy.seconds)

    @property
    def rate(self) -> float:
        """Floating-point operations a second, at best."""
        return self.matmul_flops / min(self.matmul.seconds)

    def seconds(self, flops: float, bytes_: float) -> float:
        """The least time for this much work: the roofline."""
        return max(flops / self.rate, bytes_ / self.bandwidth)


def measure(setting: Setting, clock: Clock, sizes: tuple[int, int] | None = None) -> Ceilings:
    kind = setting.device.type
    size, side = sizes or SIZES[kind]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    a, b = setting.normal(side, side, seed=1), setting.normal(side, side, seed=2)
    way = setting.way[0]
    calls = {"copy": lambda i: target.copy_(source), "matmul": lambda i: a @ b}
    samplers = {name: clock.sampler(call, 1, way) for name, call in calls.items()}
    taken = {name: Timing(tuple(seconds), way) for name, seconds in interleave(samplers, SECONDS[kind]).items()}
    return Ceilings(taken["copy"], 2.0 * size, taken["matmul"], 2.0 * side**3)
