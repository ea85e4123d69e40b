"""The key-value cache: rows of their own lengths, in rooms that no token makes anew.

A row's token stands at its position, so what texts begin with lies side by side, the last row takes the place of one
that ends, and others join while the rest go on. A pass reads keys up to the next of a few lengths (a bucket) and hides
what is beyond each row's own end: shapes stay few, and where a row stands is known to the device.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.spans import Spans


def bucket(length: int) -> int:
    """How many keys a pass reads that needs `length`: a multiple of 64, and of an eighth to a quarter of it."""
    step = max(64, 1 << length.bit_length() >> 3)
    return -(-length // step) * step


class KVCache:
    """Room for every layer's keys and values, [2, rows, kv_heads, capacity, head_dim], doubled when a row outgrows it.

    `counts`: the tokens of each row; `lengths`, int64 on the device, has them too. Memory: 2 * layers * rows * kv_heads
    * capacity * head_dim elements of the model's dtype, with a capacity of the longest row's bucket or less than twice
    that row, and not above the bucket of `most`."""

    keys: int  # that the pass reads
    places: Tensor  # of its tokens in their rows, [rows, T], or [1, T] of spans

    def __init__(self) -> None:
        self.counts, self.lengths, self.most = list[int](), torch.empty(0, dtype=torch.int64, device="cpu"), 1 << 62
        self._rooms = list[Tensor]()

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.counts, default=0)

    def begin(self, input_ids: Tensor, padded: bool = False, spans: Spans | None = None) -> None:
        """A pass over new tokens: [rows, T], `padded` with a mask over exactly the keys that there are; or [1, T] of
        `spans`, the i-th of which row i goes on with."""
        rows, tokens, device = *input_ids.shape, input_ids.device
        if spans is not None:
            rows, tokens = len(spans), max(end - start for start, end in spans)
        if not self.counts:
            self.counts, self.lengths = [0] * rows, torch.zeros(rows, dtype=torch.int64, device=device)
        if len(self.counts) != rows or (padded and len({*self.counts}) > 1):
            raise ValueError(f"tokens of {rows} rows for a cache of {self.counts} tokens; a mask needs rows alike")
        self.keys = self.length + tokens if padded or not self.length else bucket(self.length + tokens)
        # where queries are as rooms want them [rows, T], whose room a token belongs to, and its number among its row's
        self._asked = self.places = self.lengths.unsqueeze(1) + torch.arange(tokens, device=device)
        self._row, self._new = torch.arange(rows, device=device).unsqueeze(1), [tokens] * rows
        self._steps: Tensor | None = None
        if spans is not None:
            self._new = [end - start for start, end in spans]
            at = [(row, step) for row, count in enumerate(self._new) for step in range(count)]
            self._row, self._steps = torch.tensor(at, device="cpu").t().unsqueeze(1).to(device, non_blocking=True)
            self.places = self._asked[self._row, self._steps]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, T, K, D] behind each row's tokens; views of that layer's, [rows, `keys`, K, D], or k and v
        where spans begin their rows: they see nothing else."""
        room = self._roomy(layer, k, self.keys, len(self.counts))
        for held, new in zip(room, (k, v), strict=True):
            held[self._row, :, self.places] = new
        if self._steps is not None and not self.length:
            return k, v
        keys, values = room[:, : len(self.counts), :, : self.keys].transpose(2, 3)
        return keys, values

    def laid(self, q: Tensor) -> Tensor:
        """Queries [B, T, H, D] as `seen` has them, [rows, T, H, D]; spans that begin their rows as they are."""
        if self._steps is None or not self.length:
            return q
        return q.new_zeros(*self._asked.shape, *q.shape[2:]).index_put_((self._row, self._steps), q)

    def taken(self, y: Tensor) -> Tensor:
        """What `laid` queries found, [B, T, H, D] as the tokens were given."""
        return y if self._steps is None or not self.length else y[self._row, self._steps]

    def seen(self, window: int = 0) -> Tensor | None:
        """Which keys the pass's queries see, [rows, 1, T, keys] bool: up to their own, of a `window` the last ones;
        None where causality says it, in rows that begin."""
        if not self.length:
            return None
        there, here = torch.arange(self.keys, device=self.places.device), self._asked.unsqueeze(-1)
        found = there <= here
        return (found & (there > here - window) if window else found).unsqueeze(1)

    def end(self) -> None:
        """Every layer has the pass's tokens."""
        self.counts = [had + new for had, new in zip(self.counts, self._new, strict=True)]
        # in place, where a step that is run again by a CUDA graph finds it
        self.lengths += self.places.shape[1] if self._steps is None else self.lengths.new_tensor(self._new)

    def select(self, rows: Tensor) -> None:
        """Take the rows with the given indices (int64), in that order; a repeated one is continued in several ways."""
        for layer, room in enumerate(self._rooms):  # one after the other, so that only one is there twice
            self._rooms[layer] = room.index_select(1, rows)
        self._count([self.counts[row] for row in rows.tolist()])

    def fork(self, rows: Sequence[int]) -> Self:
        """A cache of its own of these rows."""
        new = copy.copy(self)
        new._rooms = [*self._rooms]
        new.select(torch.tensor(rows, dtype=torch.int64, device=self.lengths.device))
        return new

    def leave(self, row: int) -> None:
        """Go on without that row: the last one takes its place."""
        last, count = len(self.counts) - 1, self.counts[-1]
        for room in self._rooms if row < last else ():
            room[:, row, :, :count] = room[:, last, :, :count]
        self.lengths[row] = self.lengths[last]
        self.lengths, self.counts[row] = self.lengths[:last], count
        self.counts.pop()

    def join(self, other: Self) -> None:
        """Take the rows of another one behind its own, into places that rows have left, or new ones."""
        here, width = len(self.counts), other.length
        for layer, new in enumerate(other._rooms):
            room = self._roomy(layer, new[0].transpose(1, 2), width, here + len(other.counts))
            room[:, here : here + len(other.counts), :, :width] = new[:, :, :, :width]
        self._count([*self.counts, *other.counts])

    def _count(self, counts: Sequence[int]) -> None:
        self.counts = [*counts]
        self.lengths = torch.tensor(counts, dtype=torch.int64, device=self.lengths.device)

    def _roomy(self, layer: int, like: Tensor, keys: int, rows: int) -> Tensor:
        """The layer's room, of at least so many keys and rows; for `like` [B, T, K, D] where there is none."""
        if layer == len(self._rooms):
            self._rooms.append(like.new_empty(2, rows, like.shape[2], 0, like.shape[3]))
        room = self._rooms[layer]
        if rows > room.shape[1]:
            room = self._rooms[layer] = F.pad(room, (0, 0, 0, 0, 0, 0, 0, rows - room.shape[1]))
        if (more := keys - (had := room.shape[3])) > 0:
            more = max(bucket(keys), min(2 * had, bucket(self.most))) - had
            # of zeros: what no row sees counts with weight 0, and 0 times what lies in empty memory may be NaN
            room = self._rooms[layer] = F.pad(room, (0, 0, 0, more))
        return room
