"""Rows of tokens that are trained by themselves: of an embedding, and of the head onto the same vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, shown
from ..kernels.dispatch import autocast_input
from .adapter import Adapter
from .linear4bit import Module4bit, NF4Embedding, weight_id
from .lora import is_linear
from .targets import base_modules, matcher, nearest, vocabulary_heads

INPUT = ""  # what stands for the embedding of the vocabulary among names of modules


class TokenRows(Adapter):
    """An embedding or head with own rows [n, dim] for `tokens`, in place of its weight's, from which they start.

    They are whole rows, as in PEFT's files (trainable_token_indices), which call them delta. leader: the part of the
    embedding that a head is tied to, whose rows are this one's too. InputError for ids that are none, or come twice.
    """

    ids: Tensor
    trainable_tokens_delta: nn.Parameter

    def __init__(self, base: nn.Module, tokens: Sequence[int], leader: "TokenRows | None" = None) -> None:
        super().__init__()
        weight, self.tokens, self.follows = cast(Tensor, base.weight), tuple(tokens), leader is not None
        if len({*tokens}) < len(tokens) or not 0 <= min(tokens) <= max(tokens) < weight.shape[0]:
            raise InputError(f"train_tokens must be ids below {weight.shape[0]}, each once, got {shown(list(tokens))}")
        self.register_buffer("ids", torch.tensor(self.tokens, device=weight.device), persistent=False)
        rows = base.dequantize(index=self.ids) if isinstance(base, Module4bit) else weight.detach()[self.ids]
        self.trainable_tokens_delta = nn.Parameter(rows.clone()) if leader is None else leader.trainable_tokens_delta

    def over(self, x: Tensor, base: nn.Module) -> Tensor:
        y, rows = base(x), self.trainable_tokens_delta
        if is_linear(base):
            x, bias = autocast_input(x), None if base.bias is None else cast(Tensor, base.bias)[self.ids]
            return y.index_copy(-1, self.ids, F.linear(x, rows.to(x.dtype), bias).to(y.dtype))
        same, padding = x[..., None].eq(self.ids), getattr(base, "padding_idx", None)
        place = self.tokens.index(padding) if padding in self.tokens else None  # of the row without a gradient
        scale = float(getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0)))
        made = scale * F.embedding(same.int().argmax(-1), rows, place)
        return torch.where(same.any(-1, keepdim=True), made.to(y.dtype), y)

    def delta(self, weight: Tensor) -> Tensor:
        rows = self.trainable_tokens_delta.to(weight.dtype)
        return torch.zeros_like(weight).index_copy(0, self.ids, rows - weight[self.ids])

    def state(self) -> dict[str, Tensor]:
        return {} if self.follows else {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta.detach()}


def token_rows(model: nn.Module, wanted: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, TokenRows]:
    """Path -> part: ids for the embedding of the vocabulary and its head, or by name; what is tied has one part's rows.

    Raises InputError for a name that matches no embedding or head, and for different ids of one tied weight.
    """
    modules: Mapping[str, Any] = base_modules(model)
    tables = [path for path, module in modules.items() if isinstance(module, nn.Embedding | NF4Embedding)]
    there, ids = [*tables, *vocabulary_heads(model)], dict[int, Sequence[int]]()
    by_name = wanted if isinstance(wanted, Mapping) else dict.fromkeys((INPUT, *there[len(tables) :]), wanted)
    for entry, tokens in by_name.items():
        input = [max(tables, key=lambda path: modules[path].weight.shape[0])] if tables and entry == INPUT else []
        if not (meant := input or [*filter(matcher([entry]), there)]):
            raise InputError(f"train_tokens names {entry!r}, no embedding or head.{nearest(entry, there)}")
        for path in meant:
            if ids.setdefault(weight_id(modules[path]), tokens) != tokens:
                raise InputError(f"'{path}' is tied to what train_tokens gives other ids: give both the same")
    leaders, parts = dict[int, TokenRows](), dict[str, TokenRows]()
    for path, key in [(path, key) for path in there if (key := weight_id(modules[path])) in ids]:
        parts[path] = TokenRows(modules[path], ids[key], leaders.get(key))
        leaders.setdefault(key, parts[path])
    return parts
