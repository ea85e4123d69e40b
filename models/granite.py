"""Granite: a Llama whose embeddings, attention scores, residuals and logits are scaled."""

from .config import Settings, common
from .rope import read_rope
from .spec import Spec


def granite(keys: Settings) -> Spec:
    """Granite 3, dense."""
    shared, biased = common(keys), keys.flag("attention_bias")
    return Spec(
        **shared,
        model_type="granite",
        attention_bias=biased,
        output_bias=biased,
        mlp_bias=keys.flag("mlp_bias"),
        rope=read_rope(keys, shared["head_dim"]),
        embedding_scale=keys.number("embedding_multiplier", default=1.0),
        attention_scale=keys.number("attention_multiplier", default=1.0),
        residual_scale=keys.number("residual_multiplier", default=1.0),
        logit_divisor=keys.number("logits_scaling", default=1.0),
    )
