"""Qwen 2 and 2.5 (biases of q, k and v) and Qwen 3 (normalised queries and keys)."""

from typing import Any

from .config import Settings
from .llama import biases, common, windows
from .spec import Spec


def qwen2(keys: Settings) -> Spec:
    """Qwen 2, 2.5."""
    return Spec(**shared(keys), attention_bias=True)


def qwen3(keys: Settings) -> Spec:
    """Qwen 3, dense."""
    return Spec(**shared(keys), **biases(keys), qk_norm="head")


def shared(keys: Settings) -> dict[str, Any]:
    """What both say: layers from `max_window_layers` on see a window, where `use_sliding_window` is true."""
    spec, seen = common(keys), tuple[int, ...]()
    if keys.flag("use_sliding_window"):
        first = 0 if keys.get("max_window_layers") == 0 else keys.number("max_window_layers", default=28)
        seen = windows(keys, spec["num_hidden_layers"], lambda layer: layer >= first)
    elif any(windows(keys, spec["num_hidden_layers"], lambda layer: False)):
        raise keys.refusal("use_sliding_window", "true where layer_types names sliding_attention")
    return spec | {"windows": seen}
