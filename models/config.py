"""A stranger's settings (`config.json`, GGUF metadata) read with care: typed look-ups, limits, errors by key and value.

Nothing in such a table can name code, a URL or another file. Keys that no reader asks for are ignored, as every reader
of these files must.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .spec import ROPE_KEYS, RopeScaling

# Limits keep a hostile config from asking for terabytes before one tensor is read; every real model stays far below.
LIMITS = {
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


class Settings:
    """Typed look-ups in a table of settings; each raises InputError for a value that breaks its rule.

    where: what messages begin with (a file, or "config"). prefix: stands before every key in the table. path: what
    messages put before a key of an inner table. A null and a missing key are one: they say nothing.
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "", path: str = "") -> None:
        self.data, self.where, self.prefix, self.path = data, where, prefix, path

    def get(self, key: str) -> Any:
        """The value as it stands there, or None."""
        return self.data.get(self.prefix + key)

    def refusal(self, key: str, rule: str) -> InputError:
        """The error for a value that breaks a rule: "hidden_size must be a whole number from 1 to 131072, got 0"."""
        return InputError(f"{self.where}: {self.path}{self.prefix}{key} must be {rule}, got {shown(self.get(key))}.")

    def one_of(self, key: str, allowed: Sequence[Any], rule: str) -> Any:
        """One of the `allowed` plain values (None: nothing may stand there)."""
        value = self.get(key)
        if not isinstance(value, str | int | float | None) or value not in allowed:
            raise self.refusal(key, rule)
        return value

    def size(self, key: str, default: int | None = None, like: str = "") -> int:
        """A whole number from 1 to what `LIMITS` allows for this key, or for the one it is `like`."""
        value, high = self.get(key), LIMITS[like or key]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise self.refusal(key, f"a whole number from 1 to {high}")
        return value

    def number(self, key: str, high: float, default: float | None = None) -> float:
        """A number above 0, at most `high`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        try:  # an int too large for a float overflows
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            number = math.inf
        if not 0 < number <= high:
            raise self.refusal(key, f"a number above 0, at most {high:g}")
        return number

    def flag(self, key: str) -> bool:
        """True or false; nothing is false."""
        if not isinstance(self.get(key), bool | None):
            raise self.refusal(key, "true or false")
        return bool(self.get(key))


def shown(value: Any) -> str:
    """A value as a message shows it: cut short; a whole number too long to print is described."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def head_dim(keys: Settings, hidden: int, heads: int) -> int:
    """The size of a head: its own key, or the hidden size's share."""
    if keys.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"config: without head_dim, hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})."
        )
    return keys.size("head_dim", default=hidden // heads)


def rope(keys: Settings) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (which wins, as in transformers 5) or `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    table = keys.get(key) or {}
    if not isinstance(keys.get(key), Mapping | None):
        raise keys.refusal(key, "null or an object")
    if any(isinstance(value, Mapping) for value in table.values()):  # one RoPE for each kind of layer
        raise keys.refusal(key, "an object of plain values, the same for every layer")
    inner = Settings(table, keys.where, path=f"{key}.")
    theta = (keys if inner.get("rope_theta") is None else inner).number("rope_theta", 1e15, default=10000.0)
    for where in (keys, inner):
        where.one_of("partial_rotary_factor", (None, 1), "1")
    type_key = "rope_type" if "rope_type" in table else "type"
    if type_key not in table:
        return theta, None
    kind = inner.one_of(type_key, ("default", *ROPE_KEYS), "'default', 'linear' or 'llama3'")
    return theta, None if kind == "default" else _scaling(kind, keys, inner)


def _scaling(kind: str, keys: Settings, inner: Settings) -> RopeScaling:
    original = "original_max_position_embeddings"
    data = {original: keys.get("max_position_embeddings")} | {k: v for k, v in inner.data.items() if v is not None}
    inner = Settings(data, inner.where, path=inner.path)
    values: dict[str, Any] = {k: inner.size(k) if k == original else inner.number(k, 1e6) for k in ROPE_KEYS[kind]}
    scaling = RopeScaling(kind, **values)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise inner.refusal("low_freq_factor", f"below high_freq_factor ({scaling.high_freq_factor})")
    return scaling
