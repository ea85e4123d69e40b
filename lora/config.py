"""LoRAConfig: what to attach and where, checked when it is made."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import InputError, shown
from ..settings import MOST, Named

Number = TypeVar("Number", int, float)

LARGEST_ALPHA = 1e30  # far beyond use, and what it scales still fits fp32


@dataclass(frozen=True)
class LoRAConfig(Named):
    """Settings of LoRA (Hu et al. 2021): rank r and alpha give W + (alpha / r) B A; rsLoRA divides by sqrt(r) instead.

    target: "all-linear" (every linear layer but output heads), "attn", "mlp", a list of names (full paths or their
        last parts), or one string taken as a regular expression that must match a full path.
    exclude: a list of names or a regular expression, in the same way; it wins over `target`.
    rank_pattern, alpha_pattern: regular expression on the end of a path -> its own rank or alpha; the first key that
        matches, in dict order, counts. Each is looked up by itself.
    modules_to_save: names of modules of any kind (full paths or their ends) that are trained whole, such as a
        classifier: the adapter holds a copy of each, so that without it the model is its base.
    bias: whether biases are trained, in copies too: "none", those of the layers with adapters ("lora_only"), "all".
    Raises InputError naming the field, its rule and the value.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target: str | Sequence[str] = "all-linear"
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    bias: str = "none"

    def rank_at(self, path: str) -> int:
        """The rank of the layer at `path`."""
        return pattern_value(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the layer at `path`."""
        return pattern_value(self.alpha_pattern, path, float(self.alpha))

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be a number from 0 up to, but not including, 1; got {shown(self.dropout)}")
        if not isinstance(self.rslora, bool):
            raise InputError(f"rslora must be true or false, got {shown(self.rslora)}")
        if self.bias not in ("none", "all", "lora_only"):
            raise InputError(f"bias must be 'none', 'all' or 'lora_only', got {shown(self.bias)}")
        if isinstance(self.modules_to_save, str):
            raise InputError(f"modules_to_save must be a list of names, got {shown(self.modules_to_save)}")
        for key in ("target", "exclude", "modules_to_save"):
            object.__setattr__(self, key, checked_names(key, getattr(self, key)))
        if not self.target:
            raise InputError(
                'target must name at least one layer: "all-linear", "attn", "mlp", a list of names or a regex'
            )
        for key, check in (("rank_pattern", check_rank), ("alpha_pattern", _check_alpha)):
            object.__setattr__(self, key, _checked_pattern(key, getattr(self, key), check))


def pattern_value(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    """The value of the first key, in dict order, that matches the end of `path`; PEFT's rule."""
    key = pattern_key(patterns, path)
    return default if key is None else patterns[key]


def pattern_key(patterns: Iterable[str], path: str) -> str | None:
    """The first of the patterns that matches the end of `path`."""
    return next((key for key in patterns if _at_the_end(key).match(path)), None)


@functools.lru_cache(maxsize=1 << 14)
def _at_the_end(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_rank(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise InputError(f"{key} must be a whole number from 1 to {MOST:,}, got {shown(value)}")


def _check_alpha(key: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST_ALPHA:
        raise InputError(f"{key} must be a number above 0 and below {LARGEST_ALPHA:g}, got {shown(value)}")


def checked_names(key: str, value: object) -> str | tuple[str, ...]:
    """A regular expression or names, as `target` is written; InputError for what is neither."""
    if isinstance(value, str):
        _check_regex(key, value)
        return value
    if not isinstance(value, Sequence | set | frozenset) or not all(isinstance(name, str) and name for name in value):
        raise InputError(f"{key} must be a string or a list of layer names, got {value!r}")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def _checked_pattern(key: str, value: object, check: Callable[[str, object], None]) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must map patterns to numbers, got {value!r}")
    for pattern, number in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise InputError(f"{key} must have regular expressions as keys, got {pattern!r}")
        _check_regex(key, pattern)
        check(f"{key}[{pattern!r}]", number)
    return dict(value)


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise InputError(f"{key} holds {pattern!r}, which is no regular expression: {problem}") from None
