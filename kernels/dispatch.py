"""The one place that decides which implementation of an op runs, and the one switch that overrides it.

"reference" is plain PyTorch on any device and defines the result; "cpu" is the quick form for the CPU, equal to it bit by
bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
