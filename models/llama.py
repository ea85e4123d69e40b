"""Llama, what all families say in its words, and those that differ from it in a few: windows, norms, scales.

A value that would change the numbers and that the decoder does not compute is refused by key and value. Tensors are
called in checkpoints as modules are in the decoder, in every family.
"""

from collections.abc import Callable
from typing import Any

from ..errors import InputError
from .config import DROPOUTS, Settings
from .rope import read_rope
from .spec import Spec


def llama(keys: Settings) -> Spec:
    """Llama 2 and 3, SmolLM2: attention over all tokens."""
    if keys.get("use_sliding_window") is not False:
        keys.one_of("sliding_window", (None,), "null (attention sees all tokens)")
    layers = keys.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise keys.refusal("layer_types", "a list of 'full_attention' alone")
    return Spec(**common(keys), **biases(keys), mlp_bias=keys.flag("mlp_bias"))


def mistral(keys: Settings) -> Spec:
    """Mistral: every layer sees a window, where there is one."""
    return Spec(**common(keys), windows=window(keys, 4096))


def ministral(keys: Settings) -> Spec:
    """Ministral: some layers see a window, as `layer_types` says; without it all."""
    shared = common(keys)
    return Spec(**shared, windows=windows(keys, shared["num_hidden_layers"], lambda layer: True))


def smollm3(keys: Settings) -> Spec:
    """SmolLM3: every fourth layer, or those that `no_rope_layers` marks with 0, turns nothing."""
    layers, turned = keys.number("num_hidden_layers"), keys.get("no_rope_layers")
    every = keys.number("no_rope_layer_interval", default=4)
    turned = [int((layer + 1) % every != 0) for layer in range(layers)] if turned is None else turned
    if not isinstance(turned, list) or len(turned) != layers or any(one not in (0, 1) for one in turned):
        raise keys.refusal("no_rope_layers", f"a list of {layers} ones and zeros, one for each layer")
    slides = keys.flag("use_sliding_window")
    seen = windows(keys, layers, lambda layer: slides and not turned[layer], default=None)
    plain = tuple(layer for layer in range(layers) if not turned[layer])
    own = biases(keys) | {"mlp_bias": keys.flag("mlp_bias")}
    return Spec(**common(keys, tied=True, theta=2e6), **own, no_rope=plain, windows=seen)


def phi3(keys: Settings) -> Spec:
    """Phi-3 and Phi-4, mini too: one projection for q, k and v, one for gate and up, and LongRoPE."""
    return Spec(**common(keys, eps=1e-5, partial=True), fused=True, windows=window(keys))


def olmo2(keys: Settings) -> Spec:
    """OLMo 2: layers whose parts are normalised after them, and queries and keys over a token's whole row."""
    return Spec(**common(keys, eps=1e-5), **biases(keys), norms="after", qk_norm="row")


def granite(keys: Settings) -> Spec:
    """Granite 3, dense: embeddings, attention scores, residuals and logits are scaled."""
    return Spec(
        **common(keys),
        **biases(keys),
        mlp_bias=keys.flag("mlp_bias"),
        embedding_scale=keys.number("embedding_multiplier", default=1.0),
        attention_scale=keys.number("attention_multiplier", default=1.0),
        residual_scale=keys.number("residual_multiplier", default=1.0),
        logit_divisor=keys.number("logits_scaling", default=1.0),
    )


def qwen2(keys: Settings) -> Spec:
    """Qwen 2 and 2.5: biases of q, k and v."""
    return Spec(**_qwen(keys), attention_bias=True)


def qwen3(keys: Settings) -> Spec:
    """Qwen 3, dense: queries and keys are normalised."""
    return Spec(**_qwen(keys), **biases(keys), qk_norm="head")


def _qwen(keys: Settings) -> dict[str, Any]:
    """What both say: layers from `max_window_layers` on see a window, where `use_sliding_window` is true."""
    spec, seen = common(keys), tuple[int, ...]()
    if keys.flag("use_sliding_window"):
        first = 0 if keys.get("max_window_layers") == 0 else keys.number("max_window_layers", default=28)
        seen = windows(keys, spec["num_hidden_layers"], lambda layer: layer >= first)
    elif any(windows(keys, spec["num_hidden_layers"], lambda layer: False)):
        raise keys.refusal("use_sliding_window", "true where layer_types names sliding_attention")
    return spec | {"windows": seen}


def common(
    keys: Settings,
    *,
    activation: str = "hidden_act",
    eps: float = 1e-6,
    tied: bool = False,
    theta: float | None = 10000.0,
    partial: bool = False,
) -> dict[str, Any]:
    """The fields of a `Spec` that every family says in the same words.

    activation: the key of silu's name, or of gelu's. eps, tied, theta: what transformers takes where the file is
    silent; theta None: the RoPE is read by itself. partial: a share of a head may turn.
    Raises InputError naming the key and its value where a key is missing, malformed, too large or contradictory."""
    kinds = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    kind = keys.one_of(activation, (None, *kinds), " or ".join(map(repr, kinds)))
    for key in DROPOUTS:
        if keys.get(key) != 0:
            keys.number(key, default=0.0)
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    if keys.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"config: without head_dim, hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})."
        )
    head_dim = int(keys.number("head_dim", default=hidden // heads))
    return {
        **{key: keys.number(key) for key in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        **({"activation": kinds[kind]} if kind else {}),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", tied),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        **({} if theta is None else {"rope": read_rope(keys, head_dim, theta, partial=partial)}),
        "rms_norm_eps": keys.number("rms_norm_eps", default=eps),
        "max_position_embeddings": keys.number("max_position_embeddings", default=2048),
    }


def windows(keys: Settings, layers: int, sliding: Callable[[int], bool], default: int | None = 4096) -> tuple[int, ...]:
    """Of each layer the tokens that a query sees, 0: all; empty where every layer sees all. From `layer_types`, or
    where these are not there from `sliding`, of the layer's number; and from `sliding_window`, null: none slides.

    Where the file is silent the window is transformers' `default` for the family, None: as null."""
    kinds, names = keys.get("layer_types"), ("full_attention", "sliding_attention")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in names for kind in kinds):
            raise keys.refusal("layer_types", f"a list of {layers} of {' and '.join(names)}, one for each layer")
        slides = [kind == names[1] for kind in kinds]
    else:
        slides = [bool(keys.or_none("sliding_window", default)) and sliding(layer) for layer in range(layers)]
    silent = None if "sliding_window" in keys.data else default
    seen = keys.number("sliding_window", default=silent) if any(slides) else 0
    return tuple(seen if slide else 0 for slide in slides) if seen else ()


def window(keys: Settings, default: int = 0) -> tuple[int, ...]:
    """Of every layer the same: the tokens that `sliding_window` says; empty where it is null, or silent and `default`
    0."""
    seen = keys.or_none("sliding_window", default)
    return (seen,) * keys.number("num_hidden_layers") if seen else ()


def biases(keys: Settings) -> dict[str, Any]:
    """Those of q, k and v and of o, which `attention_bias` means together."""
    biased = keys.flag("attention_bias")
    return {"attention_bias": biased, "output_bias": biased}
