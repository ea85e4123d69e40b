"""A run's settings as a YAML file: read strictly, written with the source of every value.

YAML 1.1 reads `1e-4` as text and `on` or `no` as booleans, takes the last of two equal keys, and lets a few hundred
bytes of aliases unfold into gigabytes. Here numbers are numbers, only `true` and `false` are booleans, a key stands
once, and aliases are counted before anything is built.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import InputError

MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_DEPTH = 50


@dataclass(frozen=True)
class Setting:
    """One value of a file and the line that its key stands on."""

    value: Any
    line: int


def read_config(path: str) -> dict[str, Setting]:
    """The settings in a YAML file by name (dashes read as underscores).

    Raises InputError, with file and line, for a file that is missing, too large, no YAML, no mapping, or ambiguous.
    """
    import yaml

    text = _text(path)
    loader = _loader_class()
    try:
        _count_aliases(path, text)
        node = yaml.compose(text, Loader=loader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: a config holds one setting a line, as `name: value`")
        _refuse_duplicates(path, node)
        return dict(_settings(path, node, loader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: this is no YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: this is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; a config is flat") from None


def write_config(path: Path, values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Write settings so that `read_config` gives them back, each with a comment that says where it came from."""
    settings = {name: f"{name}: {_yaml_value(value)}" for name, value in values.items()}
    width = min(40, max(len(setting) for setting in settings.values()))
    lines = [f"{setting:<{width}}  # {_one_line(sources[name])}\n" for name, setting in settings.items()]
    path.write_text("".join(lines), encoding="utf-8")


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _text(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read this config: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: a config may have {MAX_BYTES:,} bytes at most; is this the right file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a config must be UTF-8 text; byte {error.start} is not") from None


@cache
def _scalars() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """First character -> the plain scalars that are not text, as in YAML 1.2 less octal and hexadecimal numbers."""
    rules = [
        ("bool", r"true|false", "tf"),
        ("int", r"[-+]?\d+", "-+0123456789"),
        ("float", r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
        ("null", r"null|~|", "n~"),
    ]
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {"": []}
    for tag, pattern, first in rules:
        for character in [*first, *([""] if tag == "null" else [])]:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})$")))
    return table


@cache
def _loader_class() -> Any:
    """PyYAML's safe loader, in C where it was built, with our scalars."""
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("ConfigLoader", (base,), {"yaml_implicit_resolvers": _scalars()})
    loader.add_constructor("tag:yaml.org,2002:int", lambda self, node: int(self.construct_scalar(node)))
    return loader


@cache
def _dumper_class() -> Any:
    """Quotes exactly what our loader would not read as text."""
    import yaml

    return type("ConfigDumper", (yaml.SafeDumper,), {"yaml_implicit_resolvers": _scalars()})


def _count_aliases(path: str, text: str) -> None:
    import yaml

    aliases = depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > MAX_ALIASES or depth > MAX_DEPTH:
            what = f"{MAX_ALIASES} aliases" if aliases > MAX_ALIASES else f"{MAX_DEPTH} levels"
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise InputError(f"{path}:{line}: more than {what}; a config is flat and needs none")


def _refuse_duplicates(path: str, node: Any) -> None:
    """Over the whole tree, so that no inner list of mappings loses a key either."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
            if name in seen:
                raise InputError(f"{path}:{line}: {key.value} stands a second time; line {seen[name]} has it already")
            seen[name] = line
            _refuse_duplicates(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(path, value)


def _settings(path: str, node: Any, loader: Any) -> Iterator[tuple[str, Setting]]:
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str) or not key.value.isprintable():
            raise InputError(f"{path}:{line}: a setting's name must be plain text")
        builder = loader("")
        try:
            built = builder.construct_document(value)
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError):  # `!!int x`, `!!bool x` and the like
            raise InputError(f"{path}:{line}: the value of {key.value} cannot be read") from None
        finally:
            builder.dispose()
        yield key.value.replace("-", "_"), Setting(built, line)


def _yaml_value(value: Any) -> str:
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    readable = str(value).isprintable()  # else escaped: some line separators do not survive PyYAML as they are
    text = yaml.dump(
        plain, Dumper=_dumper_class(), default_flow_style=True, allow_unicode=readable, width=10**6, sort_keys=False
    )
    return str(text).removesuffix("...\n").strip()
