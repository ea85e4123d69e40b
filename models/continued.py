"""The texts that generation continues together: read, advanced by a token at a time, and left as their answers end."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..lora.rows import rows
from .cache import KVCache
from .protocol import Cache, CausalLM

WORTH = 16  # tokens that must be saved for a pass of its own over what texts begin with


@dataclass
class Row:
    """A prompt, its answer so far, and how it is made."""

    prompt: Sequence[int]
    seed: int
    room: int  # tokens that the answer may have
    adapter: str | None
    answer: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.answer]


Choose = Callable[[Tensor, Sequence[Row]], Tensor]
"""The next token [B] int64 of each row, from hidden states [B, D]."""


class Together:
    """Rows in any cache: all end together, padded on the left, and those that wait come when the last has left."""

    cache: Cache
    width = 0  # tokens that the cache has of each row
    joins = False  # whether rows may come while others go on

    def __init__(self, model: CausalLM, choose: Choose, named: bool) -> None:
        self.model, self.choose, self.named, self.rows = model, choose, named, list[Row]()

    def read(self, new: Sequence[Row]) -> Tensor:
        """Read the texts of these rows, which come behind the others. Returns the token [B] that follows each."""
        texts = [row.text for row in new]
        self.cache, self.rows, self.width = self.model.new_cache(), [*new], max(map(len, texts))
        # of a token of its own: another's activations might overflow, and NaN passes through every mask
        return self._next([text[:1] * (self.width - len(text)) + text for text in texts])

    def step(self) -> Tensor:
        """Read the last token of every row, which is the one that was chosen. Returns the token [B] after it."""
        self.width += 1
        return self._next([row.answer[-1:] for row in self.rows])

    def leave(self, places: Sequence[int]) -> None:
        """Take rows out; those that stay may stand in another order then."""
        kept = [place for place in range(len(self.rows)) if place not in places]
        if places and kept:
            self.cache.select(self._sent(kept))
        self.rows = [self.rows[place] for place in kept]

    def answering(self, these: Sequence[Row]) -> AbstractContextManager[None]:
        """A block in which each of these rows has its own adapter, if they do."""
        return rows(self.model, [row.adapter for row in these]) if self.named else nullcontext()

    def _next(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        shown = torch.arange(self.width) >= torch.tensor([[self.width - len(row.text)] for row in self.rows])
        mask = None if self.joins or shown.all() else shown.to(self.model.device)
        with self.answering(self.rows):
            states = self.model.hidden(self._sent(tokens), cache=self.cache, mask=mask)
            return self.choose(states[:, -1], self.rows)

    def _sent(self, numbers: Any) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)


class Ragged(Together):
    """Rows of their own lengths in our own cache, so that others join while some go on. What all of `order` begin with
    (a system prompt) is read once for a call, what those begin with that are read together once for them."""

    cache: KVCache
    joins = True

    def __init__(self, model: CausalLM, choose: Choose, named: bool, order: Sequence[Row], size: int) -> None:
        super().__init__(model, choose, named)
        self.most = max(len(row.prompt) + row.room for row in order)
        self.trunk, self.adapters = KVCache(), list[str | None]()  # the common beginning, as each adapter has it
        if len(order) > size and model.shares_prompts:
            self.trunk, self.adapters = self._begun(order)

    def read(self, new: Sequence[Row]) -> Tensor:
        texts = [row.text for row in new]
        cache, adapters = self.trunk, self.adapters
        if len(new) > 1 and self.model.shares_prompts:
            cache, adapters = self._begun(new)
        cache = self._forked(cache, [adapters.index(row.adapter) for row in new] if adapters else [])
        shared, ends = cache.length, torch.tensor([[len(text) - 1] for text in texts])
        width = int(ends.max()) + 1
        tokens = [text[shared:] + text[-1:] * (width - len(text)) for text in texts]
        places = torch.minimum(torch.arange(shared, width), ends)  # where lengths matter, pads do not add to them
        with self.answering(new):
            states = self.model.hidden(self._sent(tokens), places.to(self.model.device), cache=cache)
            chosen = self.choose(states[torch.arange(len(new)), ends[:, 0] - shared], new)
        cache.cut([len(text) for text in texts])
        if self.rows:
            self.cache.join(cache)
        else:
            self.cache = cache
        self.rows += new
        return chosen

    def leave(self, places: Sequence[int]) -> None:
        for place in sorted(places, reverse=True):
            self.cache.leave(place)
            self.rows[place] = self.rows[-1]
            self.rows.pop()

    def _forked(self, cache: KVCache, index: Sequence[int]) -> KVCache:
        """A cache of these rows of another one, which stays; or an empty one."""
        new: Any = copy.deepcopy(cache) if cache.counts else self.model.new_cache()
        new.most = self.most
        if cache.counts:
            new.select(self._sent(index))
        return cast(KVCache, new)

    def _begun(self, these: Sequence[Row]) -> tuple[KVCache, list[str | None]]:
        """A cache of what these texts begin with, a row for each of their adapters, and these."""
        texts, firsts = [row.text for row in these], [*{row.adapter: None for row in these}]
        one, other, limit = min(texts), max(texts), min(map(len, texts)) - 1  # these two differ first of all
        shared = next((i for i in range(limit) if one[i] != other[i]), limit)
        if (shared - self.trunk.length) * (len(these) - len(firsts)) < WORTH:
            return self.trunk, self.adapters
        cache = self._forked(self.trunk, [self.adapters.index(adapter) for adapter in firsts] if self.adapters else [])
        with rows(self.model, firsts) if self.named else nullcontext():
            self.model.hidden(self._sent([one[cache.length : shared]] * len(firsts)), cache=cache)
        return cache, firsts
