"""The one place that decides which implementation of an op runs, and the one switch that overrides it.

"reference" is plain PyTorch on any device and defines the result; "cpu" is the quick form for the CPU, equal to it bit
for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

PATHS = ("reference", "cpu")
_forced: str | None = None


def path_for(x: Tensor) -> str:
    """The path that ops on x take: the forced one, else "cpu" on a CPU and "reference" elsewhere."""
    if _forced is not None:
        return _forced
    return "cpu" if x.device.type == "cpu" else "reference"


@contextmanager
def force_path(name: str) -> Iterator[None]:
    """Every op takes path `name` inside this context, in all threads: for tests and for finding a fault."""
    global _forced
    if name not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype for matrix products with x: its own, but fp32 for half precision that a CPU cannot multiply.

    CPUs without half-precision arithmetic multiply bf16 and fp16 six to a hundred times slower than fp32. Those that
    have it for bf16 keep bf16.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 and _cpu_multiplies_bf16() else torch.float32


@cache
def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
