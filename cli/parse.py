"""From flags and a YAML file to one frozen dataclass of options, and where each value came from.

The dataclass is all there is to say: its fields are the flags (`micro_batch` is `--micro-batch`), it checks their types
and bounds itself (`settings.Checked`), their metadata is the help, the class that defines a field first names its group
by its `title`, its own docstring heads the help. Order: defaults, the file, the flags.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_args, get_origin

from ..errors import InputError, shown
from ..settings import forms
from ..synonyms import hint
from .config_file import read_config, scalar
from .show import wrapped

T = TypeVar("T")
Sources = Mapping[str, str]  # of each option by name: DEFAULT, FLAG or "FILE:LINE"
DEFAULT, FLAG = "default", "flag"
FLAG_LIKE = re.compile(r"-[^\d.]")  # -0.5 is a value


def options_of(kind: Any) -> dict[str, Field[Any]]:
    """The fields of a dataclass by name, in order."""
    return {option.name: option for option in fields(kind)}


def flag_of(name: str) -> str:
    """`micro_batch` as a flag."""
    return "--" + name.replace("_", "-")


def parse(kind: type[T], command: str, args: Sequence[str]) -> tuple[T, Sources]:
    """The options `kind` (a `Checked` dataclass) from arguments and the YAML file they may name, and their sources.
    Bare arguments fill the option that `kind.positional` names, if it does, besides a file that ends in .yaml or .yml.
    Raises InputError naming the flag or the file's line."""
    options = options_of(kind)
    flags, bare = _given(options, command, args)
    configs = [arg for arg in bare if arg.endswith((".yaml", ".yml"))]
    if len(configs) > 1:
        raise InputError(f"one config file a run, got {' and '.join(configs)}")
    if bare := [arg for arg in bare if arg not in configs]:
        if (positional := getattr(kind, "positional", None)) is None:
            raise InputError(
                f"unexpected argument {bare[0]!r}: fourbit {command} takes flags and one config file that ends in .yaml"
            )
        flags[positional] = bare + flags.get(positional, [])
    values, sources = dict[str, Any](), dict.fromkeys(options, DEFAULT)
    written, lines = read_config(configs[0]) if configs else ({}, {})
    for name, raw in written.items():
        sources[name] = where = f"{configs[0]}:{lines[name]}"
        if name not in options:
            raise InputError(f"{where}: unknown setting {shown(name)}{hint(name, options)}")
        listed = get_origin(options[name].type) is tuple and isinstance(raw, str)
        values[name] = [raw] if listed else raw
    for name, raw in flags.items():
        sources[name], option = FLAG, options[name]
        if get_origin(option.type) is dict:
            values[name] = _pairs(raw, flag_of(option.name))
        else:  # by the rules of a config file; where text is asked for, the text itself
            is_text = str in (option.type, *get_args(option.type))
            values[name] = scalar(raw) if isinstance(raw, str) and not is_text else raw
    if missing := [flag_of(name) for name in options if _is_required(options[name]) and name not in values]:
        raise InputError(f"fourbit {command} needs {', '.join(missing)}; see fourbit {command} --help")
    try:
        return kind(**values), sources
    except InputError as error:  # `lr must be above 0`, after where the value came from
        name, _, rest = str(error).partition(" ")
        source = sources.get(name, DEFAULT)
        if source == DEFAULT:
            raise
        raise InputError(f"{flag_of(name)} {rest}" if source == FLAG else f"{source}: {error}") from None


def _given(options: Mapping[str, Field[Any]], command: str, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What flags say by name (text, True or False; a list where a flag may be repeated), and the bare arguments."""
    named = {flag_of(name): option for name, option in options.items()}
    named |= {flag_of(f"no_{name}"): option for name, option in options.items() if option.type is bool}
    flags, bare, rest = dict[str, Any](), list[str](), list(reversed(args))
    while rest:
        arg = rest.pop()
        if not FLAG_LIKE.match(arg):
            bare.append(arg)
            continue
        flag, equals, text = arg.partition("=")
        if flag not in named:
            near = hint(flag.lstrip("-"), options, flag=True) or f"; see fourbit {command} --help"
            raise InputError(f"unknown flag {flag}{near}")
        option = named[flag]
        value: Any
        if option.type is bool:
            if equals:
                raise InputError(f"{flag} takes no value, got {text!r}; there are {flag_of(option.name)} and --no-...")
            value = flag == flag_of(option.name)
        elif equals:
            value = text
        elif rest and not FLAG_LIKE.match(rest[-1]):
            value = rest.pop()
        elif not (value := option.metadata["bare"]):
            raise InputError(f"{flag}: needs a value; see fourbit {command} --help")
        if get_origin(option.type) in (tuple, dict):
            flags.setdefault(option.name, []).append(value)
        else:
            flags[option.name] = value
    return flags, bare


def _pairs(given: Sequence[str], flag: str) -> dict[str, Any]:
    """`NAME=X` texts as a mapping; of two with one name the last counts, as with any flag."""
    pairs = {}
    for text in given:
        name, _, value = text.rpartition("=")
        if not name or not value:
            raise InputError(f"{flag} must be a name or pattern, = and a number, got {shown(text)}")
        pairs[name] = scalar(value)
    return pairs


def help_page(kind: type, command: str) -> str:
    """What `fourbit COMMAND --help` prints: every option with its default, in groups."""
    groups: dict[str, list[str]] = {}
    for option in options_of(kind).values():
        first = next(base for base in reversed(kind.__mro__) if option.name in inspect.get_annotations(base))
        groups.setdefault(vars(first).get("title", "training"), []).append(_entry(*_described(option)))
    output = groups.pop("output", [])  # last
    output += [_entry("-h, --help", "print this and exit"), _entry("--debug", "print tracebacks")]
    positional = getattr(kind, "positional", "").upper()
    usage = f"usage: fourbit {command} [CONFIG.yaml]{positional and f' [{positional} ...]'} [flags]"
    parts = [f"{title}:\n" + "\n".join(entries) for title, entries in [*groups.items(), ("output", output)]]
    return "\n\n".join([usage, inspect.cleandoc(kind.__doc__ or ""), *parts])


def _is_required(option: Field[Any]) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _entry(head: str, text: str) -> str:
    text = wrapped(text, " " * 32, " " * 32)
    return f"  {head:<28}  {text.lstrip()}" if len(head) <= 28 else f"  {head}\n{text}"


def _described(option: Field[Any]) -> tuple[str, str]:
    """The flag with what stands for its value, and the help with its default."""
    default, told = option.default, ""
    if _is_required(option):
        told = " (required)"
    elif not any(default is nothing for nothing in (None, False, MISSING)) and default != ():
        shown = "on" if default is True else " ".join(default) if isinstance(default, tuple) else default
        told = f" (default: {shown})"
    if option.type is bool:
        head = f"{flag_of(option.name)}, {flag_of(f'no_{option.name}')}"
    else:
        value = option.metadata["metavar"] or "|".join(filter(None, forms(option.type, 1)))
        head = f"{flag_of(option.name)} [{value}]" if option.metadata["bare"] else f"{flag_of(option.name)} {value}"
    return head, option.metadata["help"] + told
