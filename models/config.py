"""A stranger's settings (`config.json`, GGUF metadata) read with care: typed look-ups, limits, errors by key and value.

Nothing in such a table can name code, a URL or another file. Keys of `config.json` that no reader asks for are ignored,
as transformers ignores them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError, shown

# The numbers that are read, each with the most it may be: a whole number from 1 where the limit is whole, else a number
# above 0. So a hostile config cannot ask for terabytes before one tensor is read; every real model stays far below.
LIMITS: dict[str, int | float] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "sliding_window_pattern": 1 << 10,
    "max_window_layers": 1 << 10,
    "no_rope_layer_interval": 1 << 10,
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 1 << 12),
    "rms_norm_eps": 1.0,
    "rope_theta": 1e15,
    "rope_local_base_freq": 1e15,
    "partial_rotary_factor": 1.0,
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim"), 1e6
    ),
    **dict.fromkeys(("beta_fast", "beta_slow", "query_pre_attn_scalar", "attention_multiplier", "logits_scaling"), 1e6),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), 1.0),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 1e6),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), 1e6),
}

DROPOUTS = "attention_dropout", "resid_pdrop", "embd_pdrop"


class Settings:
    """Typed look-ups in a table of settings; each raises InputError for a value that breaks its rule.

    where: what messages begin with (a file, or "config"). prefix: stands before every key in the table. path: what
    messages put before a key of an inner table. A null and a missing key are one: they say nothing. `said` holds what
    was asked for and found: all of the table that its reader's result depends on.
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "", path: str = "") -> None:
        self.data, self.where, self.prefix, self.path = data, where, prefix, path
        self.said: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """The value as it stands there, or None."""
        if self.prefix + key in self.data:
            self.said[key] = self.data[self.prefix + key]
        return self.said.get(key)

    def refusal(self, key: str, rule: str) -> InputError:
        """The error for a value that breaks a rule: "hidden_size must be a whole number from 1 to 131072, got 0"."""
        got = "nothing" if self.get(key) is None else shown(self.get(key))
        return InputError(f"{self.where}: {self.path}{self.prefix}{key} must be {rule}, got {got}.")

    def one_of(self, key: str, allowed: Sequence[Any], rule: str) -> Any:
        """One of the `allowed` plain values (None: nothing may stand there); a truth value is no number."""
        value = self.get(key)
        plain = isinstance(value, str | int | float | None)
        if not plain or all(value != a or isinstance(value, bool) != isinstance(a, bool) for a in allowed):
            raise self.refusal(key, rule)
        return value

    def number(self, key: str, default: float | None = None, like: str = "") -> Any:
        """A number of the kind and size that `LIMITS` says of this key, or of the one it is `like`."""
        value, high = self.get(key), LIMITS[like or key]
        if value is None and default is not None:
            return default
        whole = isinstance(high, int)
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (is_number and (1 if whole else 0) <= value <= high and value):
            rule = f"a whole number from 1 to {high}" if whole else f"a number above 0, at most {high:g}"
            raise self.refusal(key, rule)
        return value if whole else float(value)

    def or_none(self, key: str, default: Any = 0) -> Any:
        """A number as above, 0 where the file says null, and the default where it says nothing."""
        null = self.get(key) is None
        return self.number(key) if not null else 0 if self.prefix + key in self.data else default

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; nothing is the default."""
        if not isinstance(value := self.get(key), bool | None):
            raise self.refusal(key, "true or false")
        return default if value is None else value


def common(keys: Settings, *, activation: str = "hidden_act", eps: float = 1e-6, tied: bool = False) -> dict[str, Any]:
    """The fields of a `Spec` that every family says in the same words, less its RoPE.

    activation: the key of silu's name, or of gelu's. eps, tied: what transformers takes where the file is silent.
    Raises InputError naming the key and its value where a key is missing, malformed, too large or contradictory.
    """
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
    return {
        **{key: keys.number(key) for key in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        **({"activation": kinds[kind]} if kind else {}),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", tied),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("num_key_value_heads", default=heads),
        "head_dim": int(keys.number("head_dim", default=hidden // heads)),
        "rms_norm_eps": keys.number("rms_norm_eps", default=eps),
        "max_position_embeddings": keys.number("max_position_embeddings", default=2048),
    }


def windows(keys: Settings, layers: int, sliding: Callable[[int], bool]) -> tuple[int, ...]:
    """Of each layer the tokens that a query sees, 0: all; empty where every layer sees all. From `layer_types`, or
    where these are not there from `sliding`, of the layer's number; and from `sliding_window`, null: none slides.

    Where the file is silent the window is transformers' default, 4096."""
    kinds, names = keys.get("layer_types"), ("full_attention", "sliding_attention")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in names for kind in kinds):
            raise keys.refusal("layer_types", f"a list of {layers} of {' and '.join(names)}, one for each layer")
        slides = [kind == names[1] for kind in kinds]
    else:
        slides = [bool(keys.or_none("sliding_window", 4096)) and sliding(layer) for layer in range(layers)]
    seen = keys.number("sliding_window", default=None if "sliding_window" in keys.data else 4096) if any(slides) else 0
    return tuple(seen if slide else 0 for slide in slides) if seen else ()
