"""The texts of a packed row: where each lies, which keys its queries see, and how they are laid out to be attended."""

from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Spans = Sequence[tuple[int, ...]]
"""A forest in a row: of each piece of text (start, end), or (start, end, parent) where it goes on from another piece,
`spans[parent]`: its tokens see what that one's last token sees, then their own, causally. A tree's pieces lie together,
parents first; in depth-first order a first child is one causal run with its parent."""


def segments(spans: Spans, tokens: int, window: int = 0) -> list[tuple[int, int, np.ndarray]]:
    """Of each root or later child, with its first child, that one's first child and so on: start, end, and the places
    of all keys that its queries see, [prior + end - start] int64, its own the last; with a window (0: none) those that
    any of them sees. ValueError unless spans cover the tokens in order and without gaps, none empty, and each parent is
    an earlier piece of the same tree."""
    place, root, found, homes = 0, 0, list[Any](), list[Any]()  # start, end, keys before; of each span
    for i, span in enumerate((*spans, (tokens, tokens + 1))):  # a text after the last one
        root = root if len(span) > 2 else i
        if len(span) not in (2, 3) or not place == span[0] < span[1] or not all(root <= up < i for up in span[2:]):
            break
        start, place, *parent = span
        home: Any = homes[parent[0]] if parent else [0, 0, np.arange(0)]
        after = spans[parent[0]][1] if parent else 0
        if parent and after == start:
            home[1] = place
        else:
            home = [start, place, np.concatenate((home[2], np.arange(home[0], after)))]
            found.append(home)
        homes.append(home)
    else:
        kept = window - 1 if window else tokens
        return [(a, b, np.concatenate((up[max(0, len(up) - kept) :], np.arange(a, b)))) for a, b, up in found[:-1]]
    raise ValueError(
        f"spans must cover the {tokens} tokens in order and without gaps, each (start, end), or (start, end, parent)"
        f" with an earlier span of its tree for parent, none empty, got {list(spans)}"
    )


def span_positions(spans: Spans, device: torch.device) -> Tensor:
    """The place of every token in its own text, [tokens] int64: a child goes on from its parent's end."""
    laid = segments(spans, spans[-1][1])
    return torch.cat([torch.arange(len(keys) - b + a, len(keys), device=device) for a, b, keys in laid])


class Batches(NamedTuple):
    """Segments in batches, N rows of L queries and S keys, filled with their first. Places None: all, in order."""

    queries: Tensor | None  # [sum of N * L] int64 places in the row
    keys: Tensor | None  # [sum of N * S] int64 places in the row
    outputs: Tensor | None  # [tokens] int64 places among the queries
    starts: tuple[Any, ...]  # of one-row batches: where queries and keys begin, [batches + 1] int32; the most of each
    sizes: list[tuple[int, int, int]]  # N, L, S of each
    # Of each [N, 1, L * G, S]: 0 for a key that a query sees, else -inf; of one by itself [1, 1, L, S] bool, or None
    biases: list[Tensor | None]


class Packed:
    """A packed row on a device, with what attention needs of it made once for all layers; errors as `segments`."""

    def __init__(self, spans: Spans, tokens: int, device: torch.device) -> None:
        self.spans, self.tokens, self.device = spans, tokens, device
        self.batches = cache(copy(self)._batches)  # its own would be a cycle, which keeps tensors until gc runs

    def _batches(self, window: int, area: int, groups: int, dtype: torch.dtype | None) -> Batches:
        """Segments of at most `area` queries times keys in batches of few sizes, larger ones by themselves; without a
        dtype all by themselves."""
        sized: dict[tuple[int, ...], list[tuple[int, int, np.ndarray]]] = {}
        for start, end, seen in segments(self.spans, self.tokens, window):
            exact = end - start, len(seen)
            size = tuple(1 << max(4, (count - 1).bit_length()) for count in exact)
            size = size if dtype and size[0] * size[1] <= area else (*exact, start)
            sized.setdefault(size, []).append((start, end, seen))
        queries, keys, sizes, biases = [], [], [], list[Tensor | None]()
        for (length, width, *alone), parts in sized.items():
            sizes.append((1 << (len(parts) - 1).bit_length(), length, width))
            rows = parts + parts[:1] * (sizes[-1][0] - len(parts))
            start, end, total = np.array([(*one[:2], len(one[2])) for one in rows]).T[..., None]  # [N, 1] each
            query, key, count = np.arange(length), np.arange(width), end - start
            queries.append(np.where(query < count, start + query, start).ravel())
            keys += [np.pad(seen, (0, width - len(seen)), constant_values=first) for first, _, seen in rows]
            made = None
            if not alone or (width > length and length * width <= area):
                last = (np.minimum(query, count - 1) + total - count)[:, None, :, None]  # [N, 1, L, 1]: the last seen
                mask = (key <= last) & (key > last - (window or width))
                made = self._sent(mask if alone else np.where(mask, 0.0, -np.inf).repeat(groups, 2))
            biases.append(made if made is None or alone else made.to(dtype))
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
