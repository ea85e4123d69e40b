"""The texts of a packed row: where each lies, which keys its queries see, and how they are laid out to be attended."""

from collections.abc import Sequence
from copy import copy
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Spans = Sequence[tuple[int, ...]]
"""Of each example (start, end), or of one that forks (start, fork, end_1, ..., end_n): its trunk, then n branches."""


def segments(spans: Spans, tokens: int, window: int = 0) -> list[tuple[int, int, int, int]]:
    """Each trunk with its first branch, and each other branch: (start, end, first, fork). Queries start to end see the
    run of the trunk from first to fork (that a window, 0: none, shows to any of them), then their own keys, causally.
    ValueError unless spans cover the tokens in order and without gaps. Only a trunk may be empty."""
    place, found = 0, list[tuple[int, int, int, int]]()
    for span in (*spans, (tokens, tokens + 1)):  # a text after the last one
        parts = [b - a for a, b in pairwise(span)]
        if not parts or span[0] != place or parts[0] < (len(parts) == 1) or any(part < 1 for part in parts[1:]):
            break
        start, fork, last, *others = span if len(span) > 2 else (*span, span[1])
        first = min(fork, max(start, fork - window + 1)) if window else start
        found += [(start, last, start, start), *((a, b, first, fork) for a, b in pairwise((last, *others)))]
        place = span[-1]
    else:
        return found[:-1]
    raise ValueError(
        f"spans must cover the {tokens} tokens in order and without gaps, each (start, end) or"
        f" (start, fork, end_1, ..., end_n) with no empty branch, got {list(spans)}"
    )


def span_positions(spans: Spans, device: torch.device) -> Tensor:
    """The place of every token in its own text, [tokens] int64: from 0 in each span, from the fork in each branch."""
    runs = [(fork - first, b - a + fork - first) for a, b, first, fork in segments(spans, spans[-1][-1])]
    return torch.cat([torch.arange(first, end, device=device) for first, end in runs])


class Batches(NamedTuple):
    """Segments in batches, N rows of L queries and S keys, filled with their first. Places None: all, in order."""

    queries: Tensor | None  # [sum of N * L] int64 places in the row
    keys: Tensor | None  # [sum of N * S] int64 places in the row
    outputs: Tensor | None  # [tokens] int64 places among the queries
    starts: tuple[Any, ...]  # of one-row batches: where queries and keys begin, [batches + 1] int32; the most of each
    sizes: list[tuple[int, int, int]]  # N, L, S of each
    biases: list[Tensor | None]  # [N, 1, L * G, S]: 0 for a key that a query sees, else -inf; None: N = 1, not filled


class Packed:
    """A packed row on a device, with what attention needs of it made once for all layers; errors as `segments`."""

    def __init__(self, spans: Spans, tokens: int, device: torch.device) -> None:
        self.spans, self.tokens, self.device = spans, tokens, device
        self.batches = cache(copy(self)._batches)  # its own would be a cycle, which keeps tensors until gc runs

    def _batches(self, window: int, area: int, groups: int, dtype: torch.dtype) -> Batches:
        """Segments of at most `area` queries times keys in batches of few sizes, larger ones by themselves."""
        sized: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for start, end, first, fork in segments(self.spans, self.tokens, window):
            exact = end - start, end - start + fork - first
            size = tuple(1 << max(4, (count - 1).bit_length()) for count in exact)
            size = size if size[0] * size[1] <= area else (*exact, start)
            sized.setdefault(size, []).append((start, end, first, fork))
        queries, keys, sizes, biases = [], [], [], list[Tensor | None]()
        for (length, width, *alone), parts in sized.items():
            sizes.append((1 << (len(parts) - 1).bit_length(), length, width))
            rows = parts + parts[:1] * (sizes[-1][0] - len(parts))
            start, end, first, fork = np.array(rows).T[..., None]  # [N, 1] each
            query, key, trunk, count = np.arange(length), np.arange(width), fork - first, end - start
            queries.append(np.where(query < count, start + query, start).ravel())
            own = np.where(key < trunk + count, start + key - trunk, start)
            keys.append(np.where(key < trunk, first + key, own).ravel())
            last = (np.minimum(query, count - 1) + trunk)[:, None, :, None]  # [N, 1, L, 1]: the last key a query sees
            seen = not alone and (key <= last) & (key > last - (window or width))
            biases.append(None if alone else self._sent(np.where(seen, 0.0, -np.inf).repeat(groups, 2)).to(dtype))
        asked, taken = np.concatenate(queries), np.concatenate(keys)
        outputs = np.unique(asked, return_index=True)[1]  # what fills up comes after what it repeats
        places = [None if np.array_equal(x, np.arange(len(asked))) else self._sent(x) for x in (asked, taken, outputs)]
        starts = np.cumsum([(0, 0), *(size[1:] for size in sizes)], axis=0, dtype=np.int32).T
        ends = *self._sent(starts).unbind(), *np.diff(starts).max(1).tolist()
        return Batches(places[0], places[1], places[2], ends, sizes, biases)

    def _sent(self, values: Any) -> Tensor:
        """On the row's device. The host does not wait for a GPU: copies from pinned memory take their turn."""
        made = torch.from_numpy(np.ascontiguousarray(values))
        return (made.pin_memory() if self.device.type == "cuda" else made).to(self.device, non_blocking=True)
