"""LoRAConfig: what to attach and where, checked when it is made."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from ..errors import InputError, shown
from ..settings import Checked, checked, setting

Number = TypeVar("Number", int, float)
Kind = Literal["lora", "dora", "lora-fa", "ia3", "adalora", "vera"]  # the words of attach.py
_ANY = "kind", "target", "exclude", "modules_to_save"
USED = {"ia3": (*_ANY, "feedforward"), "vera": (*_ANY, "rank", "dropout", "projection_seed")}  # of other kinds all
OWN = {"adalora": ("initial_rank", "rank_warmup", "rank_final"), "ia3": ("feedforward",), "vera": ("projection_seed",),
       "lora": ("start",)}  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Settings of LoRA (Hu et al. 2021): rank r and alpha give W + (alpha / r) B A; rsLoRA divides by sqrt(r) instead.

    kind: which adapter, a word of `KINDS` (lora/attach.py).
    target: "all-linear" (every linear layer but output heads), "attn", "mlp", a list of names (full paths or their
        last parts), or one string taken as a regular expression that must match a full path. Embeddings and
        convolutions get an adapter where they are named.
    exclude: a list of names or a regular expression, in the same way; it wins over `target`.
    rank_pattern, alpha_pattern: regular expression on the end of a path -> its own rank or alpha; the first key that
        matches, in dict order, counts. Each is looked up by itself.
    modules_to_save: names of modules of any kind (full paths or their ends) that are trained whole, such as a
        classifier: the adapter holds a copy of each, so that without it the model is its base.
    train_tokens: ids of tokens of which the rows of embedding and head are trained; or these by the module's name.
    target_parameters: names of parameters that are no layer's weight (full paths or their ends), as fused experts are:
        ["experts.gate_up_proj", "experts.down_proj"]. `target` never means those, as in PEFT; None: no layer.
    initial_rank, rank_warmup, rank_final: of AdaLoRA. `rank` is a layer's mean rank at the end, `initial_rank` each
        one's at the start (default: 1.5 times that); ranks fall between a run's first and last shares of these names.
    feedforward: layers, as in `target`, of which IA3 scales the input, not the output; the paper's are the last of
        feedforward blocks, such as down_proj. projection_seed: of VeRA's frozen matrices.
    bias: whether biases are trained, in copies too: "none", those of the layers with adapters ("lora_only"), "all".
    start: where A and B begin: "default", "pissa", "pissa-8" (steps), "olora", "loftq", "loftq-5" (rounds), "eva".
    Raises InputError naming the field, its rule and the value."""

    # An alpha of 1e30 is far beyond use, and what it scales still fits fp32.
    rank: int = setting(16, "rank r of the update", least=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", positive=True, most=1e30)
    dropout: float = setting(0.0, "dropout on the adapter's input, below 1", least=0)
    target: str | Sequence[str] | None = setting("all-linear", "layers that get an adapter")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    rank_pattern: dict[str, int] = setting({}, "other ranks, by layers", least=1)
    alpha_pattern: dict[str, float] = setting({}, "other alphas, by layers", positive=True, most=1e30)
    exclude: str | Sequence[str] = setting((), "layers that get none")
    train_tokens: Sequence[int] | dict[str, Sequence[int]] = setting((), "tokens whose rows are trained")
    modules_to_save: Sequence[str] = setting((), "modules that are trained whole")
    target_parameters: Sequence[str] = setting((), "parameters, such as fused experts, that get an adapter")
    bias: Literal["none", "all", "lora_only"] = setting("none", "which biases are trained")
    kind: Kind = setting("lora", "kind of adapter")
    start: str = setting("default", "where A and B begin", metavar="WORD")
    initial_rank: int | None = setting(None, "AdaLoRA's rank at the start (default: 1.5 times rank)", least=1)
    rank_warmup: float = setting(0.1, "share of the run before AdaLoRA's ranks fall", least=0, most=1)
    rank_final: float = setting(0.5, "share of the run after they have fallen", least=0, most=1)
    projection_seed: int = setting(0, "seed of VeRA's frozen matrices", least=0)
    feedforward: str | Sequence[str] = setting((), "layers of which IA3 scales the input, not the output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"default|olora|eva|(pissa|loftq)(-[1-9][0-9]?)?", self.start):
            raise InputError(
                f"start must be default, olora, eva, pissa, pissa-8, loftq or loftq-5, got {shown(self.start)}"
            )
        if self.dropout >= 1:
            raise InputError(f"dropout must be a number from 0 up to, but not including, 1; got {shown(self.dropout)}")
        for key in ("target", "exclude", "feedforward"):
            checked_names(key, getattr(self, key) or ())
        if self.first_rank < self.rank:
            raise InputError(f"initial_rank must be at least the final rank, {self.rank}, got {self.initial_rank}")
        if self.rank_warmup + self.rank_final > 1:
            shares = f"{self.rank_warmup} and {self.rank_final}"
            raise InputError(f"rank_warmup and rank_final are shares of one run, at most 1 together, got {shares}")
        for f in fields(self):
            unused = f.name not in USED.get(self.kind, [f.name]) or any(f.name in OWN[k] for k in OWN if k != self.kind)
            if unused and getattr(self, f.name) not in (f.default, {}):
                raise InputError(f"{f.name} has no part in an adapter of the kind {self.kind!r}: leave it out")
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                _check_regex(key, pattern)

    @property
    def first_rank(self) -> int:
        """AdaLoRA's rank at the start."""
        return self.initial_rank or -(-3 * self.rank // 2)

    def rank_at(self, path: str) -> int:
        """The rank of the layer at `path`."""
        return pattern_value(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the layer at `path`."""
        return pattern_value(self.alpha_pattern, path, self.alpha)


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


def checked_names(key: str, value: object) -> str | tuple[str, ...]:
    """A regular expression or names, as `target` is written; InputError for what is neither."""
    found: str | tuple[str, ...] = checked(key, value, str | Sequence[str])
    if isinstance(found, str):
        _check_regex(key, found)
    return found


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise InputError(f"{key} holds {pattern!r}, which is no regular expression: {problem}") from None
