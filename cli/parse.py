"""From flags and a YAML file to one frozen dataclass of options, and where each value came from.

The dataclass is all there is to say: its fields are the flags (`micro_batch` is `--micro-batch`), their types are
checked alike for flags and files, their metadata is the help, and the class that defines a field names its group.
Order: defaults, then the file, then the flags.
"""

import argparse
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Generic, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError
from .config_file import read_config
from .synonyms import hint

T = TypeVar("T")

FLAG = "flag"
DEFAULT = "default"
BARE = {"resume": "auto"}  # options whose flag may stand without a value, and what it means then
METAVARS = {
    "out": "PATH",
    "template": "NAME|FILE",
    "resume": "auto|PATH",
    "log": "NAME",
    "lr_scale": "PATTERN=X",
    "optimizer_budget": "auto|SIZE",
    "loss": "NAME[=WEIGHT]",
    "divergence": "NAME",
    "reference_cache": "FILE",
}  # where the type says too little


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """Options, and the source of each by name: "default", "flag" or "FILE:LINE"."""

    options: T
    sources: Mapping[str, str]


def parse(kind: type[T], args: Sequence[str], *, command: str, about: str, positional: str | None = None) -> Parsed[T]:
    """Read the options `kind` (a frozen dataclass) from command-line arguments and the YAML file they may name.

    positional: the option that bare arguments fill, besides a file that ends in .yaml or .yml.
    Raises InputError naming the flag or the file's line; prints the help and exits on `--help`.
    """
    hints = _types(kind)
    given, rest = _parser(kind, command, about, positional).parse_known_args(list(args))
    _refuse_unknown_flags(rest, hints, command)
    config, bare = _config_among(rest)
    flags = {**vars(given), **_bare(bare, vars(given), hints, command, positional)}
    values: dict[str, Any] = {}
    sources = dict.fromkeys(hints, DEFAULT)
    for name, setting in read_config(config).items() if config else ():
        where = f"{config}:{setting.line}"
        if name not in hints:
            raise InputError(f"{where}: unknown setting {name!r}{hint(name, hints)}")
        values[name] = _convert(setting.value, hints[name], f"{where}: {name}", strict=True)
        sources[name] = where
    for name, raw in flags.items():
        values[name] = _convert(raw, hints[name], _flag(name), strict=False)
        sources[name] = FLAG
    return Parsed(_made(kind, values, sources, command), sources)


def _made(kind: type[T], values: Mapping[str, Any], sources: Mapping[str, str], command: str) -> T:
    """The options object; what it finds wrong with itself is told with the place it came from."""
    missing = [_flag(field.name) for field in _fields(kind) if _required(field) and field.name not in values]
    if missing:
        raise InputError(f"fourbit {command} needs {', '.join(missing)}; see fourbit {command} --help")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(_with_source(str(error), sources)) from None


def _refuse_unknown_flags(rest: Sequence[str], known: Mapping[str, Any], command: str) -> None:
    for arg in rest:
        if arg.startswith("-"):
            name = arg.lstrip("-").partition("=")[0]
            near = hint(name, known, spell="--{}") or f"; see fourbit {command} --help"
            raise InputError(f"unknown flag {arg.partition('=')[0]}{near}")


def _config_among(rest: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file among bare arguments, if any, and the others."""
    configs = [arg for arg in rest if arg.endswith((".yaml", ".yml"))]
    if len(configs) > 1:
        raise InputError(f"one config file a run, got {' and '.join(configs)}")
    return (configs[0] if configs else None), [arg for arg in rest if arg not in configs]


def _bare(
    bare: Sequence[str], given: Mapping[str, Any], hints: Mapping[str, Any], command: str, positional: str | None
) -> dict[str, Any]:
    """Bare arguments as the option that they fill, before what its flag gave."""
    if not bare:
        return {}
    if positional is None:
        raise InputError(
            f"unexpected argument {bare[0]!r}: fourbit {command} takes flags and one config file that ends in .yaml"
        )
    return {positional: [*bare, *given.get(positional, [])] if _is_tuple(hints[positional]) else bare[-1]}


class _Parser(argparse.ArgumentParser):
    """Errors as exceptions, in our words."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("argument ", "", 1).replace("expected one argument", "needs a value")
        raise InputError(f"{message}; see {self.prog} --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help whose lines break at blanks alone: half of a name with a hyphen is no name."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def _parser(kind: type, command: str, about: str, positional: str | None) -> _Parser:
    bare = f" [{positional.upper()} ...]" if positional else ""
    parser = _Parser(
        prog=f"fourbit {command}",
        usage=f"fourbit {command} [CONFIG.yaml]{bare} [flags]",
        description=about,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,  # so what comes back is what was given
        formatter_class=lambda prog: _Help(prog, max_help_position=32, width=_width()),
    )
    hints = _types(kind)
    titles = [_group(kind, field.name) for field in _fields(kind)]
    order = [*dict.fromkeys(title for title in titles if title != "output"), "output"]
    groups = {title: parser.add_argument_group(title) for title in order}
    for title, field in zip(titles, _fields(kind), strict=True):
        groups[title].add_argument(_flag(field.name), dest=field.name, **_how(field, hints[field.name]))
    groups["output"].add_argument("-h", "--help", action="help", help="print this and exit")
    groups["output"].add_argument("--debug", action="store_true", help="print tracebacks")  # main() takes it off before
    return parser


def _fields(kind: Any) -> "tuple[Field[Any], ...]":
    return fields(kind)


def _types(kind: type) -> dict[str, Any]:
    """Type of every option by name; class variables are none."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in _fields(kind)}


def _how(field: "Field[Any]", hint: Any) -> dict[str, Any]:
    """argparse's keywords for one field: values stay text here, they are checked with those of the file."""
    text = str(field.metadata.get("help", "")).replace("%", "%%") + _default_text(field)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    metavar = field.metadata.get("metavar") or METAVARS.get(field.name) or _metavar(hint)
    if _is_tuple(hint) or _is_mapping(hint):
        return {"action": "append", "metavar": metavar, "help": text}
    if field.name in BARE:
        return {"nargs": "?", "const": BARE[field.name], "metavar": metavar, "help": text}
    return {"metavar": metavar, "help": text}


def _default_text(field: "Field[Any]") -> str:
    if _required(field):
        return " (required)"
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is None or default == () or default == {} or default is False:
        return ""
    if default is True:
        return " (default: on)"
    return f" (default: {' '.join(default) if isinstance(default, tuple) else default})"


def _required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _group(kind: type, name: str) -> str:
    """The title of the class that defines a field, so that options read in groups."""
    for base in reversed(kind.__mro__):
        if name in vars(base).get("__annotations__", {}):
            return str(vars(base).get("title", "training"))
    return "training"


def _width() -> int:
    return min(120, shutil.get_terminal_size().columns)


def _convert(raw: Any, hint: Any, where: str, *, strict: bool) -> Any:
    """A value from a file (strict) or a flag (text) as `hint`, or InputError that says what is expected."""
    import msgspec

    if _is_tuple(hint) and isinstance(raw, str):
        raw = [raw]
    if _is_mapping(hint) and not strict:
        raw = _pairs(raw, where)
    try:
        value = msgspec.convert(raw, hint, strict=strict)
    except msgspec.ValidationError:
        raise InputError(f"{where} must be {_expected(hint)}, got {_shown(raw)}") from None
    for number in value.values() if isinstance(value, dict) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(f"{where} must be a finite number, got {number}")
    return value


def _pairs(given: Sequence[Any], where: str) -> dict[str, str]:
    """`NAME=X` texts as a mapping; of two with one name the last counts, as with any flag."""
    pairs = [str(text).rpartition("=") for text in given]
    for text, (name, _, value) in zip(given, pairs, strict=True):
        if not name or not value:
            raise InputError(f"{where} must be a name or pattern, = and a number, got {_shown(text)}")
    return {name: value for name, _, value in pairs}


def _expected(hint: Any) -> str:
    """A type in words: "a whole number or auto"."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint))) if len(get_args(hint)) > 1 else str(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_expected(part) for part in get_args(hint))
    if _is_tuple(hint):
        return "text or a list of texts"
    if _is_mapping(hint):
        return "a mapping of names or patterns to numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}[hint]


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return "|".join(_metavar(part) for part in get_args(hint) if part is not NoneType)
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _shown(raw: Any) -> str:
    text = "null" if raw is None else repr(raw)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_source(message: str, sources: Mapping[str, str]) -> str:
    """`lr must be above 0` as `--lr must be above 0` or with the file's line, after where the value came from."""
    name, _, rest = message.partition(" ")
    source = sources.get(name)
    if source is None or source == DEFAULT:
        return message
    return f"{_flag(name)} {rest}" if source == FLAG else f"{source}: {message}"
