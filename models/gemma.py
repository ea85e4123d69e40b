"""Gemma 2 and the text model of Gemma 3: norms on both sides that multiply by 1 + weight, scaled embeddings, windows in
most layers, soft caps (Gemma 2), and two RoPE bases (Gemma 3)."""

from collections.abc import Mapping
from typing import Any

from .config import Settings
from .llama import biases, common, windows
from .rope import read_rope, rope_table
from .spec import Rope, Spec

KINDS = "full_attention", "sliding_attention"


def gemma2(keys: Settings) -> Spec:
    """Gemma 2: every other layer sees a window."""
    shared = _shared(keys)
    caps = [keys.or_none("attn_logit_softcapping", 50.0), keys.or_none("final_logit_softcapping", 30.0)]
    rope, seen = read_rope(keys, shared["head_dim"]), windows(keys, shared["num_hidden_layers"], lambda i: i % 2 == 0)
    return Spec(**shared, windows=seen, rope=rope, attention_softcap=caps[0], logit_softcap=caps[1])


def gemma3(keys: Settings) -> Spec:
    """Gemma 3's text model: five layers of six see a window and turn by a base of their own."""
    shared = _shared(keys)
    keys.one_of("attn_logit_softcapping", (None,), "null (transformers has none in Gemma 3)")
    every = keys.number("sliding_window_pattern", default=6)
    seen = windows(keys, shared["num_hidden_layers"], lambda layer: (layer + 1) % every != 0)
    said, beside = keys.get("rope_parameters"), keys.get("rope_scaling")
    local = keys.number("rope_local_base_freq", default=1e4)
    if isinstance(said, Mapping) and any(isinstance(said.get(kind), Mapping) for kind in KINDS):
        if any(not isinstance(said.get(kind), Mapping | None) for kind in KINDS):
            raise keys.refusal("rope_parameters", f"an object for each of {' and '.join(KINDS)}")
        if not isinstance(beside, Mapping | None):
            raise keys.refusal("rope_scaling", "null or an object")
        full, sliding = ({k: v for k, v in (said.get(kind) or {}).items() if v is not None} for kind in KINDS)
        both = {**full, **(beside or {})}, {"rope_theta": local} | sliding
        inner = [Settings(i, keys.where, path=f"rope_parameters.{kind}.") for i, kind in zip(both, KINDS, strict=True)]
        ropes = [rope_table(i, keys, shared["head_dim"], 1e6) for i in inner]
    else:
        ropes = [read_rope(keys, shared["head_dim"], 1e6), Rope(local)]
    own = {"qk_norm": "head", "logit_softcap": keys.or_none("final_logit_softcapping")}
    return Spec(**shared, windows=seen, rope=ropes[0], local_rope=ropes[1], **own)


def _shared(keys: Settings) -> dict[str, Any]:
    keys.one_of("use_bidirectional_attention", (None, False), "false (a query sees the tokens before it)")
    spec = {"activation": "gelu_tanh"} | common(keys, activation="hidden_activation", tied=True, theta=None)
    scale = keys.number("query_pre_attn_scalar", default=256.0) ** -0.5
    scales = {"attention_scale": scale, "embedding_scale": spec["hidden_size"] ** 0.5}
    return spec | scales | biases(keys) | {"norms": "both", "norm_plus_one": True}
