"""Llama and those that differ from it in windows or layers without positions: SmolLM2, SmolLM3, Mistral, Ministral.

A value that would change the numbers and that the decoder does not compute is refused by key and value. Tensors are
called in checkpoints as modules are in the decoder, in every family.
"""

from typing import Any

from .config import Settings, common, windows
from .rope import read_rope
from .spec import Spec


def llama(keys: Settings) -> Spec:
    """Llama 2 and 3, SmolLM2: attention over all tokens."""
    if keys.get("use_sliding_window") is not False:
        keys.one_of("sliding_window", (None,), "null (attention sees all tokens)")
    layers = keys.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise keys.refusal("layer_types", "a list of 'full_attention' alone")
    return _spec(keys, "llama", **_biases(keys))


def mistral(keys: Settings) -> Spec:
    """Mistral: every layer sees a window, where there is one."""
    spec = common(keys)
    seen = keys.or_none("sliding_window", 4096)
    return _spec(keys, "mistral", windows=(seen,) * spec["num_hidden_layers"] if seen else ())


def ministral(keys: Settings) -> Spec:
    """Ministral: some layers see a window, as `layer_types` says; without it all."""
    layers = keys.number("num_hidden_layers")
    return _spec(keys, "ministral", windows=windows(keys, layers, lambda layer: True))


def smollm3(keys: Settings) -> Spec:
    """SmolLM3: every fourth layer, or those that `no_rope_layers` marks with 0, turns nothing."""
    layers, turned = keys.number("num_hidden_layers"), keys.get("no_rope_layers")
    every = keys.number("no_rope_layer_interval", default=4)
    turned = [int((layer + 1) % every != 0) for layer in range(layers)] if turned is None else turned
    if not isinstance(turned, list) or len(turned) != layers or any(one not in (0, 1) for one in turned):
        raise keys.refusal("no_rope_layers", f"a list of {layers} ones and zeros, one for each layer")
    seen = windows(keys, layers, lambda layer: keys.flag("use_sliding_window") and not turned[layer])
    plain = tuple(layer for layer in range(layers) if not turned[layer])
    return _spec(keys, "smollm3", 2e6, tied=True, no_rope=plain, windows=seen, **_biases(keys))


def _spec(keys: Settings, name: str, theta: float = 10000.0, tied: bool = False, **own: Any) -> Spec:
    shared = common(keys, tied=tied)
    return Spec(**shared, model_type=name, rope=read_rope(keys, shared["head_dim"], theta), **own)


def _biases(keys: Settings) -> dict[str, bool]:
    biased = keys.flag("attention_bias")
    return {"attention_bias": biased, "output_bias": biased, "mlp_bias": keys.flag("mlp_bias")}
