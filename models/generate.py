"""Text generation: batches of prompts continued token by token from a key-value cache.

Prompts of similar length share a batch. Sampling draws one uniform number a token, on the device, from a counter: a
function of the prompt's own seed and the token's place alone. So an answer's luck depends on no neighbour, on no order
of rows and on no batch size. The logits it is applied to may: products over another number of rows round otherwise in
their last bits, and where two tokens are as good as equal, that decides.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.dispatch import memory_free, product_dtype, widened
from ..kernels.dropout import uniform
from ..lora.adapter import is_hooked
from ..lora.merge import merging
from ..lora.packed import can_pack, product
from ..settings import LARGEST, Checked, setting
from .cache import KVCache
from .continued import Ragged, Row, Together
from .finite import explain_nonfinite, first_nonfinite
from .foreign import as_causal_lm
from .protocol import CausalLM, evaluating

KeepDense = Literal["auto", "on", "off"]
OnToken = Callable[[int], None] | None
PER_PROMPT = ("adapters", "max_new_tokens")  # what may be one a prompt
NOT_FINITE = -1  # in the place of a token
FEW = 8  # rows
ROWS = 32  # that are answered together, by default
DECODES = 4  # passes that take as long from 4 bits as decoding for good and as many from what that makes


@dataclass(frozen=True)
class Sampling(Checked):
    """How the next token is chosen. Raises InputError for what cannot be, or would be ignored."""

    temperature: float = setting(0.0, "0 takes the likeliest token each time", least=0)
    top_k: int = setting(0, "sample from this many likeliest tokens; 0: from all", least=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that make up this share", positive=True, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature and (self.top_k or self.top_p != 1):
            name = "top_k" if self.top_k else "top_p"
            raise InputError(f"{name} draws, and temperature 0 takes the likeliest token each time: give a temperature")


def dense_room(like: Tensor, keep: KeepDense, passes: int = DECODES) -> float:
    """The bytes that decoded weights may take (`merging`) while answers are made: half of what is free for `auto`, on a
    CPU that multiplies the model's dtype, for `passes` enough. On a GPU products with 4 bits read a quarter of the
    bytes for few rows. like: a tensor of the model's dtype, where the model is."""
    gains = keep == "auto" and passes >= DECODES and like.device.type == "cpu" and product_dtype(like) == like.dtype
    return math.inf if keep == "on" else memory_free(like.device) / 2 if gains else 0


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 256,
    max_length: int | None = None,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    batch_size: int = ROWS,
    on_token: OnToken = None,
    adapters: Sequence[str | None] | None = None,
    keep_dense: KeepDense = "auto",
) -> list[list[int]]:
    """Continue each prompt (token ids) until a stop token or `max_new_tokens` (of all, or one a prompt); returns the
    new tokens, without the stop token, in order.

    `max_length`: tokens that prompt and answer may have together (a model's positions, say). `seed`: one for all, or
    one a prompt, or None: drawn from torch's generator where anything is. Of one for all, each prompt's own is made by
    `prompt_seeds`, so a sampled answer goes with its prompt wherever that stands, whatever the batch size, up to
    rounding of the logits. `on_token` is called with each new token as it comes (one prompt only). `adapters`: for each
    prompt the adapter that answers it (None: the base), of any prompts in one batch; by default those that are active.
    `keep_dense`: whether 4-bit weights are decoded once for the call (`merging`), at any price or by `dense_room`.

    Raises ValueError for an empty prompt, one that leaves no room, an id outside the vocabulary or an impossible
    setting; NumericError for logits that are no numbers, naming the layer where they went bad.
    """
    how = (temperature, top_k, top_p), seed, batch_size, on_token, adapters, keep_dense
    return [row.answer for row in _answers(model, prompts, max_new_tokens, max_length, stop_ids, *how)]


@dataclass(frozen=True)
class Sampled:
    """A drawn answer, with the token that ended it where one did (`ended`), and of each token the log-probability that
    it was drawn with, in nats: of the softmax at the temperature."""

    ids: list[int]
    logps: list[float]
    ended: bool


def sample(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    max_length: int | None = None,
    stop_ids: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    batch_size: int = ROWS,
    keep_dense: KeepDense = "auto",
) -> list[Sampled]:
    """Draw an answer to each prompt as `generate` does, whose arguments and errors these are; what its tokens had for
    chances among all tokens is kept. Equal prompts draw anew."""
    how = (temperature, top_k, top_p), seed, batch_size, None, None, keep_dense
    rows = _answers(model, prompts, max_new_tokens, max_length, stop_ids, *how, logps=True)
    return [Sampled(row.answer + row.end, row.logps, bool(row.end)) for row in rows]


@torch.inference_mode()
def _answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    max_length: int | None,
    stop_ids: Sequence[int],
    sampled: tuple[float, int, float],
    seed: int | Sequence[int] | None,
    batch_size: int,
    on_token: OnToken,
    adapters: Sequence[str | None] | None,
    keep_dense: KeepDense,
    logps: bool = False,
) -> list[Row]:
    """The rows of `generate`, with their answers; with `logps` also these."""
    sampling = Sampling(*sampled)
    temperature = sampling.temperature
    model = as_causal_lm(model)

    def next_tokens(states: Tensor, luck: Tensor) -> Tensor:
        logits = _logits(model.head(), states)
        tokens = choose(logits, sampling, uniform(luck[1], luck[0]) if temperature else luck)
        if not logps:
            return torch.stack((tokens, tokens))
        scores = (widened(logits) / (temperature or 1.0)).log_softmax(-1).gather(1, tokens.clamp(min=0)[:, None])
        return torch.stack((tokens, scores[:, 0].double().view(torch.int64)))

    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(most) != len(prompts) or min(most, default=0) < 0 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens must be 0 or more, one for all or each of {len(prompts)} prompts, and batch_size 1 or "
            f"more, got {max_new_tokens} and {batch_size}"
        )
    if adapters is not None and len(adapters) != len(prompts):
        raise ValueError(f"adapters must be one for each of {len(prompts)} prompts, got {len(adapters)}")
    if on_token is not None and len(prompts) != 1:
        raise ValueError(f"on_token streams one prompt, got {len(prompts)}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token (beginning-of-text, say)")
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise ValueError(f"prompt {i} holds a token id outside 0 to {model.vocab_size - 1}")
        if max_length is not None and len(prompt) >= max_length:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in max_length {max_length}")
    if seed is None:
        seed = int(torch.randint(LARGEST, (), device="cpu")) if temperature else 0
    seeds = prompt_seeds(prompts, seed) if isinstance(seed, int) else seed
    seeds = [(each + 2**63) % 2**64 - 2**63 for each in seeds]  # the same bits, as int64 has them
    rooms = [n if max_length is None else min(n, max_length - len(p)) for n, p in zip(most, prompts, strict=True)]
    named = [None] * len(prompts) if adapters is None else adapters
    asked = [Row(*each) for each in zip(prompts, seeds, rooms, named, strict=True)]
    order = sorted(
        (row for row in asked if row.room), key=lambda row: (len(row.prompt), [*row.prompt], str(row.adapter))
    )
    how = model, next_tokens, adapters is not None
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    room = dense_room(like, keep_dense, max(*rooms, sum(rooms) // batch_size)) if order else 0
    with evaluating(model), merging(model, room, adapters is None, min(batch_size, len(order))):
        texts = Ragged(*how, order) if order and isinstance(model.new_cache(), KVCache) else Together(*how)
        bad = _continue(texts, order, batch_size, frozenset(stop_ids), on_token, logps)
    if bad is not None:
        what = f"token {len(bad.answer) + 1} of an answer cannot be chosen: its logits"
        with evaluating(model), texts.answering([bad]):
            read = torch.tensor([bad.text], device=model.device)
            raise explain_nonfinite(model, what, first_nonfinite(model, read))
    return asked


def generate_each(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 256,
    batch_size: int = ROWS,
    seed: int | Sequence[int] = 0,
    adapters: Sequence[str | None] | None = None,
    **how: Any,
) -> Iterator[list[int]]:
    """`generate` for many prompts: each answer in its turn, as soon as the 8 batches that hold it are done."""
    how |= {"adapters": adapters, "max_new_tokens": max_new_tokens}
    return _each(generate, model, prompts, batch_size, seed, how)


def sample_each(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = ROWS,
    seed: int | Sequence[int] = 0,
    **how: Any,
) -> Iterator[Sampled]:
    """`sample` for many prompts, as `generate_each`."""
    return _each(sample, model, prompts, batch_size, seed, how)


def _each(
    make: Callable[..., list[Any]],
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    seed: int | Sequence[int],
    how: dict[str, Any],
) -> Iterator[Any]:
    model, seeds = as_causal_lm(model), prompt_seeds(prompts, seed) if isinstance(seed, int) else seed
    for first in range(0, len(prompts), 8 * batch_size):
        these = slice(first, first + 8 * batch_size)
        own = {name: how[name][these] for name in PER_PROMPT if isinstance(how.get(name), list | tuple)}
        yield from make(model, prompts[these], seed=seeds[these], batch_size=batch_size, **how | own)


def prompt_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A seed for each prompt: from the prompt itself, and from how many equal ones stand before it, so that these draw
    anew."""
    seen, made = Counter[tuple[int, ...]](), list[int]()
    for prompt in map(tuple, prompts):
        numbers = repr((seed, seen[prompt], *prompt)).encode()  # of any size
        made.append(int.from_bytes(blake2b(numbers, digest_size=8).digest()))
        seen[prompt] += 1
    return made


def _continue(
    texts: Together, order: Sequence[Row], batch_size: int, stop_ids: frozenset[int], on_token: OnToken, logps: bool
) -> Row | None:
    """Extend the answers of all rows, `batch_size` at most together. Rows leave as they are done, and where others may
    join, they do as soon as an eighth of the places is free. Returns a row whose logits are no numbers, at once."""
    model, waiting = texts.model, deque(order)
    while waiting or texts.rows:
        again = [i for i, row in enumerate(texts.rows) if len(row.text) == model.restarts_at + 1 > 1]
        if again:
            again = again if texts.joins else [*range(len(texts.rows))]
            waiting.extendleft(texts.rows[i] for i in again)
            texts.leave(again)
        first, free = len(texts.rows), batch_size - len(texts.rows)
        if waiting and (not texts.rows or (texts.joins and (again or 8 * free >= batch_size))):
            chosen = texts.read([waiting.popleft() for _ in range(min(free, len(waiting)))])
        else:
            chosen, first = texts.step(), 0
        if logps:
            for row, score in zip(texts.rows[first:], texts.last[3, first:].view(torch.float64).tolist(), strict=True):
                row.logps.append(score)
        ended = list[int]()
        for place, token in enumerate(chosen.tolist(), first):
            row = texts.rows[place]
            if token == NOT_FINITE:
                return row
            if token in stop_ids:
                row.end.append(token)
            else:
                row.answer.append(token)
                if on_token is not None:
                    on_token(token)
            if token in stop_ids or len(row.answer) == row.room:
                ended.append(place)
        texts.leave(ended)
    return None


def _logits(head: nn.Module, states: Tensor) -> Tensor:
    """The head's output [B, V]. A plain one of fp32 on a CPU takes a third to two thirds of its time where a few rows
    are columns, and more of them are oneDNN's."""
    if len(states) == 1 or is_hooked(head) or states.dtype != torch.float32 or not can_pack([head]):
        logits: Tensor = head(states[:, None])[:, 0]  # [B, 1, D], as the adapters of rows know whose they are
        return logits
    weight, bias = cast(nn.Linear, head).weight, cast(nn.Linear, head).bias
    few = len(states) <= FEW and bias is None
    return (weight @ states.T).T.contiguous() if few else product(states, weight, bias)


def choose(logits: Tensor, sampling: Sampling, drawn: Tensor) -> Tensor:
    """One token a row, [B] int64, from logits [B, V]: arg-max, or where cumulated mass passes the row's number of
    `drawn`, [B] float64 in 0..1. NOT_FINITE for a row that holds NaN, or whose best logit is infinite.

    Tokens are cumulated in the order of their ids, so which of two nearly equal ones is the better decides nothing.
    """
    best, place = logits.max(-1)  # NaN is larger than any number here
    if sampling.temperature > 0:
        # Less the best one before the division: any temperature leaves it at 0, and the others below or at -inf.
        scores = (logits.double() - best.double().unsqueeze(-1)) / sampling.temperature
        k = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
        if k < scores.shape[-1] or sampling.top_p < 1:
            kept, ids = scores.topk(k, dim=-1)  # falling
            share = kept.softmax(-1)
            kept = kept.masked_fill(share.cumsum(-1) - share >= sampling.top_p, -torch.inf)  # mass of the better ones
            scores = torch.full_like(scores, -torch.inf).scatter_(1, ids, kept)
        mass = scores.softmax(-1).cumsum(-1)
        total = mass[:, -1:].contiguous()
        place = torch.searchsorted(mass, drawn.unsqueeze(1) * total, right=True)  # the first above
        place = torch.minimum(place, torch.searchsorted(mass, total)).squeeze(1)  # rounding may put it past the last
    return place.masked_fill(~best.isfinite(), NOT_FINITE)
