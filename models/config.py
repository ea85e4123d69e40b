"""A stranger's settings (`config.json`, GGUF metadata) read with care: typed look-ups, limits, errors by key and value.

Nothing in such a table can name code, a URL or another file. Keys of `config.json` that no reader asks for are ignored,
as transformers ignores them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, shown

# The numbers that are read, each with the most it may be: a whole number from 1 where the limit is whole, else a number
# above 0. So a hostile config cannot ask for terabytes before one tensor is read; every real model stays far below.
_MOST: dict[int | float, str] = {
    1 << 10: "num_hidden_layers sliding_window_pattern max_window_layers no_rope_layer_interval",
    1 << 12: "num_attention_heads num_key_value_heads head_dim num_experts num_local_experts num_experts_per_tok",
    1 << 17: "hidden_size",
    1 << 20: "intermediate_size moe_intermediate_size",
    1 << 22: "vocab_size",
    1 << 31: "max_position_embeddings original_max_position_embeddings sliding_window",
    1.0: "rms_norm_eps partial_rotary_factor attention_dropout resid_pdrop embd_pdrop",
    1e6: "factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim "
    "query_pre_attn_scalar attention_multiplier embedding_multiplier residual_multiplier logits_scaling "
    "attn_logit_softcapping final_logit_softcapping",
    1e15: "rope_theta rope_local_base_freq",
}
LIMITS = {name: most for most, names in _MOST.items() for name in names.split()}
DROPOUTS = "attention_dropout", "resid_pdrop", "embd_pdrop"


class Settings:
    """Typed look-ups in a table of settings; each raises InputError for a value that breaks its rule.

    where: what messages begin with (a file, or "config"). prefix: stands before every key in the table. path: what
    messages put before a key of an inner table. A null and a missing key are one: they say nothing. `said` holds what
    was asked for and found: all of the table that its reader's result depends on."""

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
