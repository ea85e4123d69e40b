"""OLMo 2: layers whose parts are normalised after them, and queries and keys over a token's whole row."""

from .config import Settings, common
from .rope import read_rope
from .spec import Spec


def olmo2(keys: Settings) -> Spec:
    """OLMo 2."""
    shared, biased = common(keys, eps=1e-5), keys.flag("attention_bias")
    return Spec(
        **shared,
        model_type="olmo2",
        norms="after",
        qk_norm="row",
        attention_bias=biased,
        output_bias=biased,
        rope=read_rope(keys, shared["head_dim"]),
    )
