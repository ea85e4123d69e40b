"""A causal language model of transformers behind the protocol, so that everything here takes it as it is.

The only file that may import transformers, and only where a function needs it. No list of names says what an
architecture can do: what its code does with packed rows, padding, a cache and its output head is tried once, on a few
tokens, before anything relies on it; where it falls short, texts are run by themselves, which is right for all.
"""

import copy
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.attention import Spans, span_lengths, span_positions
from .protocol import Cache, CausalLM

# What code may raise that cannot do what is tried.
UNABLE = AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError


def is_transformers(model: object) -> bool:
    """Whether it is a model of transformers (which then is imported already)."""
    return any((kind.__module__, kind.__name__) == MODEL for kind in type(model).__mro__)


MODEL = "transformers.modeling_utils", "PreTrainedModel"


def as_causal_lm(model: object) -> Any:
    """A model of transformers as a `CausalLM` on the same modules; anything else as it is, for its taker to judge.
    Raises InputError for one that is no causal language model."""
    return TransformersLM(model) if is_transformers(model) else model


def settings_of(whole: Any) -> dict[str, Any]:
    """What config.json says of a model of transformers: not in which form its weights once were, and its class now."""
    said, stale = json.loads(whole.config.to_json_string()), ("dtype", "quantization_config")
    return {key: said[key] for key in said if key not in stale} | {"architectures": [type(whole).__name__]}


class TransformersLM(CausalLM):
    """`whole`, a model of transformers with a head, as a `CausalLM`.

    Its modules are this one's own, under their own names, and stay the other's: adapters that are put on either are on
    both, and their files open in PEFT. What is not asked for here (`config`, ...) is answered by `whole`.
    """

    shares_prompts = False  # windows and recurrent layers count a place that is hidden as one

    def __init__(self, whole: Any) -> None:
        super().__init__()
        body, head, config = _body(whole), whole.get_output_embeddings(), whole.config.get_text_config()
        if head is None or body is whole or config.is_encoder_decoder:
            raise InputError(f"{type(whole).__name__} is no causal language model: it has no body with a head on it")
        own = vars(self)
        own["whole"] = whole  # no child of this module: its children are
        own["_modules"], own["_parameters"], own["_buffers"] = whole._modules, whole._parameters, whole._buffers
        self.vocab_size, self.hidden_size = head.weight.shape
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self.source = str(whole.name_or_path or "")
        self._takes = {*inspect.signature(body.forward).parameters}
        self._found: dict[str, bool] = {}
        self.training = whole.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "whole" not in vars(self) or name.startswith("__"):
                raise
            return getattr(self.whole, name)

    # What trainers and generation ask for.

    @property
    def lm_head(self) -> nn.Module:  # type: ignore[override]  # read-only here
        """The output layer, where logits are what it gives; else the way that the model's own forward goes from it."""
        layer: nn.Module = self.whole.get_output_embeddings()
        return layer if self._can(self._head_is_plain) else Head(self.whole)

    @property
    def packs(self) -> bool:  # type: ignore[override]  # read-only here
        """Whether this architecture keeps texts apart that share a row."""
        return self._can(self._keeps_apart)

    @property
    def checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        kind = "activation" if hasattr(self.whole, "activation_checkpointing_enable") else "gradient"  # its older name
        if on and self.whole.supports_gradient_checkpointing:
            getattr(self.whole, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        elif self.checkpointing:
            getattr(self.whole, f"{kind}_checkpointing_disable")()

    def settings(self) -> dict[str, Any]:
        return settings_of(self.whole)

    def new_cache(self) -> Cache:
        return States(self) if self._can(self._continues) else History(self)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As `CausalLM` says. Texts that cannot share a row, and forked answers, are run in rows of their own."""
        if isinstance(cache, States | History) and spans is None:
            return cache.read(input_ids, mask)
        if cache is not None or (spans is not None and mask is not None):
            raise ValueError("a cache is one that new_cache() made; spans (packed rows) take neither cache nor mask")
        places = torch.arange(input_ids.numel(), device=input_ids.device)
        if mask is not None:
            grid = zip(places.view(input_ids.shape), mask, strict=True)
            return self._each([row[seen] for row, seen in grid], input_ids)
        if spans is None:
            return self.run(input_ids, position_ids)
        span_lengths(spans, len(places))  # ValueError before any work
        if self.packs and all(len(span) == 2 for span in spans):
            return self._packed(input_ids.view(1, -1), spans).view(*input_ids.shape, -1)
        forks = [(start, fork, *pair) for start, fork, *ends in spans for pair in pairwise([fork, *(ends or [fork])])]
        return self._each([torch.cat([places[s:fork], places[a:b]]) for s, fork, a, b in forks], input_ids)

    # How they are answered.

    def run(self, ids: Tensor, positions: Tensor | None = None, **more: Any) -> Tensor:
        """The body's last hidden states [B, T, D] of `ids` [B, T], with as much of the rest as its forward takes."""
        given = {"position_ids": positions, "use_cache": False, "return_dict": True} | more
        taken = {name: value for name, value in given.items() if value is not None and name in self._takes}
        states: Tensor = _body(self.whole)(input_ids=ids, **taken).last_hidden_state
        return states

    def _packed(self, ids: Tensor, spans: Spans) -> Tensor:
        """Hidden states of texts in one row [1, T], with the masks that transformers makes from where positions begin
        anew."""
        from transformers.masking_utils import create_masks_for_generate

        positions = span_positions(spans, ids.device)[None]
        like = torch.empty(*ids.shape, 1, dtype=self.dtype, device=ids.device)
        return self.run(
            ids, positions, attention_mask=create_masks_for_generate(self.config, like, None, None, positions)
        )

    def _each(self, texts: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Hidden states at the places of `ids` [B, T] when each text (its places, flattened) has a row of its own,
        padded on the right. A place in several has the first one's; one in none, what means nothing."""
        where, width = torch.zeros_like(ids).flatten(), max(map(len, texts))
        for row, text in reversed([*enumerate(texts)]):
            where[text] = torch.arange(row * width, row * width + len(text), device=ids.device)
        # Padded with a token of its own: another's activations might overflow.
        rows = torch.stack([torch.cat([text, text[:1].expand(width - len(text))]) for text in texts])
        return self.run(ids.flatten()[rows]).flatten(0, 1)[where].view(*ids.shape, -1)

    # What is tried once: on twelve tokens, in evaluation mode and without a gradient.

    @torch.no_grad()
    def _can(self, what: Any) -> bool:
        if what.__name__ not in self._found:
            training = [module for module in self.modules() if module.training]
            self.eval()
            self._found[what.__name__] = False
            try:
                self._found[what.__name__] = what(torch.arange(1, 13, device=self.device) % self.vocab_size)
            except UNABLE as error:
                if isinstance(error, InputError):
                    raise
            finally:
                for module in training:
                    module.training = True
        return self._found[what.__name__]

    def _head_is_plain(self, ids: Tensor) -> bool:
        """Whether logits are the output layer's. InputError for a model that is not causal, or whose logits are not to
        be had from its hidden states."""
        whole, states = self.whole, self.run(ids[None])
        if not _alike(self.run(ids[None, [0, 1, 2, 3, 4, 5, 0, 1]])[:, :6], states[:, :6]):
            raise InputError(f"{type(whole).__name__} lets tokens see what follows them, so it is no causal model")
        with suppress(*UNABLE):
            logits = whole(input_ids=ids[None], use_cache=False).logits
            plain = _alike(whole.get_output_embeddings()(states), logits)
            if plain or _alike(Head(whole)(states), logits):
                return plain
        raise InputError(
            f"{type(whole).__name__} makes its logits in a way that cannot be followed from its hidden states: give a "
            "loss of your own (fourbit.Run)"
        )

    def _keeps_apart(self, ids: Tensor) -> bool:
        """Two texts in a row: the second is what it is alone, and does not change with the first."""
        if "position_ids" not in self._takes:
            return False
        one, other = (
            self._packed(torch.cat([a, ids[5:]])[None], ((0, 5), (5, 12)))[:, 5:] for a in (ids[:5], ids[:5].flip(0))
        )
        return _alike(one, other, 8) and _alike(one, self.run(ids[None, 5:]))

    def _continues(self, ids: Tensor) -> bool:
        """Two texts padded on the left, put in another order with one twice, and continued by a token."""
        cache, order = States(self), torch.tensor([1, 0, 1], device=ids.device)
        mask = torch.arange(6, device=ids.device) >= torch.tensor([[3], [0]], device=ids.device)
        before = cache.read(ids[:6].repeat(2, 1), mask)[order, -1]
        cache.select(order)
        after = cache.read(ids[9:, None], torch.cat([mask[order], mask.new_ones(3, 1)], dim=1))[:, 0]
        texts = [torch.cat([ids[start:6], end[None]]) for start, end in zip((0, 3, 0), ids[9:], strict=True)]
        alone = [self.run(text[None])[0, -2:] for text in texts]
        return _alike(torch.stack([before, after], dim=1), torch.stack(alone))


def _body(whole: Any) -> Any:
    """The model without its head, whatever it is called; itself where it has none."""
    found = whole.base_model
    return found if found is not whole else next((child for child in whole.children() if is_transformers(child)), whole)


def _alike(a: Tensor, b: Tensor, part: int = 1) -> bool:
    """Whether rows of [..., D] differ by no more than rounding does on two ways to one result (a `part` of that)."""
    most, a, b = max(1e-3, 24 * torch.finfo(b.dtype).eps) / part, a.double(), b.double()
    return bool(((a - b).norm(dim=-1) <= most * b.norm(dim=-1)).all())


class Head(nn.Module):
    """Logits [..., V] of hidden states [..., D] the way the model's own forward makes them, with soft caps, scales and
    whatever follows the output layer: it is run on a twin of the model whose body gives back what it is given."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.layer, twin = whole.get_output_embeddings(), copy.copy(whole)
        vars(twin)["_modules"] = {n: Given(m) if m is _body(whole) else m for n, m in whole._modules.items()}
        vars(self)["twin"] = twin  # no child: its head is `layer`
        self.twin: Any
        self.out_features = self.layer.weight.shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.twin(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        return made.view(*hidden.shape[:-1], -1)


class Given(nn.Module):
    """In the place of a body: its last hidden states are what it is given. Whatever else is asked, the body answers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        vars(self)["body"] = body

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["body"], name)

    def forward(self, *_: object, inputs_embeds: Tensor, **other: object) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class States:
    """What transformers keeps of the tokens that were read: its own cache."""

    def __init__(self, model: TransformersLM) -> None:
        from transformers import DynamicCache

        self.model, self.length, self.states = model, 0, DynamicCache(config=model.config)

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states of `ids` [B, T] after what was read: after the first, recurrent layers take one at a time."""
        if self.length and ids.shape[1] > 1:
            steps = enumerate(ids.split(1, dim=1), self.length + 1)
            return torch.cat([self.read(one, None if mask is None else mask[:, :end]) for end, one in steps], dim=1)
        seen = mask if mask is not None else torch.ones(len(ids), self.length + ids.shape[1], device=ids.device)
        positions = (seen.cumsum(1) - 1).clamp_(min=0)[:, self.length :].long()
        self.length = seen.shape[1]
        kept = {"past_key_values": self.states, "cache_params": self.states, "use_cache": True}
        return self.model.run(ids, positions, attention_mask=None if mask is None else mask.long(), **kept)

    def select(self, rows: Tensor) -> None:
        self.states.reorder_cache(rows)  # type: ignore[arg-type]  # int64 is what it asks for


class History:
    """The tokens that were read, where the model's own cache falls short: all of them are run again each time."""

    def __init__(self, model: TransformersLM) -> None:
        self.model, self.ids = model, torch.empty(0)

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        self.ids = torch.cat([self.ids, ids], dim=1) if self.ids.numel() else ids
        mask = torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask
        return self.model.hidden(self.ids, mask=mask)[:, -ids.shape[1] :]

    def select(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]
