"""Files to rows, and the rules that a row and its messages keep; whatever breaks one is one problem, with its line.

A file is JSON Lines or one JSON array. It is read as bytes and line by line, so a broken line costs that line and not
the file, and memory is bounded by the longest line allowed. Faults of a whole file (missing, a directory, UTF-16,
empty) raise at once: they cannot be skipped.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import InputError
from .json_array import elements
from .row import SHOWN_KEYS, UNUSED, Problem, Row, bad, excerpt, type_name

Messages = list[dict[str, Any]]

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 256 * 1024 * 1024
MAX_DEPTH = 64
DISCARD_BYTES = 65536
SUFFIXES = (".jsonl", ".ndjson", ".json")
OTHER_FORMATS = (".parquet", ".csv", ".tsv", ".gz", ".zst", ".txt", ".md", ".arrow", ".yaml", ".yml")
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_SYNONYMS = {"human": "user", "function": "tool", "observation": "tool"}
ROLE_SYNONYMS |= dict.fromkeys(("gpt", "bot", "model", "ai"), "assistant")
KEY_SYNONYMS = {"from": "role", "value": "content", "text": "content"}


class _Refused(ValueError):
    """A value that JSON's grammar lets through and a dataset must not hold."""


def read_rows(path: str | os.PathLike[str]) -> tuple[list[Row], list[Problem]]:
    """All rows of a `.jsonl`, `.ndjson` or `.json` file, and a problem for every line that holds no JSON object.

    Blank lines are passed over; a UTF-8 byte order mark and CRLF line ends are accepted. A file whose first character
    is `[` is read as one JSON array. Raises InputError for a file that cannot be read at all or that holds no rows.
    """
    name = os.fspath(path)
    _check_file(name)
    rows: list[Row] = []
    problems: list[Problem] = []
    source = _array_items(name) if _first_byte(name) == b"[" else _line_items(name)
    for item in source:
        (rows if isinstance(item, Row) else problems).append(item)  # type: ignore[arg-type]
    if not rows and not problems:
        raise InputError(f"{name}: the file holds no rows: expected one JSON object a line.")
    return rows, problems


def _check_file(name: str) -> None:
    if "\0" in name:
        raise InputError(f"{name!r}: a path cannot hold a NUL character.")
    try:
        info = os.stat(name)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file. Check the path of the data file.") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be opened: {error.strerror}.") from None
    if stat.S_ISDIR(info.st_mode):
        raise InputError(f"{name}: is a directory: name the data file itself (one of {', '.join(SUFFIXES)}).")
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{name}: is not a regular file (a pipe, socket or device): write the rows to a file first.")
    if (suffix := Path(name).suffix.lower()) not in SUFFIXES:
        known = "is not supported yet" if suffix in OTHER_FORMATS else "is no data format known here"
        raise InputError(f"{name}: {suffix or 'a name without a suffix'} {known}: use one of {', '.join(SUFFIXES)}.")
    if info.st_size == 0:
        raise InputError(f"{name}: the file is empty: expected one JSON object a line.")


def _open(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as error:
        raise InputError(f"{name}: cannot be opened: {error.strerror}.") from None


def _first_byte(name: str) -> bytes:
    """The first byte that is neither white space nor part of a byte order mark. Raises for what holds no such lines."""
    with _open(name) as file:
        chunk = file.read(65536)
        if chunk.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(chunk) > 3 and 0 in chunk[:2]):
            way = "save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it)"
            raise InputError(f"{name}: the file is UTF-16 or UTF-32: {way}.")
        if chunk.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"PAR1")):
            way = "unpack it to JSON Lines"
            raise InputError(f"{name}: the file is compressed or binary, whatever its name says: {way}.")
        while chunk:
            if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text[:1]
            chunk = file.read(65536)
    return b""


def _line_items(name: str) -> Iterator[Row | Problem]:
    with _open(name) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(DISCARD_BYTES)
                yield Problem(name, number, "line", f"is longer than {MAX_LINE_BYTES // 2**20} MiB", "json")
            elif line.strip():
                yield _item(name, number, line)


def _item(name: str, line: int, raw: bytes | str) -> Row | Problem:
    """What a line, or an element of an array, holds: an object, or a problem."""
    try:
        value = _parse(raw if isinstance(raw, str) else _decode(raw))
        if not isinstance(value, dict):
            raise _Refused(f"is {type_name(value)}, not an object {{...}}")
        _check_values(value)
        return Row(value, name, line)
    except _Refused as error:
        return Problem(name, line, "line", str(error), "json")


def _decode(line: bytes) -> str:
    if b"\0" in line:
        raise _Refused("holds NUL bytes: the file is damaged, or not UTF-8 text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise _Refused(
            f"is not UTF-8: byte 0x{byte:02x} at column {error.start + 1}; if the file is Latin-1, convert it with"
            " iconv -f LATIN1 -t UTF-8"
        ) from None


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(f"holds {text}, which is not JSON: use null or leave the field out")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"holds the number {excerpt(text, 20)}, too large for a float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the key {excerpt(twice)} stands twice in one object")
    return result


_UNFIT = re.compile("[\0\ud800-\udfff]")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def _parse(text: str) -> Any:
    """One JSON value filling the whole of `text`."""
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip()))
    except json.JSONDecodeError as error:
        raise _Refused(_json_reason(text, error)) from None
    except RecursionError:
        raise _Refused(f"is nested deeper than {MAX_DEPTH} levels") from None
    except _Refused:
        raise
    except ValueError:
        raise _Refused("holds a number with too many digits") from None
    if rest := text[end:].strip():
        hint = ": one object a line, without commas between" if rest.startswith((",", "{")) else ""
        raise _Refused(f"more text follows the JSON value: {excerpt(rest)}{hint}")
    return value


def _json_reason(text: str, error: json.JSONDecodeError) -> str:
    if not text.lstrip().startswith(("{", "[", '"')):
        return f"is not JSON: {excerpt(text.strip())}; expected an object {{...}}"
    if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
        return "ends before the JSON value is complete: each row must stand whole on one line"
    near = excerpt(text[max(0, error.pos - 10) : error.pos + 20].strip(), 40)
    return f"is not valid JSON at column {error.pos + 1}: {error.msg}, near {near}"


def _check_values(value: Any) -> None:
    """Refuse text that no tokenizer takes, and nesting that would exhaust the stack later."""
    stack = [(value, "", 0)]
    while stack:
        node, where, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _Refused(f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, str):
            _check_text(node, where)
        elif isinstance(node, dict):
            for key, child in node.items():
                _check_text(key, where)
                stack.append((child, f"{where}.{key}" if where else key, depth + 1))
        elif isinstance(node, list):
            stack.extend((child, f"{where}[{i}]", depth + 1) for i, child in enumerate(node))


def _check_text(text: str, where: str) -> None:
    if (text.isascii() and "\0" not in text) or not (found := _UNFIT.search(text)):
        return
    what = "a NUL character" if found.group() == "\0" else "a lone surrogate (half a character)"
    raise _Refused(f"{where or 'a key'} holds {what}")


def _array_items(name: str) -> Iterator[Row | Problem]:
    for line, element, wrong in elements(_array_text(name)):
        yield Problem(name, line, "file", wrong, "json") if wrong else _item(name, line, element)


def _array_text(name: str) -> str:
    size = os.path.getsize(name)
    if size > MAX_ARRAY_BYTES:
        raise InputError(
            f"{name}: a JSON array of {size} bytes; at most {MAX_ARRAY_BYTES} are read whole: write one object a line."
        )
    with _open(name) as file:
        raw = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        return _decode(raw)
    except _Refused as error:
        raise InputError(f"{name}: {error}.") from None


# Messages.


def trains(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def as_context(messages: Messages) -> Messages:
    """The messages of a prompt: its assistant turns are not learned, whatever their weight says."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def core(message: dict[str, Any]) -> tuple[Any, ...]:
    """What a model sees of a message: marks such as an id or a score make no other message of it."""
    return tuple(message.get(key) for key in ("role", "content", "tool_calls", "tool_call_id", "name"))


def checked_tools(row: Row, field: str, tools: Any) -> Messages | None:
    """The tools a row offers; None for none."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise bad(row, field, f"must be a list of objects, not {type_name(tools)}")
    return tools or None


def checked_messages(row: Row, field: str, value: Any) -> Messages:
    """A row's list of messages in the one shape. Raises BadRow for what is none, or breaks a rule of messages."""
    if not isinstance(value, list):
        raise bad(row, field, f"must be a list of messages, not {type_name(value)}")
    if not value:
        raise bad(row, field, "is an empty list", "empty")
    return [_message(row, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(row: Row, field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad(row, field, f"must be an object with `role` and `content`, not {type_name(message)}")
    role = _role(row, field, message)
    result = {**message, "role": role}
    if message.get("tool_calls") is not None:
        result["tool_calls"] = _tool_calls(row, f"{field}.tool_calls", message["tool_calls"], role)
    else:
        result.pop("tool_calls", None)
    result["content"] = _content(row, f"{field}.content", message, role)
    if "weight" in message:
        _check_weight(row, f"{field}.weight", message["weight"], role)
    return result


def _role(row: Row, field: str, message: dict[str, Any]) -> str:
    for key, meant in KEY_SYNONYMS.items():
        if key in message and meant not in message:
            raise bad(
                row, field, f'has `{key}` where `{meant}` is needed: a message is {{"role": ..., "content": ...}}'
            )
    if "role" not in message:
        raise bad(row, f"{field}.role", "is missing")
    role = message["role"]
    if not isinstance(role, str):
        raise bad(row, f"{field}.role", f"must be a string, not {type_name(role)}")
    if role not in ROLES:
        meant = ROLE_SYNONYMS.get(role.lower(), role.lower().strip())
        hint = f": did you mean {meant!r}?" if meant in ROLES else f": must be one of {', '.join(ROLES)}"
        raise bad(row, f"{field}.role", f"is {excerpt(role)}{hint}")
    return role


def _content(row: Row, field: str, message: dict[str, Any], role: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if "content" not in message:
        raise bad(row, field, "is missing")
    if isinstance(content, list):
        content = "".join(_part(row, f"{field}[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise bad(row, field, f"must be a string or a list of text parts, not {type_name(content)}")
    if role == "user" or (role == "assistant" and not message.get("tool_calls") and message.get("weight") != 0):
        return filled(row, field, content)
    return content


def _part(row: Row, field: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise bad(row, field, f'must be an object {{"type": "text", "text": ...}}, not {type_name(part)}')
    if part.get("type") != "text":
        raise bad(row, f"{field}.type", f"is {excerpt(str(part.get('type')))}: only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise bad(row, f"{field}.text", f"must be a string, not {type_name(part.get('text'))}")
    return str(part["text"])


def turn(row: Row, field: str, text: Any, role: str = "assistant") -> Messages:
    """A string as one turn."""
    return [{"role": role, "content": filled(row, field, text)}]


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages after the row's `system` text, unless it has none or they begin with a system message already."""
    text = row.data.get("system")
    if text in (None, "") or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return turn(row, "system", text, "system") + messages


def filled(row: Row, field: str, text: Any) -> str:
    """A string with something in it. Raises BadRow."""
    if not isinstance(text, str):
        raise bad(row, field, f"must be a string, not {type_name(text)}")
    if not text:
        raise bad(row, field, "is empty", "empty")
    if text.isspace():
        raise bad(row, field, "holds only white space", "empty")
    return text


def _check_weight(row: Row, field: str, weight: Any, role: str) -> None:
    if isinstance(weight, bool) or weight not in (0, 1):
        raise bad(row, field, f"must be 0 or 1, not {excerpt(repr(weight))[1:-1]}")
    if role != "assistant":
        raise bad(row, field, f"belongs on assistant turns only, this one is {role!r}")


def _tool_calls(row: Row, field: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as chat templates want them (OpenAI writes them as JSON text)."""
    if role != "assistant":
        raise bad(row, field, f"belongs on assistant turns only, this one is {role!r}")
    if not isinstance(calls, list):
        raise bad(row, field, f"must be a list, not {type_name(calls)}")
    return [_tool_call(row, f"{field}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(row: Row, field: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(row, field, 'must be an object {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise bad(row, f"{field}.arguments", "is not valid JSON") from None
    if not isinstance(arguments, dict):
        raise bad(row, f"{field}.arguments", f"must be a JSON object, not {type_name(arguments)}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def counted(notes: Counter[str], rows: int) -> list[str]:
    """Notes of rows as notices that say how many rows each is of; of fields that are not used the 8 most frequent."""
    unused = sorted((note for note in notes if note.startswith(UNUSED)), key=lambda note: (-notes[note], note))
    said = [*sorted(note for note in notes if note not in set(unused)), *unused[:SHOWN_KEYS]]
    more = [f"... and {len(unused) - SHOWN_KEYS} more keys that are not used"] if len(unused) > SHOWN_KEYS else []
    return [f"{notes[note]} of {rows} rows: {note}" for note in said] + more
