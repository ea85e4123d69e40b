"""The texts that generation continues together: read, advanced by a token at a time, and left as their answers end."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.dispatch import path_for
from ..lora.adapter import is_hooked
from ..lora.rows import rows
from .cache import KVCache, bucket
from .moe import Mixture
from .protocol import Cache, CausalLM

# Of states [B, D], seeds and answers' lengths [2, B]: the next tokens, and the bits of their log-probabilities, [2, B]
Choose = Callable[[Tensor, Tensor], Tensor]
WORTH = 16  # tokens that must be saved for a pass of its own over what texts begin with
STEADY = 8  # steps alike after which a CUDA graph is recorded: it costs about as many, and rows that end make it stale


@dataclass
class Row:
    """A prompt, its answer so far, and how it is made."""

    prompt: Sequence[int]
    seed: int
    room: int  # tokens that the answer may have
    adapter: str | None
    answer: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)  # the token that ended it, if one did
    logps: list[float] = field(default_factory=list)  # of each token of both, where they are asked for

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def key(self) -> tuple[Any, ...]:
        """What its next token depends on, but for luck."""
        return self.adapter, *self.prompt, *self.answer


class Together:
    """Rows in any cache: all end together, padded on the left, and those that wait come when the last has left."""

    cache: Cache
    # Of each row the last token, its seed, how many tokens it has, the bits of the token's log-probability in float64
    last: Tensor  # [4, B] int64
    width = 0  # tokens that the cache has of each row
    joins = False  # whether rows may come while others go on

    def __init__(self, model: CausalLM, choose: Choose, named: bool) -> None:
        self.model, self.choose, self.named, self.rows = model, choose, named, list[Row]()

    def read(self, new: Sequence[Row]) -> Tensor:
        """Read the texts of these rows, which come behind the others; one that several have is read once. Returns the
        token [B] that follows each."""
        once = {row.key: row for row in new}
        texts = [row.text for row in once.values()]
        self.cache, self.rows, self.width = self.model.new_cache(), [*once.values()], max(map(len, texts))
        # of a token of its own: another's activations might overflow, and NaN passes through every mask
        with self.answering(self.rows):
            states = self._states(self._sent([text[:1] * (self.width - len(text)) + text for text in texts]))
        self.rows, self.last = [*new], self._forked(self.cache, [*once], states, new)
        return self.last[0]

    def step(self) -> Tensor:
        """Read the last token of every row, which is the one that was chosen. Returns the token [B] after it."""
        self.width += 1
        with self.answering(self.rows):
            return self.advance()

    def advance(self) -> Tensor:
        """A step of these rows on their device alone: it reads and writes `last` and the cache in place, the host sends
        it nothing and sees nothing of it."""
        tokens, _, numbers, chances = self.last
        chosen = self.choose(self._states(tokens.unsqueeze(1)), self.last[1:3])
        tokens.copy_(chosen[0])
        chances.copy_(chosen[1])
        numbers += 1
        return tokens

    def leave(self, places: Sequence[int]) -> None:
        """Take rows out; those that stay may stand in another order then."""
        kept = [place for place in range(len(self.rows)) if place not in places]
        if places and kept:
            self.cache.select(self._sent(kept))
            self.last = self.last[:, self._sent(kept)]
        self.rows = [self.rows[place] for place in kept]

    def answering(
        self, these: Sequence[Row], numbers: Sequence[Sequence[int]] | None = None
    ) -> AbstractContextManager[None]:
        """A block in which each of these rows has its own adapter, if they do; of packed tokens those `numbers`."""
        return rows(self.model, [row.adapter for row in these], numbers) if self.named else nullcontext()

    def _states(self, tokens: Tensor) -> Tensor:
        """The hidden state [B, D] of each row's last token, when these [B, T] are read."""
        shown = torch.arange(self.width) >= torch.tensor([[self.width - len(row.text)] for row in self.rows])
        mask = None if shown.all() else shown.to(self.model.device)
        return self.model.hidden(tokens, cache=self.cache, mask=mask)[:, -1]

    def _forked(self, cache: Cache, keys: list[Any], states: Tensor, new: Sequence[Row]) -> Tensor:
        """`last` of these rows with the token that follows each, which continue the cache's `keys`, in any number."""
        places = [keys.index(row.key) for row in new]
        if places != [*range(len(keys))]:
            cache.select(self._sent(places))
        luck = self._sent([[row.seed for row in new], [len(row.answer) for row in new]])
        with self.answering(new):
            chosen = self.choose(states[places], luck)
        return torch.cat((chosen[:1], luck[:1], luck[1:] + 1, chosen[1:]))

    def _sent(self, numbers: Any) -> Tensor:
        own = torch.tensor(numbers, device="cpu")
        return own.to(self.model.device, non_blocking=True)  # behind what the GPU does, not after it


class Ragged(Together):
    """Rows of their own lengths in our own cache, so that others join while some go on. What all of `order` begin with
    (a system prompt) is read once for a call, with each adapter; so is each text, while rows that have it come in turn.
    """

    cache: KVCache
    joins = True
    graph: Any = None  # torch.cuda.CUDAGraph of the last steps, `steady` of which were `alike`
    alike, steady = tuple[Any, ...](), 0

    def __init__(self, model: CausalLM, choose: Choose, named: bool, order: Sequence[Row]) -> None:
        super().__init__(model, choose, named)
        self.trunk, texts = cast(KVCache, model.new_cache()), [row.text for row in order]
        self.trunk.most = max(len(row.prompt) + row.room for row in order)
        first, last, limit = min(texts), max(texts), min(map(len, texts)) - 1  # these two differ first of all
        shared = next((i for i in range(limit) if first[i] != last[i]), limit)
        self.adapters, self.coming = {row.adapter: row for row in order}, Counter(row.key for row in order)
        # neither those who want to be called at each step, nor experts, who may ask how many tokens each has
        plain = not any(is_hooked(m) or m._compiled_call_impl or isinstance(m, Mixture) for m in model.modules())
        on_gpu = model.device.type == "cuda" and path_for(torch.empty(0, device=model.device)) == "triton"
        self.replays = on_gpu and plain and not named and model.shares_prompts
        self.kept: tuple[Any, KVCache, Tensor] | None = None  # the last text that was read, if others with it come
        if model.shares_prompts and shared * (len(self.coming) - len(self.adapters)) >= WORTH:
            with self.answering([*self.adapters.values()]):
                model.hidden(self._sent([first[:shared]] * len(self.adapters)), cache=self.trunk)

    def read(self, new: Sequence[Row]) -> Tensor:
        once, kept = {row.key: row for row in new}, self.kept
        if kept and (known := once.pop(kept[0], None)):
            cache, states = kept[1].fork([0]), kept[2]
            if once:
                more, others = self._read([*once.values()])
                cache.join(more)
                states = torch.cat((states, others))
            once = {kept[0]: known, **once}
        else:
            cache, states = self._read([*once.values()])
        self.coming.subtract(row.key for row in new)
        keys, last = [*once], new[-1].key
        at = keys.index(last)
        self.kept = (last, cache.fork([at]), states[at : at + 1]) if self.coming[last] > 0 else None
        chosen = self._forked(cache, keys, states, new)
        if self.rows:
            self.cache.join(cache)
            self.last = torch.cat((self.last, chosen), 1)
        else:
            self.cache, self.last = cache, chosen
        self.rows += new
        return chosen[0]

    def step(self) -> Tensor:
        """As without a graph; steps alike are recorded once and then replayed, which takes the host one call each."""
        held = self.last, self.cache.lengths, *self.cache._rooms
        alike = bucket(self.cache.length + 1), *((x.shape, x.stride(), x.data_ptr()) for x in held)
        self.steady = self.steady + 1 if self.replays and alike == self.alike else 0
        if self.steady < STEADY:
            self.alike, self.graph = alike, None
            return super().step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.advance()  # the cache's counts go on, the device does nothing yet
        else:
            self.cache.counts = [count + 1 for count in self.cache.counts]
        self.graph.replay()
        return self.last[0]

    def _states(self, tokens: Tensor) -> Tensor:
        return self.model.hidden(tokens, cache=self.cache)[:, -1]

    def _read(self, new: Sequence[Row]) -> tuple[KVCache, Tensor]:
        """A cache of the texts of these rows, which are read without padding, and the hidden state [B, D] of the last
        token of each."""
        adapters = [*self.adapters]
        cache = self.trunk.fork([adapters.index(row.adapter) for row in new] if self.trunk.counts else [])
        texts = [row.text[cache.length :] for row in new]
        ends = [*accumulate(map(len, texts))]
        with self.answering(new, [[i for i, text in enumerate(texts) for _ in text]]):
            spans = [*pairwise([0, *ends])]
            states = self.model.hidden(self._sent([[*chain(*texts)]]), spans=spans, cache=cache)
        return cache, states[0, self._sent(ends) - 1]

    def leave(self, places: Sequence[int]) -> None:
        for place in sorted(places, reverse=True):
            self.cache.leave(place)
            self.last[:, place] = self.last[:, -1]
            self.last = self.last[:, :-1]
            self.rows[place] = self.rows[-1]
            self.rows.pop()
