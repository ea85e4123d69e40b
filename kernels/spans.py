"""The texts of a packed row: where each lies, which keys its queries see, and how they are laid out to be attended.

An example may fork: several continuations of one text, which stands in the row once. What attention needs of a row
beside its queries, keys and values is made once a forward pass, whatever the number of layers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Spans = Sequence[tuple[int, ...]]
"""Of each example (start, end), or of one that forks (start, fork, end_1, ..., end_n): its trunk, then n branches."""


def span_lengths(spans: Spans, tokens: int) -> list[tuple[int, ...]]:
    """The lengths of each span's parts: (all,), or of one that forks (trunk, branch 1, ..., branch n).

    ValueError unless spans cover the tokens in order and without gaps. Only a trunk may be empty."""
    place = 0
    lengths = []
    for span in spans:
        parts = tuple(b - a for a, b in pairwise(span))
        if not parts or span[0] != place or parts[0] < (len(parts) == 1) or any(part < 1 for part in parts[1:]):
            break
        lengths.append((sum(parts),) if len(parts) <= 2 else parts)
        place = span[-1]
    else:
        if place == tokens:
            return lengths
    raise ValueError(
        f"spans must cover the {tokens} tokens in order and without gaps, each (start, end) or"
        f" (start, fork, end_1, ..., end_n) with no empty branch, got {list(spans)}"
    )


def span_positions(spans: Spans, device: torch.device) -> Tensor:
    """The place of every token in its own text, [tokens] int64: from 0 in each span, from the fork in each branch."""
    ranges = []
    for start, *ends in spans:
        ranges.append((0, ends[0] - start))
        ranges += [(ends[0] - start, ends[0] - start + b - a) for a, b in pairwise(ends)]
    return torch.cat([torch.arange(first, end, device=device) for first, end in ranges])


class Segment(NamedTuple):
    """A run of queries and its keys: some of the trunk before a branch, then those from `first` to the queries' end."""

    start: int
    end: int
    first: int  # own keys: first to end, with first <= start
    trunk: tuple[int, int]  # keys before those

    @property
    def keys(self) -> int:
        """How many keys the last query can see."""
        return self.trunk[1] - self.trunk[0] + self.end - self.first

    def piece(self, start: int, end: int, window: int) -> "Segment":
        """The queries from start to end, with the keys that a window (0: none) shows to any of them."""
        far = window - 1 if window else end  # how far back a query sees
        first = max(self.first, start - far)
        trunk = max(self.trunk[0], self.trunk[1] - max(0, far - (start - self.first))), self.trunk[1]
        return Segment(start, end, first, trunk)


class Batch(NamedTuple):
    """Segments of about one length, as rows: N of L queries and S keys, what is too short filled with its first key."""

    queries: Tensor  # [N * L] int64: places in the packed row
    keys: Tensor  # [N * S] int64
    bias: Tensor  # [1 or N, L * G, S]: 0 for a key that a query sees, else -inf; G query heads share one of keys


class Batches(NamedTuple):
    """A row's segments: those attended in batches, those attended one by one, and where each token's output is then."""

    short: list[Batch]
    long: list[Segment]
    places: Tensor | None  # [tokens] int64, among all outputs of `short`, then `long`; None: in the row's order


class Varlen(NamedTuple):
    """A row's segments for kernels that take them all at once."""

    queries: Tensor  # [segments + 1] int32: where each one's queries begin
    keys: Tensor  # [segments + 1] int32: where each one's keys begin
    most: tuple[int, int]  # queries and keys of the largest
    taken: Tensor | None  # [keys] int64: places of the keys in the row; None: all, in the row's order


class Packed:
    """A packed row of `tokens` tokens on `device`. ValueError unless spans cover them in order and without gaps."""

    def __init__(self, spans: Spans, tokens: int, device: torch.device) -> None:
        span_lengths(spans, tokens)
        self.spans, self.tokens, self.device = spans, tokens, device
        self._made: dict[Any, Any] = {}

    def _segments(self, window: int) -> list[Segment]:
        """The trunk with its first branch is one segment, as is every other branch; they lie in the row's order."""
        found = []
        for start, fork, *ends in ((a, b, *(rest or [b])) for a, b, *rest in self.spans):
            found.append(Segment(start, ends[0], start, (start, start)))
            found += [Segment(a, b, a, (start, fork)).piece(a, b, window) for a, b in pairwise(ends)]
        return found

    def varlen(self, window: int) -> Varlen:
        """For one call over all segments, whose queries are the last of their keys."""
        if ("varlen", window) not in self._made:
            parts = self._segments(window)
            ends = [[0, *np.cumsum(sizes)] for sizes in ([s.end - s.start for s in parts], [s.keys for s in parts])]
            taken = None
            if any(s.trunk[0] < s.trunk[1] for s in parts):
                runs = [np.arange(a, b) for s in parts for a, b in (s.trunk, (s.first, s.end))]
                taken = self._sent(np.concatenate(runs))
            most = max(s.end - s.start for s in parts), max(s.keys for s in parts)
            starts = (self._sent(np.array(end, np.int32)) for end in ends)
            self._made["varlen", window] = Varlen(*starts, most, taken)
        made: Varlen = self._made["varlen", window]
        return made

    def batches(self, window: int, area: int | None, room: int, groups: int, dtype: torch.dtype) -> Batches:
        """For products: segments of at most `area` queries times keys (None: all, cut into pieces) in batches of at
        most `room` of those, each of few sizes; `dtype` is the bias'."""
        how = window, area, room, groups, dtype
        if how not in self._made:
            self._made[how] = self._batches(*how)
        made: Batches = self._made[how]
        return made

    def _batches(self, window: int, area: int | None, room: int, groups: int, dtype: torch.dtype) -> Batches:
        sized: dict[tuple[int, int], list[Segment]] = {}
        long, tokens = [], []
        for whole in self._segments(window):
            if area is not None and _rounded(whole.end - whole.start) * _rounded(whole.keys) > area:
                long.append(whole)
                continue
            step = whole.end - whole.start
            most = whole.keys  # that a piece sees
            while area is None and step > 16 and _rounded(step) * _rounded(most) > room:
                step = -(-step // 2)
                most = min(whole.keys, step + window) if window else whole.keys
            for a in range(whole.start, whole.end, step):
                piece = whole.piece(a, min(a + step, whole.end), window)
                sized.setdefault((_rounded(piece.end - a), _rounded(piece.keys)), []).append(piece)
        short = []
        waiting: list[Segment] = []
        for (length, width), after in pairwise([*sorted(sized), (0, 0)]):
            parts = [*waiting, *sized[length, width]]
            more = len(parts) * (after[0] * after[1] - length * width)  # what it takes to join those of the next size
            waiting = parts if after[1] >= width and more < room // 32 else []
            most = max(1, room // (length * width))
            for i in range(0, 0 if waiting else len(parts), most):
                batch, places = self._batch(parts[i : i + most], length, width, window, groups, dtype)
                short.append(batch)
                tokens.append(places)
        places = np.concatenate([*tokens, *(np.arange(s.start, s.end) for s in long)])
        order = np.empty(self.tokens, np.int64)
        real = places >= 0
        order[places[real]] = real.nonzero()[0]
        return Batches(short, long, self._sent(order) if short else None)

    def _batch(
        self, parts: list[Segment], length: int, width: int, window: int, groups: int, dtype: torch.dtype
    ) -> tuple[Batch, Any]:
        """The batch, and what token each of its queries is, -1 for filling."""
        filled = parts + parts[:1] * (_rounded(len(parts), 1) - len(parts))
        start, end, first, t0, t1 = (np.array(x)[:, None] for x in zip(*((s[:3] + s[3]) for s in filled), strict=True))
        place, trunk, queries = np.arange(width), t1 - t0, end - start
        count = trunk + end - first  # [N, 1] keys
        begin = np.where(trunk > 0, t0, first)
        keys = np.where(place < trunk, t0 + place, np.where(place < count, first + place - trunk, begin))
        asked = np.arange(length)
        tokens = np.where(asked < queries, start + asked, -1)
        tokens[len(parts) :] = -1
        last = np.minimum(asked + count - queries, count - 1)[:, :, None]  # [N, L, 1] the last key that a query sees
        seen = (place <= last) & (place > last - window if window else True)  # [N, L, S]
        if (count == queries).all() and not window:
            seen = (place <= asked[:, None])[None]
        bias = torch.from_numpy(np.where(seen, 0.0, -np.inf).repeat(groups, 1)).to(dtype)
        batch = Batch(
            self._sent(np.where(tokens < 0, start, tokens).ravel()), self._sent(keys.ravel()), self._sent(bias)
        )
        return batch, tokens.ravel()

    def _sent(self, values: Any) -> Tensor:
        """On the row's device. The host does not wait for a GPU: copies from pinned memory take their turn."""
        made = torch.as_tensor(values)
        return (
            made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made.to(self.device)
        )


def _rounded(count: int, least: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few sizes, at most a half more."""
    size = max(least, 1 << (count - 1).bit_length())
    return size * 3 // 4 if size > max(least, 2) and count <= size * 3 // 4 else size
