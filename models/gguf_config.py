"""What a GGUF's metadata say about a Llama, as a `Spec`.

A key that changes the computation in a way we do not support is refused, never ignored. Whether the tensors are those
that the Spec asks for is checked where any checkpoint's are, in `load.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .config import LIMITS, Settings
from .spec import RopeScaling, Spec

# Keys of llama.cpp that change what a llama computes, with the value that leaves it plain.
_MUST_BE_NEUTRAL = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "use_parallel_residual": True,
}


def read(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: list[float] | None
) -> Spec:
    """The Spec of the Llama in a GGUF file.

    path: the file, for messages. shapes: of its weights, by their names in a Hugging Face checkpoint. factors: the
    values of the tensor `rope_freqs` (each frequency is divided by its factor), if there.
    Raises InputError for another architecture, a missing or impossible key, or a feature that is not supported.
    """
    whole, keys = Settings(metadata, str(path)), Settings(metadata, str(path), prefix="llama.")
    _check_kind(whole, keys, shapes)
    hidden = keys.integer("embedding_length", LIMITS["hidden_size"])
    heads = keys.integer("attention.head_count", LIMITS["num_attention_heads"])
    kv_heads = keys.integer("attention.head_count_kv", LIMITS["num_key_value_heads"], default=heads)
    if heads % kv_heads:
        raise keys.refusal("attention.head_count", f"a multiple of llama.attention.head_count_kv ({kv_heads})")
    head_dim, theta = _head_dim(keys, hidden // heads), _decimal(keys.number("rope.freq_base", 1e15, default=10000.0))
    return Spec(
        vocab_size=_vocabulary(whole, shapes),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length", LIMITS["intermediate_size"]),
        num_hidden_layers=_layers(keys, len(shapes)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_decimal(keys.number("attention.layer_norm_rms_epsilon", 1.0)),
        rope_theta=theta,
        rope_scaling=_rope_scaling(keys, factors, theta, head_dim),
        max_position_embeddings=keys.integer("context_length", LIMITS["max_position_embeddings"]),
        tie_word_embeddings="lm_head.weight" not in shapes,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in shapes,
    )


def _decimal(value: float) -> float:
    """The shortest decimal of an fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _check_kind(whole: Settings, keys: Settings, shapes: Mapping[str, Any]) -> None:
    """A whole, plain, causal Llama and nothing else: to ignore a feature is to build a model that is subtly wrong."""
    if whole.get("general.architecture") != "llama":
        raise whole.refusal("general.architecture", "'llama', the one that can be read from GGUF")
    if whole.get("general.type") not in (None, "model"):
        raise whole.refusal("general.type", "'model' (give the file of the model itself)")
    if whole.get("split.count") not in (None, 0, 1):
        raise whole.refusal("split.count", "1 (join the files of the model first: llama-gguf-split --merge)")
    for name, neutral in _MUST_BE_NEUTRAL.items():
        if keys.get(name) not in (None, neutral):
            raise keys.refusal(name, f"{neutral} (anything else is a model that is not supported)")
    if not any(name.startswith("model.layers.") for name in shapes):
        raise InputError(f"{whole.where}: it holds no decoder layer (a vocabulary-only file?).")


def _layers(keys: Settings, tensors: int) -> int:
    layers = keys.integer("block_count", LIMITS["num_hidden_layers"])
    if layers > tensors:
        raise keys.refusal("block_count", f"at most {tensors}, the tensors in the file")
    return layers


def _head_dim(keys: Settings, share: int) -> int:
    """The size of a head: rotary over all of it, the same for keys and values, even."""
    names = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    rotary = keys.integer(names[0], LIMITS["head_dim"], default=share)
    for name in names:
        if keys.integer(name, LIMITS["head_dim"], default=rotary) != rotary or rotary % 2 or not rotary:
            raise keys.refusal(name, f"even, and as large as the part of a head that is turned ({rotary})")
    return rotary


def _vocabulary(whole: Settings, shapes: Mapping[str, tuple[int, ...]]) -> int:
    vocabulary = shapes.get("model.embed_tokens.weight", (1,))[0]  # where it is missing, that will be said
    tokens = whole.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocabulary:
        raise InputError(
            f"{whole.where}: tokenizer.ggml.tokens holds {len(tokens)} tokens but 'token_embd.weight' has "
            f"{vocabulary} rows."
        )
    return vocabulary


def _rope_scaling(keys: Settings, factors: list[float] | None, theta: float, head_dim: int) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise keys.refusal("rope.scaling.type", "none or linear (Llama 3's is a tensor)")
    linear = RopeScaling("linear", _decimal(keys.number("rope.scaling.factor", 1e6))) if kind == "linear" else None
    if factors is None or all(factor == 1.0 for factor in factors):
        return linear
    if linear:
        raise keys.refusal("rope.scaling.type", "none beside a tensor 'rope_freqs'")
    scaling = llama3_scaling(factors, theta, head_dim)
    if scaling is None:
        raise InputError(
            f"{keys.where}: the factors in tensor 'rope_freqs' follow no Llama 3 rule, and no other kind is supported."
        )
    return scaling


def llama3_scaling(factors: list[float], theta: float, head_dim: int) -> RopeScaling | None:
    """The Llama 3 parameters that give these frequency divisors; None if none do.

    llama.cpp stores only the divisors f. Between the two ends of the band 1/f is linear in the frequency, which gives
    back the band up to a common scale (fixed by low_freq_factor = 1). Llama 3's own numbers are tried first, since a
    small head may have too few frequencies in the band. Whatever comes out must reproduce every divisor to 1e-4.
    """
    stored = np.asarray(factors, dtype=np.float64)
    if len(stored) != head_dim // 2 or not np.isfinite(stored).all() or stored.max() <= 1.0 or stored.min() < 1.0:
        return None
    factor = _decimal(stored.max())
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # full turns a token
    bands = [(4.0, 8192)]
    inside = (stored > 1.0) & (stored < stored.max())
    if inside.sum() >= 2:
        share = (1 / stored[inside] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(turns[inside], share, 1)
        if slope > 0 and intercept < 0:
            high = max(1.001, round(1 - 1 / intercept, 3))
            bands.append((high, max(1, round(slope * (high - 1)))))
    for high, original in bands:
        blend = np.clip((original * turns - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - blend) / factor + blend), stored, rtol=1e-4, atol=0):
            return RopeScaling("llama3", factor, 1.0, high, original)
    return None
