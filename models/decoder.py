"""One decoder for every family: token ids in, logits out, on any device. What makes a family is data, a `Spec`.

Module names are those of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj`, ...), so weights load by name and
adapters trained here open elsewhere. The linears may be dense, 4-bit or wrapped by LoRA: this file only calls them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import rope
from ..kernels.attention import Spans, causal_attention, span_lengths, span_positions, visible_keys
from ..kernels.dispatch import bucketed
from ..kernels.rms_norm import rms_norm
from ..kernels.swiglu import swiglu
from ..lora.adapter import project
from .families import write_spec
from .protocol import Cache, CausalLM
from .recompute import recomputed
from .spec import Spec

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


@dataclass(frozen=True)
class _Pass:
    """What the layers of one forward pass share."""

    cos: Tensor  # [B, T, 1, head_dim / 2]
    sin: Tensor
    spans: Spans | None
    visible: Tensor | None  # [B or 1, 1, T, S] bool; None: plain causality
    cache: KVCache | None
    lean: bool  # training without checkpointing: cheap activations are made again in backward
    keep: bool  # decoded weights stay for backward, which follows at once


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__()
        queries = spec.num_attention_heads * spec.head_dim
        keys = spec.num_key_value_heads * spec.head_dim
        self.index, self.head_dim = index, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, queries, bias=spec.attention_bias)
        self.k_proj = nn.Linear(spec.hidden_size, keys, bias=spec.attention_bias)
        self.v_proj = nn.Linear(spec.hidden_size, keys, bias=spec.attention_bias)
        self.o_proj = nn.Linear(queries, spec.hidden_size, bias=spec.attention_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else nn.Identity()

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), keep=shared.keep)
        q = rope.rope(self.q_norm(q.view(heads)), shared.cos, shared.sin)  # [B, T, H, D]
        k = rope.rope(self.k_norm(k.view(heads)), shared.cos, shared.sin)  # [B, T, K, D]
        v = v.view(heads)
        if shared.cache is not None:
            k, v = shared.cache.append(self.index, k, v)
        heard = causal_attention(q, k, v, spans=shared.spans, visible=shared.visible).flatten(2)
        return project(heard, (self.o_proj,), keep=shared.keep)[0]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj), keep=shared.keep)
        h = swiglu(gate, up)  # [B, T, intermediate]
        with recomputed(h, swiglu, gate, up, active=shared.lean):
            return project(h, (self.down_proj,), keep=shared.keep)[0]


class Layer(nn.Module):
    """One decoder block: attention, then feed-forward, each normalised before and added back."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(spec, index)
        self.mlp = MLP(spec)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:  # [B, T, hidden]
        h = self.input_layernorm(x)
        with recomputed(h, self.input_layernorm, x, active=shared.lean):
            x = x + self.self_attn(h, shared)
        h = self.post_attention_layernorm(x)
        with recomputed(h, self.post_attention_layernorm, x, active=shared.lean):
            return x + self.mlp(h, shared)


class Trunk(nn.Module):
    """Embedding, layers and final norm; the part that checkpoints call `model`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(CausalLM):
    """A language model that computes what its `spec` says.

    `checkpointing`: training keeps only each layer's input and recomputes the layer in backward (dropout repeats
    exactly). `keep_decoded`: a recomputed layer keeps its 4-bit weights decoded until its backward is through, which
    saves decoding them once more and takes one layer's dense weights of memory (8B: 0.44 GB); None: on a GPU only.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.vocab_size, self.hidden_size = spec, spec.vocab_size, spec.hidden_size
        self.max_positions = spec.max_position_embeddings
        self.keep_decoded: bool | None = None
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
        if position_ids is None:
            position_ids = _positions(input_ids, spans, cache, mask)
        tokens = input_ids.shape[1]
        x: Tensor = self.model.embed_tokens(input_ids)  # [B, T, hidden]
        alone = cache is None and mask is None and (spans is None or len(input_ids) == 1)
        if alone and (more := bucketed(tokens, x) - tokens):  # padding, which no token sees
            x, position_ids = F.pad(x, (0, 0, 0, more)), F.pad(position_ids, (0, more))
            spans = spans and [*spans[:-1], (*spans[-1][:-1], tokens + more)]
        training = torch.is_grad_enabled() and cache is None
        recompute = training and self.checkpointing
        keep = recompute and (x.is_cuda if self.keep_decoded is None else self.keep_decoded)
        tables, visible = _rope_tables(self.spec, position_ids, x), _visible(input_ids, cache, mask)
        shared = _Pass(*tables, spans, visible, cache, lean=training and not recompute, keep=keep)
        for layer in self.model.layers:
            if recompute:
                x = checkpoint(layer, x, shared, use_reentrant=False, preserve_rng_state=True)
            else:
                x = layer(x, shared)
        if cache is not None:
            cache.length += input_ids.shape[1]
        y: Tensor = self.model.norm(x)
        return y[:, :tokens]

    def new_cache(self) -> KVCache:
        """An empty key-value cache."""
        return KVCache(self.spec.num_hidden_layers)

    def settings(self) -> dict[str, Any]:
        """The keys of `config.json`. InputError where the family's words cannot say the spec."""
        return write_spec(self.spec)


def _rope_tables(spec: Spec, position_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for all layers: computed in fp32 (fp64 for float64 models), then in the activations' dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = rope.frequencies(spec.head_dim, spec.rope_theta, dtype=wide, device=x.device)
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        band = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
        frequency = rope.llama3_frequencies(frequency, scaling.factor, *band)
    cos, sin = rope.tables(position_ids, frequency)
    return cos.to(x.dtype), sin.to(x.dtype)


def _check(input_ids: Tensor, spans: Spans | None, cache: KVCache | None, mask: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
    if spans is not None and (cache is not None or mask is not None):
        raise ValueError("spans (packed rows) take neither a cache nor a mask")
    if spans is not None:
        span_lengths(spans, input_ids.numel())  # before any work, not in the first layer
    shape = (input_ids.shape[0], input_ids.shape[1] + (0 if cache is None else cache.length))
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be [batch, cached + new tokens] = {shape}, got {tuple(mask.shape)}")


def _visible(input_ids: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor | None:
    """What each query sees, once for all layers; None where plain causality says it (no cache, or one new token)."""
    tokens = input_ids.shape[1]
    cached = 0 if cache is None else cache.length
    if mask is None and (cached == 0 or tokens == 1):
        return None
    return visible_keys(tokens, cached + tokens, mask, input_ids.device)


def _positions(input_ids: Tensor, spans: Spans | None, cache: KVCache | None, mask: Tensor | None) -> Tensor:
    tokens, device = input_ids.shape[1], input_ids.device
    if mask is not None:
        return (mask.cumsum(1) - 1).clamp_(min=0)[:, -tokens:]
    if spans is not None:
        return span_positions(spans, device).view(input_ids.shape)
    first = 0 if cache is None else cache.length
    return torch.arange(first, first + tokens, device=device).expand_as(input_ids)
