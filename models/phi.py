"""Phi-3 and Phi-4: one projection for q, k and v, one for gate and up, and LongRoPE."""

from .config import Settings, common
from .rope import read_rope
from .spec import Spec


def phi3(keys: Settings) -> Spec:
    """Phi-3 and Phi-4, mini too."""
    shared = common(keys, eps=1e-5)
    seen = keys.or_none("sliding_window")
    return Spec(
        **shared,
        model_type="phi3",
        fused=True,
        windows=(seen,) * shared["num_hidden_layers"] if seen else (),
        rope=read_rope(keys, shared["head_dim"], partial=True),
    )
