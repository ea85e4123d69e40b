"""Keys and values of tokens already seen, kept for generation."""

from torch import Tensor

CHUNK = 64  # tokens of room added at a time: copying costs less than room that short answers never use


class KVCache:
    """Room for every layer's keys and values, [rows, kv_heads, capacity, head_dim], grown by chunks of 64 tokens.

    `length` counts the tokens stored. Memory: 2 * layers * rows * kv_heads * capacity * head_dim elements of the
    model's dtype.
    """

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, T, K, D] after the tokens seen so far; return all of that layer's, [B, length + T, K, D]
        (views).
        """
        end = self.length + k.shape[1]
        return self._store(self._keys, layer, k, end), self._store(self._values, layer, v, end)

    def advance(self, tokens: int) -> None:
        """Count the tokens just appended to every layer."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Take the rows with the given indices (int64), in that order; a repeated one is continued in several ways."""
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                store[layer] = None if old is None else old.index_select(0, rows)

    def _store(self, store: list[Tensor | None], layer: int, x: Tensor, end: int) -> Tensor:
        room = store[layer]
        if room is None or room.shape[2] < end:
            room = store[layer] = self._grown(room, x, end)
        room[:, :, self.length : end] = x.transpose(1, 2)
        return room[:, :, :end].transpose(1, 2)

    def _grown(self, old: Tensor | None, x: Tensor, end: int) -> Tensor:
        rows, _, heads, size = x.shape
        room = x.new_empty(rows, heads, -(-end // CHUNK) * CHUNK, size)
        if old is not None:
            room[:, :, : self.length] = old[:, :, : self.length]
        return room
