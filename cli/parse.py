"""From flags and a YAML file to one frozen dataclass of options, and where each value came from.

The dataclass is all there is to say: its fields are the flags (`micro_batch` is `--micro-batch`), their types are
checked alike for flags and files, their metadata is the help, the class that defines a field names its group, its own
docstring heads the help. Order: defaults, then the file, then the flags.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from ..errors import InputError
from .config_file import read_config
from .show import wrapped
from .synonyms import hint

T = TypeVar("T")
Sources = Mapping[str, str]  # of each option by name: DEFAULT, FLAG or "FILE:LINE"
DEFAULT, FLAG = "default", "flag"
BARE = {"resume": "auto"}  # options whose flag may stand without a value, and what it means then
WORDS: dict[Any, tuple[str, str]] = {  # a type in words, and what stands for a value of it
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    bool: ("true or false", ""),
    str: ("text", "TEXT"),
    NoneType: ("null", ""),
    tuple: ("text or a list of texts", "TEXT"),
    dict: ("a mapping of names or patterns to numbers", "NAME=X"),
}
METAVARS = {  # where the type says too little
    "out": "PATH",
    "template": "NAME|FILE",
    "resume": "auto|PATH",
    "log": "NAME",
    "lr_scale": "PATTERN=X",
    "optimizer_budget": "auto|SIZE",
    "loss": "NAME[=WEIGHT]",
    "divergence": "NAME",
    "reference_cache": "FILE",
}


def parse(kind: type[T], command: str, args: Sequence[str]) -> tuple[T, Sources]:
    """The options `kind` (a frozen dataclass) from arguments and the YAML file they may name, and their sources.

    Bare arguments fill the option that `kind.positional` names, if it does, besides a file that ends in .yaml or .yml.
    Raises InputError naming the flag or the file's line.
    """
    types = _types(kind)
    flags, bare = _flags(types, command, args)
    configs = [arg for arg in bare if arg.endswith((".yaml", ".yml"))]
    if len(configs) > 1:
        raise InputError(f"one config file a run, got {' and '.join(configs)}")
    if bare := [arg for arg in bare if arg not in configs]:
        if (positional := getattr(kind, "positional", None)) is None:
            raise InputError(
                f"unexpected argument {bare[0]!r}: fourbit {command} takes flags and one config file that ends in .yaml"
            )
        flags[positional] = bare + flags.get(positional, [])
    values, sources = dict[str, Any](), dict.fromkeys(types, DEFAULT)
    for name, setting in read_config(configs[0]).items() if configs else ():
        sources[name] = where = f"{configs[0]}:{setting.line}"
        if name not in types:
            raise InputError(f"{where}: unknown setting {name!r}{hint(name, types)}")
        values[name] = _convert(setting.value, types[name], f"{where}: {name}", strict=True)
    for name, raw in flags.items():
        sources[name] = FLAG
        values[name] = _convert(raw, types[name], _flag(name), strict=False)
    if missing := [_flag(field.name) for field in _fields(kind) if _required(field) and field.name not in values]:
        raise InputError(f"fourbit {command} needs {', '.join(missing)}; see fourbit {command} --help")
    try:
        return kind(**values), sources
    except InputError as error:
        raise InputError(_with_source(str(error), sources)) from None


def _with_source(message: str, sources: Sources) -> str:
    """`lr must be above 0` as `--lr must be above 0` or with the file's line, after where the value came from."""
    name, _, rest = message.partition(" ")
    if sources.get(name, DEFAULT) == DEFAULT:
        return message
    return f"{_flag(name)} {rest}" if sources[name] == FLAG else f"{sources[name]}: {message}"


def _flags(types: Mapping[str, Any], command: str, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What flags say by option, still text (a list where a flag may be repeated), and the bare arguments."""
    known = {_flag(name): (name, True) for name in types}
    known |= {"--no-" + _flag(name)[2:]: (name, False) for name in types if types[name] is bool}
    given, bare, rest = dict[str, Any](), list[str](), list(reversed(args))
    while rest:
        if not _is_flag(rest[-1]):
            bare.append(rest.pop())
            continue
        spelled, equals, text = rest.pop().partition("=")
        if spelled not in known:
            near = hint(spelled.lstrip("-"), types, spell="--{}") or f"; see fourbit {command} --help"
            raise InputError(f"unknown flag {spelled}{near}")
        name, on = known[spelled]
        if types[name] is bool:
            if equals:
                raise InputError(f"{spelled} takes no value, got {text!r}; there are {_flag(name)} and --no-...")
            given[name] = on
            continue
        if not equals and rest and not _is_flag(rest[-1]):
            text = rest.pop()
        elif not equals and name not in BARE:
            raise InputError(f"{spelled}: needs a value; see fourbit {command} --help")
        if get_origin(types[name]) in (tuple, dict):
            given.setdefault(name, []).append(text)
        else:
            given[name] = text or BARE.get(name, "")
    return given, bare


def _is_flag(arg: str) -> bool:
    return re.match(r"-[^\d.]", arg) is not None  # -0.5 is a value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fields(kind: Any) -> "tuple[Field[Any], ...]":
    return fields(kind)


def _types(kind: type) -> dict[str, Any]:
    """Type of every option by name; class variables are none."""
    types = get_type_hints(kind)
    return {field.name: types[field.name] for field in _fields(kind)}


def _required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _convert(raw: Any, kind: Any, where: str, *, strict: bool) -> Any:
    """A value from a file (strict) or a flag (text) as `kind`, or InputError that says what is expected."""
    if get_origin(kind) is tuple and isinstance(raw, str):
        raw = [raw]
    if get_origin(kind) is dict and not strict:
        raw = _pairs(raw, where)
    try:
        value = msgspec.convert(raw, kind, strict=strict)
    except msgspec.ValidationError:
        raise InputError(f"{where} must be {_expected(kind)}, got {_shown(raw)}") from None
    for number in value.values() if isinstance(value, dict) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(f"{where} must be a finite number, got {number}")
    return value


def _pairs(given: Sequence[str], where: str) -> dict[str, str]:
    """`NAME=X` texts as a mapping; of two with one name the last counts, as with any flag."""
    pairs = {}
    for text in given:
        name, _, value = text.rpartition("=")
        if not name or not value:
            raise InputError(f"{where} must be a name or pattern, = and a number, got {_shown(text)}")
        pairs[name] = value
    return pairs


def _forms(kind: Any, column: int) -> list[str]:
    """What a value of a type may be, in words (column 0) or as a placeholder (1)."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(value) for value in inner]
    if origin in (Union, UnionType):
        return [form for part in inner for form in _forms(part, column)]
    return [WORDS[origin or kind][column]]


def _expected(kind: Any) -> str:
    """A type in words: "a whole number or auto"."""
    *forms, last = _forms(kind, 0)
    return ("one of " if len(forms) > 1 else "") + ", ".join(forms) + " or " * bool(forms) + last


def _shown(raw: Any) -> str:
    text = "null" if raw is None else repr(raw)
    return text if len(text) <= 80 else text[:77] + "..."


def help_page(kind: type, command: str) -> str:
    """What `fourbit COMMAND --help` prints: every option with its default, in groups."""
    types = _types(kind)
    groups: dict[str, list[str]] = {}
    for field in _fields(kind):
        head = _flag(field.name) + _metavar(field, types[field.name])
        groups.setdefault(_group(kind, field.name), []).append(_entry(head, field.metadata["help"] + _default(field)))
    output = groups.pop("output", [])  # last
    output += [_entry("-h, --help", "print this and exit"), _entry("--debug", "print tracebacks")]
    positional = getattr(kind, "positional", "").upper()
    usage = f"usage: fourbit {command} [CONFIG.yaml]{positional and f' [{positional} ...]'} [flags]"
    parts = [f"{title}:\n" + "\n".join(entries) for title, entries in [*groups.items(), ("output", output)]]
    return "\n\n".join([usage, inspect.cleandoc(kind.__doc__ or ""), *parts])


def _group(kind: type, name: str) -> str:
    """The title of the class that defines a field first, so that options read in groups."""
    base = next(base for base in reversed(kind.__mro__) if name in inspect.get_annotations(base))
    return str(vars(base).get("title", "training"))


def _entry(head: str, text: str) -> str:
    text = wrapped(text, " " * 32, " " * 32)
    return f"  {head:<28}  {text.lstrip()}" if len(head) <= 28 else f"  {head}\n{text}"


def _metavar(field: "Field[Any]", kind: Any) -> str:
    if kind is bool:
        return f", --no-{_flag(field.name)[2:]}"
    given = field.metadata.get("metavar") or METAVARS.get(field.name) or "|".join(filter(None, _forms(kind, 1)))
    return f" [{given}]" if field.name in BARE else f" {given}"


def _default(field: "Field[Any]") -> str:
    if _required(field):
        return " (required)"
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is None or default is False or default in ((), {}):
        return ""
    shown = "on" if default is True else " ".join(default) if isinstance(default, tuple) else default
    return f" (default: {shown})"
