"""One decoder for every family: token ids in, logits out, on any device. What makes a family is data, a `Spec`.

Module names are those of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj`, ...), so weights load by name and
adapters trained here open elsewhere. The linears may be dense, 4-bit or wrapped by LoRA: this file only calls them.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.attention import Scores, causal_attention, visible_keys
from ..kernels.derivatives import transformed
from ..kernels.dispatch import bucketed, widened
from ..kernels.rms_norm import add_rms_norm, rms_norm
from ..kernels.rope import rope
from ..kernels.spans import Packed, Spans, segments, span_positions
from ..kernels.swiglu import geglu, swiglu
from ..lora.active import checkpointed
from ..lora.adapter import is_hooked
from ..lora.project import project, project_gated
from .cache import KVCache
from .families import read_spec
from .moe import Mixture
from .protocol import Cache, CausalLM
from .recompute import host_inputs, in_chunks, keeps, recomputed
from .rope import tables
from .spec import Rope, Spec

# Of attention and of feed-forward, the norm before it and the norm after it.
NORMS = {
    "before": (("input_layernorm", ""), ("post_attention_layernorm", "")),
    "after": (("", "post_attention_layernorm"), ("", "post_feedforward_layernorm")),
    "both": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}


@dataclass(frozen=True)
class _Pass:
    """What the layers of one forward pass share."""

    turns: Mapping[Rope, tuple[Tensor, Tensor]]  # cos and sin, [B, T, 1, dim / 2]
    spans: Packed | None
    visible: Mapping[int, Tensor | None]  # of each window, [B or 1, 1, T, S] bool; None: the window's plain causality
    cache: KVCache | None
    lean: bool = False  # cheap activations are made again in backward
    again: bool = False  # the layer runs again in backward
    keep: bool = False  # decoded weights stay for backward, which follows at once
    replay: bool = False  # it runs again now, for the tensors that it saves: nobody reads its output


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, or * (1 + weight)."""

    def __init__(self, size: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if plus_one else torch.ones(size))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.factor, self.eps)

    @property
    def factor(self) -> Tensor:
        """What the normalised x is multiplied by, [size]."""
        return 1 + widened(self.weight) if self.plus_one else self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}" + ", plus_one=True" * self.plus_one


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions, or with none."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__()
        queries = spec.num_attention_heads * spec.head_dim
        keys = spec.num_key_value_heads * spec.head_dim
        self.index, self.head_dim, self.fused, self.sizes = index, spec.head_dim, spec.fused, (queries, keys, keys)
        self.scores = Scores(spec.window(index), spec.attention_scale, spec.attention_softcap)
        turn = spec.local_rope if spec.local_rope and spec.window(index) else spec.rope
        self.rope = None if index in spec.no_rope else turn
        if spec.fused:
            self.qkv_proj = nn.Linear(spec.hidden_size, queries + 2 * keys, bias=spec.attention_bias)
        else:
            self.q_proj = nn.Linear(spec.hidden_size, queries, bias=spec.attention_bias)
            self.k_proj = nn.Linear(spec.hidden_size, keys, bias=spec.attention_bias)
            self.v_proj = nn.Linear(spec.hidden_size, keys, bias=spec.attention_bias)
            self.together = "q_proj", "k_proj", "v_proj"
        self.o_proj = nn.Linear(queries, spec.hidden_size, bias=spec.output_bias)
        self.row_norm, sizes = spec.qk_norm == "row", (queries, keys) if spec.qk_norm == "row" else (spec.head_dim,) * 2
        norms = [_norm(spec, size) if spec.qk_norm else nn.Identity() for size in sizes]
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        if self.fused:
            q, k, v = project(x, (self.qkv_proj,), keep=shared.keep)[0].split(self.sizes, dim=-1)
        else:
            q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), keep=shared.keep)
        if self.row_norm:
            q, k = self.q_norm(q).view(heads), self.k_norm(k).view(heads)
        else:
            q, k = self.q_norm(q.view(heads)), self.k_norm(k.view(heads))  # [B, T, H, D], [B, T, K, D]
        if self.rope is not None:
            q, k = (_turned(one, *shared.turns[self.rope]) for one in (q, k))
        v = v.view(heads)
        if shared.cache is not None:
            q, (k, v) = shared.cache.laid(q), shared.cache.append(self.index, k, v)
        visible = shared.visible[self.scores.window]
        heard = causal_attention(q, k, v, spans=shared.spans, visible=visible, scores=self.scores)
        heard = heard if shared.cache is None else shared.cache.taken(heard)
        return project(heard.flatten(2), (self.o_proj,), keep=shared.keep)[0]


class MLP(nn.Module):
    """down(f(gate(x)) * up(x)), with silu or gelu for f."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.fused = spec.fused
        if self.fused:
            self.gate_up_proj = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=spec.mlp_bias)
        else:
            self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
            self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
            self.together = "gate_proj", "up_proj"
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.gated = geglu if spec.activation == "gelu_tanh" else swiglu

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:
        if self.fused:
            gate, up = project(x, (self.gate_up_proj,), keep=shared.keep)[0].chunk(2, dim=-1)
        else:
            gate, up = project(x, (self.gate_proj, self.up_proj), keep=shared.keep)
        if (y := project_gated(gate, up, self.gated is geglu, self.down_proj, keep=shared.keep)) is not None:
            return y
        h = self.gated(gate, up)  # [B, T, intermediate]
        with recomputed(h, self.gated, gate, up, active=shared.lean):
            return project(h, (self.down_proj,), keep=shared.keep)[0]


class Layer(nn.Module):
    """One decoder block: attention, then feed-forward, each normalised before or after, and added back.

    Called with `y` it takes x + y, scaled as the residual is; with `apart` it gives the two terms of its own sum,
    (x, y): the norm that follows adds them in its own pass."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(spec, index)
        self.mlp = Mixture(spec) if spec.num_experts else MLP(spec)
        self.norms, self.residual_scale = NORMS[spec.norms], spec.residual_scale
        for name in filter(None, (*self.norms[0], *self.norms[1])):
            setattr(self, name, _norm(spec, spec.hidden_size))

    def forward(self, x: Tensor, shared: _Pass, y: Tensor | None = None, apart: bool = False) -> Any:  # [B, T, hidden]
        for part, (before, after) in zip((self.self_attn, self.mlp), self.norms, strict=True):
            norm = getattr(self, before) if before else None
            x, h = _added(x, y, norm, self.residual_scale)
            run = partial(self._part, part, getattr(self, after) if after else nn.Identity(), shared)
            with recomputed(h, norm, x, active=shared.lean) if norm else nullcontext():
                y = in_chunks(self, run, h, again=shared.again, unread=shared.replay) if part is self.mlp else run(h)
        return (x, y) if apart else _added(x, y, None, self.residual_scale)[0]

    def _part(self, part: nn.Module, after: nn.Module, shared: _Pass, h: Tensor) -> Tensor:
        y: Tensor = after(part(h, shared))
        return y


def _added(x: Tensor, y: Tensor | None, norm: nn.Module | None, scale: float) -> tuple[Tensor, Tensor]:
    """x plus a part's output y, if there is one yet, times `scale`, and that normalised."""
    if y is not None:
        y = y if scale == 1 else y * scale
        alone = norm if type(norm) is RMSNorm and not is_hooked(norm) else None
        if alone and (both := add_rms_norm(x, y, alone.factor, alone.eps)) is not None:
            return both
        x = x + y
    return x, norm(x) if norm else x


def _norm(spec: Spec, size: int) -> RMSNorm:
    return RMSNorm(size, spec.rms_norm_eps, spec.norm_plus_one)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] with its first dimensions turned, those that the tables [B, T, 1, dim / 2] are for."""
    dim = 2 * cos.shape[-1]
    return rope(x, cos, sin) if dim == x.shape[-1] else torch.cat((rope(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)


class Trunk(nn.Module):
    """Embedding, layers and final norm; the part that checkpoints call `model`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.num_hidden_layers))
        self.norm = _norm(spec, spec.hidden_size)


class Decoder(CausalLM):
    """A language model that computes what its `spec` says; the dropouts that a config names are not done in training.

    `checkpointing`: what each layer keeps for backward (`recompute.Keep`). `keep_decoded`: a layer that runs again
    keeps its 4-bit weights decoded until its backward is through, which saves decoding them once more and takes one
    layer's dense weights of memory (8B: 0.44 GB); None: on a GPU only."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.vocab_size, self.hidden_size = spec, spec.vocab_size, spec.hidden_size
        self.max_positions, self.logit_softcap = spec.max_position_embeddings, spec.logit_softcap
        self.keep_decoded: bool | None = None
        self.shares_prompts = spec.rope.kind not in ("dynamic", "longrope")  # which turn by the whole text's length
        self.forks_up_to = 1 << 62 if self.shares_prompts else spec.rope.original_max_position_embeddings
        self.restarts_at = spec.rope.original_max_position_embeddings if spec.rope.kind == "longrope" else 0
        self.model = Trunk(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, hidden_size]; arguments and errors as `CausalLM` says."""
        if not isinstance(cache, KVCache | None):
            raise TypeError(f"cache must be one that new_cache() made, got {type(cache).__name__}")
        _check(input_ids, spans, cache, mask)
        if cache is not None:
            cache.begin(input_ids, mask is not None, spans)
        if position_ids is None:
            position_ids = _positions(input_ids, spans, cache, mask)
        x: Tensor = self.model.embed_tokens(input_ids)  # [B, T, hidden]
        if self.spec.embedding_scale != 1:
            factor = torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device="cpu")  # rounded, as in training
            x = x * factor
        tokens = x.shape[1]
        more = bucketed(tokens, x) - tokens if cache is None and mask is None and (spans is None or len(x) == 1) else 0
        if more:  # places behind, that none of the tokens sees
            x, position_ids = F.pad(x, (0, 0, 0, more)), F.pad(position_ids, (0, more))
            spans = spans and (*spans, (tokens, tokens + more))
        training = torch.is_grad_enabled() and cache is None and not transformed()  # which know no checkpoints
        words = keeps(self.checkpointing if training else "all", len(self.model.layers))
        keep = x.device.type != "cpu" if self.keep_decoded is None else self.keep_decoded
        turns, visible = _turns(self.spec, position_ids, spans, x), _visible(self.spec, input_ids, cache, mask)
        alone = spans is not None and (cache is None or not cache.length)
        row = Packed(spans, x.shape[0] * x.shape[1], x.device) if spans is not None and alone else None
        shared = _Pass(turns, row, visible, cache)
        lean, first = replace(shared, lean=True), replace(shared, again=True, keep=keep)
        replay, sent = replace(first, replay=True), host_inputs(x) if "host" in words else nullcontext
        y, scale = None, self.spec.residual_scale
        for layer, word in zip(self.model.layers, words, strict=True):
            if word not in ("input", "host") and type(layer) is Layer and not is_hooked(layer):
                x, y = layer(x, lean if word == "products" else shared, y, apart=True)
                continue
            x, y = _added(x, y, None, scale)[0], None  # a layer that runs again keeps one tensor, a hook is shown one
            if word in ("input", "host"):
                with sent() if word == "host" else nullcontext():
                    x = checkpointed(layer, partial(layer, shared=first), x, again=partial(layer, shared=replay))
            else:
                x = layer(x, lean if word == "products" else shared)
        if cache is not None:
            cache.end()
        if more:
            x, y = x[:, :tokens], None if y is None else y[:, :tokens]
        made = _added(x, y, self.model.norm, scale)[1]
        return made if self.spec.logit_divisor == 1 else made / self.spec.logit_divisor

    def new_cache(self) -> KVCache:
        """An empty key-value cache."""
        return KVCache()

    def settings(self) -> dict[str, Any]:
        """The keys of `config.json` that the spec was read from. InputError where it was made or changed by hand."""
        config, tied = self.spec.config, self.spec.tie_word_embeddings  # of one file, whether it held a head decides
        if not config or replace(read_spec(config), tie_word_embeddings=tied) != self.spec:
            raise InputError("this model's Spec was made by hand, so no config.json says it: make it with read_spec")
        return dict(config)


def _turns(spec: Spec, position_ids: Tensor, spans: Spans | None, x: Tensor) -> dict[Rope, tuple[Tensor, Tensor]]:
    """cos and sin of each kind of layer."""
    kinds = dict.fromkeys(how for how in (spec.rope, spec.local_rope) if how is not None)
    longest = None
    if any(how.kind in ("dynamic", "longrope") for how in kinds):  # these ask how long a token's text is
        longest = position_ids.amax(1, keepdim=True) + 1  # [B, 1]
        if spans is not None:  # its own text, not the row
            texts = position_ids.flatten().tensor_split([span[0] for span in spans if len(span) == 2][1:])
            longest = torch.cat([(text.amax() + 1).expand_as(text) for text in texts]).view(position_ids.shape)
    return {how: tables(how, spec.head_dim, position_ids, longest, x) for how in kinds}


def _check(input_ids: Tensor, spans: Spans | None, cache: KVCache | None, mask: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
    if spans is not None and (mask is not None or (cache is not None and any(len(span) > 2 for span in spans))):
        raise ValueError("spans (packed rows) take no mask, and with a cache they do not fork")
    if spans is not None:
        segments(spans, input_ids.numel())  # before any work, not in the first layer
    shape = (input_ids.shape[0], input_ids.shape[1] + (0 if cache is None else cache.length))
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be [batch, cached + new tokens] = {shape}, got {tuple(mask.shape)}")


def _visible(spec: Spec, input_ids: Tensor, cache: KVCache | None, mask: Tensor | None) -> dict[int, Tensor | None]:
    """What each query sees, once for all layers of a window; None where causality and window say it all."""
    if mask is not None:
        how = input_ids.shape[1], mask.shape[1], mask, input_ids.device
        return {window: visible_keys(*how, window) for window in {0, *spec.windows}}
    return {window: None if cache is None else cache.seen(window) for window in {0, *spec.windows}}


def _positions(input_ids: Tensor, spans: Spans | None, cache: KVCache | None, mask: Tensor | None) -> Tensor:
    tokens, device = input_ids.shape[1], input_ids.device
    if mask is not None:
        return (mask.cumsum(1) - 1).clamp_(min=0)[:, -tokens:]
    if cache is not None:
        return cache.places
    if spans is not None:
        return span_positions(spans, device).view(input_ids.shape)
    return torch.arange(tokens, device=device).expand_as(input_ids)
