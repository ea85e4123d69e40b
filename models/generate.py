"""Text generation: batches of prompts continued token by token from a key-value cache.

Prompts of similar length share a batch, padded on the left so that all rows end together; rows that are done leave it.
Sampling draws one uniform number a token from a generator of the prompt's own, so what a prompt yields does not depend
on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocol import CausalLM


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else drawn from the `top_k` best (0: all) within mass
    `top_p`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids) until a stop token or `max_new_tokens`; returns the new tokens, without the stop
    token, in order.

    `on_token` is called with each new token as it comes (one prompt only). The same seed gives the same answers,
    whatever the batch size, up to rounding. Raises ValueError for an empty prompt, an id outside the vocabulary or an
    impossible setting.
    """
    if max_new_tokens < 0 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens must be 0 or more and batch_size 1 or more, got {max_new_tokens} and {batch_size}"
        )
    if on_token is not None and len(prompts) != 1:
        raise ValueError(f"on_token streams one prompt, got {len(prompts)}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token (beginning-of-text, say)")
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise ValueError(f"prompt {i} holds a token id outside 0 to {model.vocab_size - 1}")
    sampling = Sampling(temperature, top_k, top_p)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            batch = _Batch(model, [prompts[i] for i in rows], sampling, [(seed, i) for i in rows])
            for i, answer in zip(rows, batch.run(max_new_tokens, frozenset(stop_ids), on_token), strict=True):
                answers[i] = answer
    finally:
        model.train(was_training)
    return answers


class _Batch:
    """Rows generated together: `active` holds the row number of each row still in the cache.

    What all prompts begin with (a system prompt, or everything when one prompt is sampled often) is read once.
    """

    def __init__(
        self, model: CausalLM, prompts: list[Sequence[int]], sampling: Sampling, seeds: list[tuple[int, int]]
    ) -> None:
        self.model, self.sampling = model, sampling
        self.device = model.device
        self.generators = [_generator(*seed) for seed in seeds]
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.active = list(range(len(prompts)))
        self.cache = model.new_cache()
        shared = _common_start(prompts)
        if shared:
            model.hidden(torch.tensor([prompts[0][:shared]], device=self.device), cache=self.cache)
            self.cache.select(torch.zeros(len(prompts), dtype=torch.int64, device=self.device))
        rests = [prompt[shared:] for prompt in prompts]
        width = max(map(len, rests))
        pads = [width - len(rest) for rest in rests]
        self.tokens = torch.tensor([[0] * pad + list(rest) for pad, rest in zip(pads, rests, strict=True)])  # [B, T]
        self.tokens = self.tokens.to(self.device)
        self.mask: Tensor | None = None  # [B, cached + T]
        if any(pads):
            place = torch.arange(shared + width)
            padding = (place >= shared) & (place < shared + torch.tensor(pads).unsqueeze(1))
            self.mask = ~padding.to(self.device)

    def run(
        self, max_new_tokens: int, stop_ids: frozenset[int], on_token: Callable[[int], None] | None
    ) -> list[list[int]]:
        done: set[int] = set()
        for step in range(max_new_tokens):
            hidden = self.model.hidden(self.tokens, cache=self.cache, mask=self.mask)[:, -1]  # [B, hidden]
            chosen = choose(self.model.lm_head(hidden), self.sampling, [self.generators[row] for row in self.active])
            for row, token in zip(self.active, chosen.tolist(), strict=True):
                if row in done:
                    continue
                if token in stop_ids:
                    done.add(row)
                    continue
                self.answers[row].append(token)
                if on_token is not None:
                    on_token(token)
            if len(done) == len(self.answers) or step + 1 == max_new_tokens:
                break
            self._continue(chosen, done)
        return self.answers

    def _continue(self, chosen: Tensor, done: set[int]) -> None:
        """Feed the chosen tokens next; once half of the rows are done, only the others stay."""
        kept = [place for place, row in enumerate(self.active) if row not in done]
        self.tokens = chosen.unsqueeze(1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.active), 1)], dim=1)
        if 2 * len(kept) > len(self.active):
            return
        index = torch.tensor(kept, device=self.device)
        self.cache.select(index)
        self.tokens = self.tokens[index]
        self.mask = None if self.mask is None else self.mask[index]
        self.active = [self.active[place] for place in kept]


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, [B] int64, from logits [B, V]: arg-max, or drawn by inverting the cumulative probabilities at a
    row's own uniform number.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.double() / sampling.temperature
    k = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    ids: Tensor | None = None
    if k < scores.shape[-1] or sampling.top_p < 1:
        scores, ids = scores.topk(k, dim=-1)  # falling
    probability = scores.softmax(-1)
    if sampling.top_p < 1:
        before = probability.cumsum(-1) - probability  # mass of the better tokens
        probability = probability.masked_fill(before >= sampling.top_p, 0.0)
    mass = probability.cumsum(-1)
    drawn = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # [B, 1]
    uniform = drawn.to(logits.device)
    place = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)  # the first whose mass exceeds the drawn one
    last = (probability > 0).long().mul_(torch.arange(1, k + 1, device=logits.device)).amax(-1, keepdim=True) - 1
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _common_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; one fewer than the shortest at most, and 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    limit = min(map(len, prompts)) - 1
    first, last = min(map(list, prompts)), max(map(list, prompts))  # these two differ first of all
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _generator(seed: int, index: int) -> torch.Generator:
    """A prompt's own stream of random numbers."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % (1 << 63))
