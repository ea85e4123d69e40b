"""Text generation: batches of prompts continued token by token from a key-value cache.

Prompts of similar length share a batch, padded on the left so that all rows end together. Sampling draws one uniform
number a token from a generator of the prompt's own, so what a prompt yields does not depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .protocol import CausalLM


@dataclass(frozen=True)
class Sampling:
    """The next token: the best at temperature 0, else drawn from the `top_k` best (0: all) within mass `top_p`."""

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
            numbers = [torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + i) % (1 << 63)) for i in rows]
            batch = [(prompts[i], answers[i]) for i in rows]
            _continue(model, batch, sampling, numbers, max_new_tokens, frozenset(stop_ids), on_token)
    finally:
        model.train(was_training)
    return answers


def _continue(
    model: CausalLM,
    batch: list[tuple[Sequence[int], list[int]]],
    sampling: Sampling,
    numbers: list[torch.Generator],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    on_token: Callable[[int], None] | None,
) -> None:
    """Extend the answers of (prompt, answer) pairs, together.

    What all prompts begin with (a system prompt, or everything when one is sampled often) is read once; as soon as half
    of the rows are done, only the others stay.
    """
    device, cache = model.device, model.new_cache()
    tokens, mask, shared = _padded([prompt for prompt, _ in batch])
    tokens, mask = tokens.to(device), None if mask is None else mask.to(device)
    if shared:
        model.hidden(torch.tensor([batch[0][0][:shared]], device=device), cache=cache)
        cache.select(torch.zeros(len(batch), dtype=torch.int64, device=device))
    active, done = list(range(len(batch))), set[int]()  # rows in the cache, and those of them that are done
    for step in range(max_new_tokens):
        hidden = model.hidden(tokens, cache=cache, mask=mask)[:, -1]  # [B, hidden]
        chosen = choose(model.lm_head(hidden), sampling, [numbers[row] for row in active])
        for row, token in zip(active, chosen.tolist(), strict=True):
            if token in stop_ids:
                done.add(row)
            if row not in done:
                batch[row][1].append(token)
                if on_token is not None:
                    on_token(token)
        if len(done) == len(batch) or step + 1 == max_new_tokens:
            return
        tokens = chosen.unsqueeze(1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        kept = [place for place, row in enumerate(active) if row not in done]
        if 2 * len(kept) <= len(active):
            index = torch.tensor(kept, device=device)
            cache.select(index)
            tokens, mask, active = tokens[index], None if mask is None else mask[index], [active[i] for i in kept]


def _padded(prompts: list[Sequence[int]]) -> tuple[Tensor, Tensor | None, int]:
    """What differs of the prompts, padded on the left [B, T]; a mask [B, shared + T] if there is padding; and how many
    tokens all begin with: one fewer than the shortest at most, and 0 for a single prompt.
    """
    first, last = min(map(list, prompts)), max(map(list, prompts))  # these two differ first of all
    limit = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    width = max(map(len, prompts))
    pads = torch.tensor([[width - len(prompt)] for prompt in prompts])
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt[shared:]) for prompt in prompts])
    place = torch.arange(width)
    mask = (place < shared) | (place >= shared + pads)
    return tokens, None if mask.all() else mask, shared


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, [B] int64, from logits [B, V]: arg-max, or where cumulated mass passes a row's own number."""
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
    drawn = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(mass.device)  # [B, 1]
    place = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)  # the first whose mass exceeds the drawn one
    last = (probability > 0).long().mul_(torch.arange(1, k + 1, device=logits.device)).amax(-1, keepdim=True) - 1
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
