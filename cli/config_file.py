"""A run's settings as a YAML file: read strictly, written with the source of every value.

YAML 1.1 reads `1e-4` as text and `on` or `no` as booleans, takes the last of two equal keys, and lets a few hundred
bytes of aliases unfold into gigabytes. Here numbers are numbers, only `true` and `false` are booleans, a key stands
once, and values are counted as they are built. PyYAML only finds nodes (its Python form: C dies of deep nesting).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_text, write_text

CONFIG = "config.yaml"  # what a run leaves in its folder
RUN = "fourbit run 1"  # the value of `format` in a file that a run wrote: what tells it from anybody else's
MAX_BYTES = 1 << 16
MAX_VALUES = 10_000  # with aliases unfolded
MAX_DIGITS = 4000
TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")]  # of nodes without a type of their own
WORDS = {"true": True, "false": False, "null": None, "~": None, "": None, ".nan": math.nan}
INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|\.inf)")


def read_config(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings in a YAML file by name (dashes read as underscores), and the lines that their keys stand on.
    Raises InputError, with file and line, for a file that is missing, too large, no YAML, no mapping, or ambiguous."""
    import yaml  # here: doctor tells where it is missing

    built = 0

    def build(node: yaml.Node, key: str) -> Any:
        """What a node under `key` says."""
        nonlocal built
        where, built = f"{path}:{node.start_mark.line + 1}", built + 1
        if built > MAX_VALUES:
            raise InputError(f"{where}: more than {MAX_VALUES:,} values, with aliases unfolded; a config is flat")
        if node.tag not in TAGS:
            raise InputError(f"{where}: the value of {key} has the type {node.tag}; a config's are told by their form")
        if isinstance(node, yaml.MappingNode):
            return {name: build(inner, key) for name, _, inner in _entries(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [build(inner, key) for inner in node.value]
        return node.value if getattr(node, "style", None) else scalar(node.value)

    text = read_text(Path(path), MAX_BYTES)
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}: a config holds one setting a line, as `name: value`")
        entries = [(name.replace("-", "_"), line, build(node, name)) for name, line, node in _entries(root, path)]
        entries = [entry for entry in entries if (entry[0], entry[2]) != ("format", RUN)]
        return {name: value for name, _, value in entries}, {name: line for name, line, _ in entries}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: this is no YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: this is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; a config is flat") from None


def _entries(node: Any, path: str) -> Iterator[tuple[str, int, Any]]:
    """Name, line and value of each entry. Raises InputError for a name that is no text or is said twice."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.id != "scalar" or not key.value.isprintable():
            raise InputError(f"{path}:{line}: a setting's name must be plain text")
        if (name := key.value.replace("-", "_")) in lines:
            raise InputError(f"{path}:{line}: {key.value} stands a second time; line {lines[name]} has it already")
        lines[name] = line
        yield key.value, line, value


def read_run(folder: str | Path) -> dict[str, Any]:
    """The settings that a run wrote into its folder; empty where there are none, or somebody else's."""
    if not (path := Path(folder) / CONFIG).is_file():
        return {}
    with path.open("rb") as file:
        ours = file.readline(100).strip() == f"format: {RUN}".encode()
    return read_config(str(path))[0] if ours else {}


def scalar(text: str) -> Any:
    """What text without quotes means: as in YAML 1.2, but octal, hexadecimal and overlong numbers are text."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text)
    return float(text.replace(".inf", "inf")) if FLOAT.fullmatch(text) else text


def write_config(path: Path, values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Write settings so that `read_config` gives them back, each with a comment that says where it came from. Errors as
    `config_text`."""
    write_text(path, config_text(path, values, sources))


def config_text(path: Path, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """What `write_config` writes. Raises InputError for more than is read."""
    settings = {}
    for name, value in values.items():  # as JSON, which is YAML too, with every character that could end a line escaped
        text = json.dumps(value, ensure_ascii=False)
        settings[name] = f"{name}: " + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in text)
    width = min(40, max(map(len, settings.values())))
    printable = {name: "".join(c if c.isprintable() else "?" for c in source) for name, source in sources.items()}
    lines = [f"{text:<{width}}  # {printable[name]}\n" for name, text in settings.items()]
    text = "".join([f"format: {RUN}\n", *lines])
    if (size := len(text.encode())) > MAX_BYTES:
        longest = max(settings, key=lambda name: len(settings[name]))
        what = f"{path} would have {size:,} bytes, most of them of {longest}, and at most {MAX_BYTES:,} are read"
        raise InputError(f"{what}: name fewer files (cat joins those of rows), or by shorter paths")
    return text
