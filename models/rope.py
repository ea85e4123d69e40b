"""Rotary positions as `config.json` says them, and the tables that a forward pass turns queries and keys by."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import shown
from ..kernels import rope
from .config import Settings
from .spec import Rope

ORIGINAL = "original_max_position_embeddings"
KEYS = {  # kind -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),  # and max_position_embeddings
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "longrope": (ORIGINAL,),
}


def read_rope(keys: Settings, head_dim: int, theta: float = 10000.0, *, partial: bool = False) -> Rope:
    """From `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5), or their absence.

    theta: the base where none is named, as transformers has it for the family. partial: as in Phi a share of a head may
    turn, and an original length is 4096 where none stands beside the table. A base in the table wins over the one
    beside it, an original length beside it over the table's, as in transformers 5. InputError, by key and value, for
    what no `Rope` of theirs says."""
    said = {}
    for key in ("rope_scaling", "rope_parameters"):
        table = keys.get(key)
        if table is not None and not isinstance(table, Mapping):
            raise keys.refusal(key, "null or an object")
        if table:
            if any(isinstance(value, Mapping) for value in table.values()):  # one RoPE for each kind of layer
                raise keys.refusal(key, "an object of plain values, the same for every layer")
            said[key] = rope_table(Settings(table, keys.where, path=f"{key}."), keys, head_dim, theta, partial)
    if len(set(said.values())) > 1:
        raise keys.refusal("rope_parameters", f"what rope_scaling is ({shown(keys.get('rope_scaling'))}), or absent")
    return next(iter(said.values()), None) or rope_table(Settings({}, keys.where), keys, head_dim, theta, partial)


def rope_table(inner: Settings, keys: Settings, head_dim: int, theta: float, partial: bool = False) -> Rope:
    """The `Rope` of one table; numbers that it lacks are those beside it in `keys`."""
    theta = (keys if inner.get("rope_theta") is None else inner).number("rope_theta", default=theta)
    where, kinds, dim = keys if inner.get("partial_rotary_factor") is None else inner, ", ".join(KEYS), 0
    if partial and (share := where.number("partial_rotary_factor", default=1.0)) != 1:
        dim = int(head_dim * share)
    elif not partial:
        where.one_of("partial_rotary_factor", (None, 1), "1")
    type_key = "rope_type" if "rope_type" in inner.data else "type"
    if type_key == "type" and "type" not in inner.data:
        if inner.get("factor") not in (None, 1):
            raise inner.refusal(type_key, f"one of {kinds} beside a factor ({shown(inner.get('factor'))})")
        return Rope(theta, dim)
    kind: Any = inner.one_of(type_key, ("su", *KEYS), f"one of {kinds}")
    kind = "longrope" if kind == "su" else kind  # its name in the first Phi-3
    if kind == "default" and inner.get("factor") not in (None, 1):
        raise inner.refusal(type_key, f"another kind beside a factor ({shown(inner.get('factor'))})")
    most, said = keys.get("max_position_embeddings"), {k: v for k, v in inner.data.items() if v is not None}
    if beside := keys.or_none(ORIGINAL, 4096 if partial else 0):
        said[ORIGINAL] = beside
    inner = Settings({ORIGINAL: most} | said, inner.where, path=inner.path)
    found: dict[str, Any] = {key: inner.number(key) for key in KEYS[kind]}
    if kind == "dynamic":  # whatever original length is said, as in transformers
        found[ORIGINAL] = keys.number("max_position_embeddings")
    if kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
        raise inner.refusal("low_freq_factor", f"below high_freq_factor ({found['high_freq_factor']})")
    if kind == "yarn":
        found |= {key: inner.number(key, default=value) for key, value in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        found |= {"truncate": inner.flag("truncate", default=True)}
        found["attention_factor"] = inner.number("attention_factor", default=_yarn_factor(inner, found["factor"]))
    if kind == "longrope":
        found |= {key: _factors(inner, key, (dim or head_dim) // 2) for key in ("short_factor", "long_factor")}
        stretch = inner.number("factor", default=max(1.0, (most or found[ORIGINAL]) / found[ORIGINAL]))
        factor = math.sqrt(1 + math.log(stretch) / math.log(found[ORIGINAL])) if stretch > 1 < found[ORIGINAL] else 1.0
        found["attention_factor"] = inner.number("attention_factor", default=factor)
    return Rope(theta, dim, kind, **found)


def _yarn_factor(inner: Settings, factor: float) -> float:
    """What queries and keys are multiplied by where no number says it: 0.1 log s + 1 (YaRN, equation 22)."""
    both = [inner.get(key) is not None for key in ("mscale", "mscale_all_dim")]
    scales = [inner.number(key) for key in ("mscale", "mscale_all_dim")] if all(both) else [1.0]
    grown = [0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0 for scale in scales]
    return grown[0] / grown[1] if len(grown) > 1 else grown[0]


def _factors(inner: Settings, key: str, count: int) -> tuple[float, ...]:
    values = inner.get(key)
    numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) and 1e-6 < v < 1e6 for v in values)
    if not numbers or len(values) != count:
        raise inner.refusal(key, f"a list of {count} numbers above 0, one for each pair that turns")
    return tuple(map(float, values))


def tables(how: Rope, head_dim: int, position_ids: Tensor, longest: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, T, 1, dim / 2], of positions [B, T] in texts of so many tokens, `longest` [B, T or 1], which the
    kinds "dynamic" and "longrope" ask for: in fp32 (fp64 for float64 models), then in the dtype of `x`."""
    wide, dim = torch.float64 if x.dtype == torch.float64 else torch.float32, how.dim or head_dim
    original = how.original_max_position_embeddings
    frequency = rope.frequencies(dim, how.theta, dtype=wide, device=x.device)  # [dim / 2]
    if how.kind == "linear":
        frequency = frequency / how.factor
    elif how.kind == "llama3":
        band = how.low_freq_factor, how.high_freq_factor, original
        frequency = rope.llama3_frequencies(frequency, how.factor, *band)
    elif how.kind == "yarn":
        turns = how.beta_fast, how.beta_slow, original
        frequency = rope.yarn_frequencies(frequency, how.theta, how.factor, *turns, truncate=how.truncate)
    elif how.kind == "longrope" and longest is not None:
        short, long = (frequency / frequency.new_tensor(factors) for factors in (how.short_factor, how.long_factor))
        frequency = torch.where(longest.unsqueeze(-1) > original, long, short)
    elif how.kind == "dynamic" and longest is not None:
        stretch = how.factor * longest.clamp(min=original).to(wide) / original - (how.factor - 1)
        exponent = torch.arange(0, dim, 2, device=x.device).to(wide) / max(dim - 2, 1)
        frequency = frequency * stretch.unsqueeze(-1) ** -exponent  # theta (stretch^(dim / (dim - 2)))
    cos, sin = rope.tables(position_ids, frequency)
    return (cos * how.attention_factor).to(x.dtype), (sin * how.attention_factor).to(x.dtype)
