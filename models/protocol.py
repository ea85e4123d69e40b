"""What trainers, generation, evaluation and adapters may ask of a model: this list and nothing else.

`decoder.Decoder` is ours, `foreign.TransformersLM` transformers'; another, or a test's toy, is one as a subclass.
It is a class and not a `typing.Protocol` because torch's own functions want an `nn.Module`. Adapters ask for no more
than a module's tree of `nn.Linear` and `NF4Linear` layers.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.spans import Spans
from ..lora.active import evaluating as evaluating
from ..lora.adapter import Adapter
from ..lora.linear4bit import Module4bit
from .recompute import Checkpointing


class Cache(Protocol):
    """What a model keeps of the tokens it has seen; made by its `new_cache`, read and extended by its `hidden`."""

    def select(self, rows: Tensor) -> None:
        """Take the rows with the given indices (int64), in that order; a repeated one is continued in several ways."""


class SoftCapped(nn.Module):
    """c tanh(head(x) / c)."""

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap, self.out_features = head, cap, getattr(head, "out_features", None)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return self.cap * torch.tanh(logits / self.cap)


class CausalLM(nn.Module, ABC):
    """A causal language model: hidden states, and a head that turns them into logits."""

    lm_head: nn.Module
    """The output head: an `nn.Linear`, or what stands in for one and has its `out_features` (hidden -> logits)."""

    logit_softcap: float = 0.0
    """c, where the head's output x becomes c tanh(x / c), as in Gemma 2; 0: nowhere."""

    vocab_size: int
    """Logits of a token, and one more than the largest token id."""

    hidden_size: int
    """Size of a hidden state."""

    max_positions: int | None = None
    """Tokens that a text may have, as the model's makers say; None where they do not."""

    checkpointing: Checkpointing = False
    """Trainers set it: what each layer keeps for backward, and what is made again there. It may have no effect."""

    packs: bool = True
    """Whether it keeps examples apart that share a row; where not, `hidden` gives each a row, and trainers pad."""

    shares_prompts: bool = True
    """Whether a text's beginning is read alike however long the text is: generation then reads common ones once."""

    forks_up_to: int = 1 << 62
    """Tokens up to which texts that begin alike may fork from a trunk; longer ones are read otherwise (long RoPE)."""

    restarts_at: int = 0
    """Tokens beyond which a text is read anew from its start: what a cache holds of it is stale then; 0: never."""

    source: str = ""
    """Where the weights came from (a path), for messages and for what an adapter's files say of their base."""

    @abstractmethod
    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What `lm_head` takes, after any final norm: [B, T, hidden_size] for `input_ids` [B, T] int64.

        `position_ids` [B, T]: default counts from 0 in every row or span, from the cache's length on, or over a mask's
        True places. `spans`: (start, end) pairs over the flattened B * T tokens, in order and without gaps: texts of a
        packed row, each attended alone; (start, end, p) goes on from the end of the earlier span number p (see
        `kernels.spans.Spans`). None is one causal text a row (right padding needs no mask). `mask` [B, S] bool over
        cached and new tokens: False hides left padding. `cache` is read and extended. Spans exclude a mask, and a cache
        but a `KVCache`, whose row i goes on with span i, which does not fork. ValueError where these do not fit
        together."""

    @abstractmethod
    def new_cache(self) -> Cache:
        """An empty cache for generation, for any number of rows."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What `config.json` says of this model: with the weights, all that its numbers depend on. Plain JSON values.

        Written when the whole model is saved; part of what tells reference caches apart."""

    def head(self, lm_head: nn.Module | None = None) -> nn.Module:
        """What makes logits of hidden states: `lm_head`, or the one given in its place, and the soft cap."""
        own = self.lm_head if lm_head is None else lm_head
        return SoftCapped(own, self.logit_softcap) if self.logit_softcap else own

    @property
    def device(self) -> torch.device:
        """Where the weights are, and inputs have to be."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weights that are neither in 4 bits nor an adapter's; hidden states have it too."""
        other = {id(p) for m in self.modules() if isinstance(m, Module4bit) for p in m.stored_parameters().values()}
        other |= {id(p) for m in self.modules() if isinstance(m, Adapter) for p in m.parameters()}
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in other)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size]; the arguments are those of `hidden`."""
        logits: Tensor = self.head()(self.hidden(input_ids, position_ids, spans, cache, mask))
        return logits
