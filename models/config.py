"""A stranger's settings (`config.json`, GGUF metadata) read with care: typed look-ups, limits, errors by key and value.

Nothing in such a table can name code, a URL or another file. Keys of `config.json` that no reader asks for are ignored,
as transformers ignores them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, shown
from .spec import ROPE_KEYS, RopeScaling

# The numbers that are read, each with the most it may be: a whole number from 1 where the limit is whole, else a number
# above 0. So a hostile config cannot ask for terabytes before one tensor is read; every real model stays far below.
LIMITS: dict[str, int | float] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
    "rms_norm_eps": 1.0,
    "rope_theta": 1e15,
    "factor": 1e6,
    "low_freq_factor": 1e6,
    "high_freq_factor": 1e6,
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

    def flag(self, key: str) -> bool:
        """True or false; nothing is false."""
        if not isinstance(self.get(key), bool | None):
            raise self.refusal(key, "true or false")
        return bool(self.get(key))


def head_dim(keys: Settings, hidden: int, heads: int) -> int:
    """The size of a head: its own key, or the hidden size's share."""
    if keys.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"config: without head_dim, hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})."
        )
    return int(keys.number("head_dim", default=hidden // heads))


def rope(keys: Settings) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).

    A base in the table wins over the one beside it, as in transformers 5. InputError where two tables say two things.
    """
    keys_there = [key for key in ("rope_scaling", "rope_parameters") if keys.get(key) is not None]
    said = {key: _rope_table(keys, key) for key in keys_there if keys.get(key) != {}}
    if len(set(said.values())) > 1:
        raise keys.refusal("rope_parameters", f"what rope_scaling is ({shown(keys.get('rope_scaling'))}), or absent")
    keys.one_of("partial_rotary_factor", (None, 1), "1")
    return next(iter(said.values()), (keys.number("rope_theta", default=10000.0), None))


def _rope_table(keys: Settings, key: str) -> tuple[float, RopeScaling | None]:
    table = keys.get(key)
    if not isinstance(table, Mapping):
        raise keys.refusal(key, "null or an object")
    if any(isinstance(value, Mapping) for value in table.values()):  # one RoPE for each kind of layer
        raise keys.refusal(key, "an object of plain values, the same for every layer")
    inner = Settings(table, keys.where, path=f"{key}.")
    inner.one_of("partial_rotary_factor", (None, 1), "1")
    theta = (keys if inner.get("rope_theta") is None else inner).number("rope_theta", default=10000.0)
    type_key = "rope_type" if "rope_type" in table else "type"
    allowed = ("default", *ROPE_KEYS) if type_key in table else (None,)
    kind = inner.one_of(type_key, allowed, "'default', 'linear' or 'llama3'")
    if kind in ROPE_KEYS:
        return theta, _scaling(kind, keys, inner)
    if inner.get("factor") not in (None, 1):
        raise inner.refusal(type_key, f"'linear' or 'llama3' beside a factor ({shown(inner.get('factor'))})")
    return theta, None


def _scaling(kind: str, keys: Settings, inner: Settings) -> RopeScaling:
    original = "original_max_position_embeddings"
    data = {original: keys.get("max_position_embeddings")} | {k: v for k, v in inner.data.items() if v is not None}
    inner = Settings(data, inner.where, path=inner.path)
    scaling = RopeScaling(kind, **{k: inner.number(k) for k in ROPE_KEYS[kind]})
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise inner.refusal("low_freq_factor", f"below high_freq_factor ({scaling.high_freq_factor})")
    return scaling
