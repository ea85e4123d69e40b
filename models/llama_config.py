"""What a Llama checkpoint says about itself: `config.json` read strictly.

A value that would change the numbers and that we do not compute (an unknown RoPE type, another activation, a sliding
window) is refused by key and value. Keys we do not know are ignored, as every reader of these files must, but
`ignored_keys` lists them so that a user can be told. Nothing in the file can name code, a URL or another file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

# Limits keep a hostile config from asking for terabytes before one tensor is read; every Llama stays far below them.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
}

_READ = _LIMITS.keys() - {"original_max_position_embeddings"} | {
    "model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "sliding_window", "use_sliding_window", "layer_types", "quantization_config",
}  # fmt: skip
# Known and of no effect on the numbers: bookkeeping, generation defaults, initialisation.
_HARMLESS = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp",
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `kind` "linear" divides every frequency by `factor`; "llama3" divides only the slow ones and blends in between
    (Llama 3.1; `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` set the band).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a Llama decoder; the names are those of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "LlamaConfig":
        """Read Hugging Face keys, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

        Raises InputError naming the key and its value where a key is missing, malformed, too large, contradictory or
        asks for something this decoder does not compute.
        """
        _refuse_unsupported(data)
        hidden, heads = _integer(data, "hidden_size"), _integer(data, "num_attention_heads")
        kv_heads = _integer(data, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise InputError(
                f"config: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})."
            )
        theta, scaling = _rope(data)
        return cls(
            vocab_size=_integer(data, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(data, "intermediate_size"),
            num_hidden_layers=_integer(data, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_head_dim(data, hidden, heads),
            rms_norm_eps=_number(data, "rms_norm_eps", default=1e-6, high=1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=_integer(data, "max_position_embeddings", default=2048),
            tie_word_embeddings=_flag(data, "tie_word_embeddings"),
            attention_bias=_flag(data, "attention_bias"),
            mlp_bias=_flag(data, "mlp_bias"),
        )


def ignored_keys(data: Mapping[str, Any]) -> list[str]:
    """Keys of a config that `from_hf` neither reads nor knows to be harmless, sorted; null and 0 say nothing."""
    return sorted(str(key) for key, value in data.items() if key not in _READ | _HARMLESS and value not in (None, 0))


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"config: must be a JSON object, got {type(data).__name__}.")
    if data.get("model_type") != "llama":
        raise InputError(
            f"config: model_type must be 'llama', the one family read so far, got {_show(data.get('model_type'))}."
        )
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"config: hidden_act must be 'silu', got {_show(data['hidden_act'])}.")
    if data.get("sliding_window") is not None and data.get("use_sliding_window") is not False:
        raise InputError(
            f"config: sliding_window must be null (attention sees all tokens), got {_show(data['sliding_window'])}."
        )
    layer_types = data.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise InputError(f"config: layer_types must all be 'full_attention', got {_show(layer_types)}.")
    if data.get("quantization_config") is not None:
        raise InputError(
            "config: quantization_config must be absent (weights in fp32, fp16 or bf16), "
            f"got {_show(data['quantization_config'])}. Load the unquantised model and let fourbit quantise it."
        )
    if data.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"config: partial_rotary_factor must be 1, got {_show(data['partial_rotary_factor'])}.")


def _head_dim(data: Mapping[str, Any], hidden: int, heads: int) -> int:
    if data.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"config: without head_dim, hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})."
        )
    head_dim = _integer(data, "head_dim", default=hidden // heads)
    if head_dim % 2 or head_dim == 0:
        raise InputError(f"config: head_dim must be even and positive (RoPE turns pairs), got {head_dim}.")
    return head_dim


def _rope(data: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (which wins, as in transformers 5) or `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if data.get("rope_parameters") is not None else "rope_scaling"
    rope = data.get(key)
    if rope is None:
        rope = {}
    if not isinstance(rope, Mapping):
        raise InputError(f"config: {key} must be null or an object, got {_show(rope)}.")
    if any(isinstance(value, Mapping) for value in rope.values()):  # one RoPE for each kind of layer
        raise InputError(f"config: {key} must hold plain values, the same for every layer, got {_show(rope)}.")
    theta = _number(rope if rope.get("rope_theta") is not None else data, "rope_theta", default=10000.0, high=1e15)
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"config: {key}.partial_rotary_factor must be 1, got {_show(rope['partial_rotary_factor'])}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(rope, "factor", where=key, high=1e6))
    if kind == "llama3":
        return theta, _llama3(data, rope, key)
    raise InputError(f"config: {key}.rope_type must be 'default', 'linear' or 'llama3', got {_show(kind)}.")


def _llama3(data: Mapping[str, Any], rope: Mapping[str, Any], key: str) -> RopeScaling:
    original = "original_max_position_embeddings"
    source = rope if rope.get(original) is not None else {original: data.get("max_position_embeddings")}
    scaling = RopeScaling(
        "llama3",
        factor=_number(rope, "factor", where=key, high=1e6),
        low_freq_factor=_number(rope, "low_freq_factor", where=key, high=1e6),
        high_freq_factor=_number(rope, "high_freq_factor", where=key, high=1e6),
        original_max_position_embeddings=_integer(source, original, where=key),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise InputError(
            f"config: {key}.low_freq_factor must be below high_freq_factor, "
            f"got {scaling.low_freq_factor} and {scaling.high_freq_factor}."
        )
    return scaling


def _integer(data: Mapping[str, Any], key: str, *, default: int | None = None, where: str = "") -> int:
    value = data.get(key)
    if value is None and default is not None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LIMITS[key]:
        raise InputError(
            f"config: {_dotted(where, key)} must be a whole number from 1 to {_LIMITS[key]}, got {_show(value)}."
        )
    return value


def _number(data: Mapping[str, Any], key: str, *, high: float, default: float | None = None, where: str = "") -> float:
    value = data.get(key)
    if value is None and default is not None:
        value = default
    try:  # an int too large for a float overflows
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number <= high:
        raise InputError(
            f"config: {_dotted(where, key)} must be a number above 0, at most {high:g}, got {_show(value)}."
        )
    return number


def _flag(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InputError(f"config: {key} must be true or false, got {_show(value)}.")
    return value


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _show(value: Any) -> str:
    """A value as the message shows it: cut short; a whole number too long to print is described."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
