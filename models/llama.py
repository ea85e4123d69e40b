"""The Llama family (SmolLM2, Llama 2, Llama 3): its `config.json` to a `Spec`, and back.

A value that would change the numbers and that the decoder does not compute (an unknown RoPE type, another activation, a
sliding window) is refused by key and value. Tensors are called in checkpoints as modules are in the decoder.
"""

from dataclasses import asdict
from typing import Any

from ..errors import InputError, shown
from .config import Settings, head_dim, rope
from .float8 import check_quantization
from .spec import ROPE_KEYS, Spec


def read(keys: Settings) -> Spec:
    """A Spec from the keys of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises InputError naming the key and its value where a key is missing, malformed, too large, contradictory or asks
    for something the decoder does not compute.
    """
    if "hidden_act" in keys.data:
        keys.one_of("hidden_act", ("silu", "swish"), "'silu'")
    keys.one_of("attention_dropout", (None, 0), "0 (fourbit trains without it; set it to 0)")
    if keys.get("use_sliding_window") is not False:
        keys.one_of("sliding_window", (None,), "null (attention sees all tokens)")
    layers = keys.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise InputError(f"{keys.where}: layer_types must all be 'full_attention', got {shown(layers)}.")
    check_quantization(keys.data, keys.where)
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    theta, scaling = rope(keys)
    return Spec(
        **{key: keys.number(key) for key in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        **{key: keys.flag(key) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")},
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=keys.number("num_key_value_heads", default=heads),
        head_dim=head_dim(keys, hidden, heads),
        model_type="llama",
        rms_norm_eps=keys.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=keys.number("max_position_embeddings", default=2048),
    )


def write(spec: Spec) -> dict[str, Any]:
    """The keys of a `config.json` that says this Spec, as transformers 4 and 5 both read them."""
    keys, scaling = asdict(spec), spec.rope_scaling
    del keys["qk_norm"]
    if scaling is not None:
        keys["rope_scaling"] = {"rope_type": scaling.kind} | {k: getattr(scaling, k) for k in ROPE_KEYS[scaling.kind]}
    return keys | {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
