"""What a value may be: its type and its bounds, checked in one place wherever it came from.

A setting comes from a flag, a YAML file, a program or the folder of an earlier run; the numbers of a checkpoint come
from a file that anyone may have written. All are fields of a dataclass, whose annotations say the type and whose
`setting` says the bounds. `Checked` checks them when the object is made, `read_fields` makes one from a file's mapping.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from .errors import InputError, shown
from .synonyms import hint

T = TypeVar("T")
DType = torch.dtype | str  # or its name in torch
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REQUIRED: Any = MISSING  # as a default: there is none
MOST = 2**31 - 1  # of whole numbers: beyond it a setting is a slip, and libraries of 32 bits end
LARGEST = 2**63 - 1  # of those that count without an end, and of seeds
WORDS: dict[Any, tuple[str, str]] = {  # a type in words, and what stands for a value of it
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    bool: ("true or false", ""),
    str: ("text", "TEXT"),
    NoneType: ("null", ""),
    tuple: ("text or a list of texts", "TEXT"),
    Sequence: ("a list of texts", "TEXT"),
    Sequence[int]: ("a list of whole numbers", "N"),
    dict: ("a mapping of names or patterns to numbers", "NAME=X"),
    dict[str, Any]: ("a mapping", ""),
    dict[str, str]: ("a mapping of texts", ""),
}


def setting(
    default: Any,
    help: str,
    metavar: str = "",
    bare: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    positive: bool = False,
) -> Any:
    """A field: its default (or REQUIRED) and the sentence that the command line prints about it.

    metavar: what stands there for its value where the type says too little. bare: what its flag means without a value.
    least, most, positive: the number must be at least, at most that (else `MOST` for whole numbers), or above 0."""
    metadata = {"help": help, "metavar": metavar, "bare": bare, "least": least, "most": most, "positive": positive}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def floating(dtype: DType) -> torch.dtype:
    """The dtype, or that of the name: "bfloat16". InputError for what no weight here may have."""
    found: object = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64, got {shown(dtype)}")
    return found


@dataclass(frozen=True)
class Checked:
    """Base of options: each field is of its type and within its bounds. A whole number given for a float is a float,
    1e3 a whole number, a list a tuple, a `Path` its text. Raises InputError that begins with the field's name and says
    rule and value, and TypeError for a name that is no field, with the right one."""

    def __new__(cls, *_: object, **given: object) -> Self:
        known = [option.name for option in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise TypeError(f"{cls.__name__} has no setting {unknown[0]!r}{hint(unknown[0], known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kind: Any = type(self)
        types = _types_of(kind)
        for option in fields(self):
            value = checked(option.name, getattr(self, option.name), types[option.name], option.metadata)
            if value in ("", ()) and option.default != value:
                raise InputError(f"{option.name} must not be empty")
            object.__setattr__(self, option.name, value)


@cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # which takes longer than all that is checked by it


def read_fields(kind: type[T], given: Any, where: str) -> T:
    """The dataclass `kind` from a file's mapping. Raises InputError, after `where`, for what is no mapping, for a name
    that is unknown or missing, and for a value of another type or out of bounds."""
    if not isinstance(given, dict):
        raise InputError(f"{where} must be a mapping, got {_value(given)}")
    known, types = {f.name: f for f in fields(kind)}, _types_of(kind)  # type: ignore[arg-type]  # T: a dataclass
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"{where} holds {shown(unknown[0])}, which this fourbit does not know")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    found = {n: checked(f"{where}: {n}", value, types[n], known[n].metadata) for n, value in given.items()}
    return kind(**found)


def checked(name: str, value: Any, kind: Any, bounds: Mapping[str, Any] | None = None) -> Any:
    """`value` as the type `kind`, within the bounds of `setting`; whatever is called `name` in the InputError."""
    if is_dataclass(kind):
        return read_fields(kind, value, name)  # type: ignore[arg-type]  # it is a dataclass
    try:
        value = _fitted(value, kind)
    except (TypeError, ValueError, OverflowError, RecursionError):
        *some, last = forms(kind)
        expected = ("one of " if len(some) > 1 else "") + ", ".join(some) + " or " * bool(some) + last
        raise InputError(f"{name} must be {expected}, got {_value(value)}") from None
    bounds = bounds or {}
    least, most, positive = bounds.get("least"), bounds.get("most"), bounds.get("positive")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]:
        if isinstance(each, str) and "\0" in each:
            raise InputError(f"{name} must be text without NUL, got {shown(each)}")
        if isinstance(each, bool) or not isinstance(each, int | float):
            continue
        if positive and not 0 < each < math.inf:
            raise InputError(f"{name} must be above 0 and finite, got {_value(each)}")
        if isinstance(each, float) and not math.isfinite(each):
            raise InputError(f"{name} must be a finite number, got {each}")
        if least is not None and each < least:
            raise InputError(f"{name} must be at least {least}, got {_value(each)}")
        limit = most if most is not None else MOST if isinstance(each, int) else math.inf
        if each > limit:
            raise InputError(f"{name} must be at most {limit:,}, got {_value(each)}")
    return value


def _fitted(value: Any, kind: Any) -> Any:
    """`value` as `kind`; ValueError or OverflowError where it is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in inner[:-1]:
            try:
                return _fitted(value, part)
            except (ValueError, OverflowError):
                continue
        return _fitted(value, inner[-1])
    if kind is Any or type(value) is kind or (value is None and kind is NoneType):
        return value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if kind is str and isinstance(value, os.PathLike) and isinstance(path := os.fspath(value), str):
        return path
    if origin is tuple and isinstance(value, str | os.PathLike):
        return (_fitted(value, inner[0]),)
    if origin in (tuple, Sequence) and isinstance(value, list | tuple | set | frozenset):
        return tuple(_fitted(each, inner[0]) for each in (value if isinstance(value, list | tuple) else sorted(value)))
    if origin is dict and isinstance(value, dict):
        return {_fitted(key, inner[0]): _fitted(each, inner[1]) for key, each in value.items()}
    raise ValueError(kind)


def forms(kind: Any, column: int = 0) -> list[str]:
    """What a value of a type may be, in words (column 0) or as a placeholder (1)."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(value) for value in inner]
    if origin in (Union, UnionType):
        return [form for part in inner for form in forms(part, column)]
    return [(WORDS.get(kind) or WORDS[origin])[column]]


def _value(value: Any) -> str:
    return "null" if value is None else shown(value)
