"""Where each parameter's state lies in one long flat state, and how that is cut up for kernels.

Parameters of one group and dtype share flat state tensors. Each takes a span that starts at a multiple of BLOCK, the
block of 8-bit states, so that no block belongs to two parameters. Spans are only ever appended: what lies somewhere
stays there when a parameter joins. Kernels work on chunks: pieces of one parameter inside one window of CHUNK elements
of the flat state. So every cut of the flat state at a multiple of CHUNK (a page) also is a cut between chunks.
"""

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
CHUNK = 4096


def blocks(size: int) -> int:
    """The elements that `size` elements take of a flat state: whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Segment(NamedTuple):
    """A piece of one parameter: its elements [start, start + length), kept in the flat state from `offset` on."""

    place: int  # of the parameter in the layout
    start: int
    length: int
    offset: int


class Layout:
    """Spans of a flat state; plain numbers, no tensors."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # elements of each parameter
        self.starts: list[int] = []  # of its span
        self.total = 0  # elements of the flat state: a multiple of BLOCK

    def add(self, size: int) -> int:
        """Append a span for `size` elements (0 allowed); returns the parameter's index."""
        self.sizes.append(size)
        self.starts.append(self.total)
        self.total += blocks(size)
        return len(self.sizes) - 1

    def span(self, index: int) -> tuple[int, int]:
        """The flat state's elements [start, end) that belong to a parameter, padding to a whole block included."""
        start = self.starts[index]
        return start, start + blocks(self.sizes[index])

    def segments(self, start: int, end: int) -> list[Segment]:
        """What of which parameters lies in [start, end) of the flat state, in order; padding left out."""
        found = []
        for index in range(max(bisect_right(self.starts, start) - 1, 0), len(self.starts)):
            first = self.starts[index]
            if first >= end:
                break
            low, high = max(start, first), min(end, first + self.sizes[index])
            if low < high:
                found.append(Segment(index, low - first, high - low, low))
        return found

    def chunks(self) -> NDArray[np.int64]:
        """All chunks in order as rows of (place, start, length, offset), int64 [chunks, 4], as in Segment."""
        rows = [
            _chunks(index, *pair) for index, pair in enumerate(zip(self.starts, self.sizes, strict=True)) if pair[1]
        ]
        return np.concatenate(rows) if rows else np.empty((0, 4), np.int64)


def _chunks(index: int, first: int, size: int) -> NDArray[np.int64]:
    """One parameter's span cut at multiples of CHUNK."""
    inner = np.arange((first // CHUNK + 1) * CHUNK, first + size, CHUNK, dtype=np.int64)
    cuts = np.concatenate([[first], inner, [first + size]])
    columns = [np.full(len(cuts) - 1, index), cuts[:-1] - first, np.diff(cuts), cuts[:-1]]
    return np.stack(columns, axis=1).astype(np.int64)
