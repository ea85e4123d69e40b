"""The Llama decoder (SmolLM2, Llama 2, Llama 3): token ids in, logits out, on any device.

Module names are those of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj`, ...), so weights load by name and
adapters trained here open elsewhere. The linears may be dense, 4-bit or wrapped by LoRA: this file only calls them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import rope
from ..kernels.attention import Spans, attention, span_lengths, span_positions, visible_keys
from ..kernels.rms_norm import rms_norm
from ..kernels.swiglu import swiglu
from ..lora.project import project
from .llama_config import LlamaConfig as LlamaConfig
from .llama_config import RopeScaling as RopeScaling
from .recompute import recomputed


class Cache(Protocol):
    """What the decoder asks of a key-value cache (`models.cache.KVCache`)."""

    length: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, T, K, D] after the tokens seen so far; return that layer's, [B, length + T, K, D]."""

    def advance(self, tokens: int) -> None:
        """Count the tokens just appended to every layer."""


@dataclass(frozen=True)
class _Pass:
    """What the layers of one forward pass share."""

    cos: Tensor  # [B, T, 1, head_dim / 2]
    sin: Tensor
    spans: Spans | None
    visible: Tensor | None  # [B or 1, 1, T, S] bool; None: plain causality
    cache: Cache | None
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

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.index, self.head_dim = index, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), keep=shared.keep)
        q = rope.rope(q.view(heads), shared.cos, shared.sin)  # [B, T, H, D]
        k = rope.rope(k.view(heads), shared.cos, shared.sin)  # [B, T, K, D]
        v = v.view(heads)
        if shared.cache is not None:
            k, v = shared.cache.append(self.index, k, v)
        heard = attention(q, k, v, spans=shared.spans, visible=shared.visible).flatten(2)
        return project(heard, (self.o_proj,), keep=shared.keep)[0]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj), keep=shared.keep)
        h = swiglu(gate, up)  # [B, T, intermediate]
        with recomputed(h, swiglu, gate, up, active=shared.lean):
            return project(h, (self.down_proj,), keep=shared.keep)[0]


class Layer(nn.Module):
    """One decoder block: attention, then feed-forward, each normalised before and added back."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, shared: _Pass) -> Tensor:  # [B, T, hidden]
        h = self.input_layernorm(x)
        with recomputed(h, self.input_layernorm, x, active=shared.lean):
            x = x + self.self_attn(h, shared)
        h = self.post_attention_layernorm(x)
        with recomputed(h, self.post_attention_layernorm, x, active=shared.lean):
            return x + self.mlp(h, shared)


class Decoder(nn.Module):
    """Embedding, layers and final norm; the part that checkpoints call `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama language model.

    `checkpointing`: when True, training keeps only each layer's input and recomputes the layer in backward (dropout
    repeats exactly). `keep_decoded`: the recomputed layer then keeps its 4-bit weights decoded until its backward is
    through, which saves decoding them once more and takes one layer's dense weights of memory (8B: 0.44 GB); by default
    (None) on a GPU only.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.keep_decoded: bool | None = None
        self.source = ""  # where the weights came from; `load` sets it
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] for `input_ids` [B, T] int64; the other arguments as in `hidden`."""
        logits: Tensor = self.lm_head(self.hidden(input_ids, position_ids, spans, cache, mask))
        return logits

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, hidden_size].

        `position_ids` [B, T]: default counts from 0 in every row or span, from the cache's length on, or over a mask's
        True places. `spans`: (start, end) pairs over the flattened B * T tokens, in order and without gaps: examples of
        a packed row, each attended alone; (start, fork, end_1, ..., end_n) is one text with n continuations, whose
        positions all go on from the fork. None is one causal text a row (right padding needs no mask). `mask` [B, S]
        bool over cached and new tokens: False hides left padding. `cache` is read and extended. Spans exclude mask and
        cache. ValueError where these do not fit together.
        """
        _check(input_ids, spans, cache, mask)
        if position_ids is None:
            position_ids = _positions(input_ids, spans, cache, mask)
        x: Tensor = self.model.embed_tokens(input_ids)  # [B, T, hidden]
        training = torch.is_grad_enabled() and cache is None
        recompute = training and self.checkpointing
        tables, visible = self._rope_tables(position_ids, x), _visible(input_ids, cache, mask)
        keep = recompute and (x.is_cuda if self.keep_decoded is None else self.keep_decoded)
        shared = _Pass(*tables, spans, visible, cache, lean=training and not recompute, keep=keep)
        for layer in self.model.layers:
            if recompute:
                x = checkpoint(layer, x, shared, use_reentrant=False, preserve_rng_state=True)
            else:
                x = layer(x, shared)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        y: Tensor = self.model.norm(x)
        return y

    def _rope_tables(self, position_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for all layers: computed in fp32 (fp64 for float64 models), then in the activations' dtype."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = rope.tables(position_ids, rope_frequencies(self.config, wide, x.device))
        return cos.to(x.dtype), sin.to(x.dtype)


def rope_frequencies(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The model's rotary frequencies with its scaling applied, [head_dim / 2], radians a position."""
    frequency = rope.frequencies(config.head_dim, config.rope_theta, dtype=dtype, device=device)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    return rope.llama3_frequencies(
        frequency,
        factor=scaling.factor,
        low=scaling.low_freq_factor,
        high=scaling.high_freq_factor,
        original_length=scaling.original_max_position_embeddings,
    )


def _check(input_ids: Tensor, spans: Spans | None, cache: Cache | None, mask: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
    if spans is not None and (cache is not None or mask is not None):
        raise ValueError("spans (packed rows) take neither a cache nor a mask")
    if spans is not None:
        span_lengths(spans, input_ids.numel())  # before any work, not in the first layer
    total = input_ids.shape[1] + (0 if cache is None else cache.length)
    if mask is not None and mask.shape != (input_ids.shape[0], total):
        raise ValueError(
            f"mask must be [batch, cached + new tokens] = {(input_ids.shape[0], total)}, got {tuple(mask.shape)}"
        )


def _visible(input_ids: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor | None:
    """What each query sees, once for all layers; None where plain causality says it (no cache, or one new token)."""
    tokens = input_ids.shape[1]
    cached = 0 if cache is None else cache.length
    if mask is None and (cached == 0 or tokens == 1):
        return None
    return visible_keys(tokens, cached + tokens, mask, input_ids.device)


def _positions(input_ids: Tensor, spans: Spans | None, cache: Cache | None, mask: Tensor | None) -> Tensor:
    tokens, device = input_ids.shape[1], input_ids.device
    if mask is not None:
        return (mask.cumsum(1) - 1).clamp_(min=0)[:, -tokens:]
    if spans is not None:
        return span_positions(spans, device).view(input_ids.shape)
    first = 0 if cache is None else cache.length
    return torch.arange(first, first + tokens, device=device).expand_as(input_ids)
