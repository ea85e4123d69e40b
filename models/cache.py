"""Keys and values of tokens already seen, kept for generation."""

from torch import Tensor

CHUNK = 64  # tokens of room added at a time: copying costs less than room that short answers never use


class KVCache:
    """Room for every layer's keys and values, [2, rows, kv_heads, capacity, head_dim], grown by chunks of 64 tokens.

    `length` counts the tokens that every layer has; who appends to all of them adds to it. Memory: 2 * layers * rows *
    kv_heads * capacity * head_dim elements of the model's dtype.
    """

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._rooms: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, T, K, D] after the tokens seen; views of all of that layer's, [B, length + T, K, D]."""
        end = self.length + k.shape[1]
        room = self._rooms[layer]
        if room is None or room.shape[3] < end:
            old, (rows, _, heads, size) = room, k.shape
            room = self._rooms[layer] = k.new_empty(2, rows, heads, -(-end // CHUNK) * CHUNK, size)
            if old is not None:
                room[:, :, :, : self.length] = old[:, :, :, : self.length]
        for held, new in zip(room, (k, v), strict=True):
            held[:, :, self.length : end] = new.transpose(1, 2)
        keys, values = room[:, :, :, :end].transpose(2, 3)
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Take the rows with the given indices (int64), in that order; a repeated one is continued in several ways."""
        for layer, room in enumerate(self._rooms):  # one after the other, so that only one is there twice
            self._rooms[layer] = None if room is None else room.index_select(1, rows)
