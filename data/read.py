"""JSON Lines (or one JSON array) into rows, each knowing its file and line; what is no row becomes one clear problem.

A file is read as bytes and line by line, so a broken line costs that line and not the file, and memory is bounded by
the longest line allowed. Faults of a whole file (missing, a directory, UTF-16, empty) raise at once: they cannot be
skipped.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 256 * 1024 * 1024
MAX_DEPTH = 64
DISCARD_BYTES = 65536
SUFFIXES = (".jsonl", ".ndjson", ".json")
OTHER_FORMATS = (".parquet", ".csv", ".tsv", ".gz", ".zst", ".txt", ".md", ".arrow", ".yaml", ".yml")
EXCERPT = 60


@dataclass(frozen=True)
class Problem:
    """One row that cannot be used; `str()` is one line, `file:line: field: reason`; `kind` groups them for counting."""

    file: str
    line: int
    field: str
    reason: str
    kind: str = "row"

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}: {self.field}: {self.reason}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class BadRow(InputError):
    """A single unusable row, raised where a row is handled alone; `.problem` says which and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class Row:
    """One JSON object and where it stood (lines count from 1)."""

    data: dict[str, Any]
    file: str
    line: int


class _Refused(ValueError):
    """A value that JSON's grammar lets through and a dataset must not hold."""


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """A quoted, shortened copy of `text` for a message."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


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
    _check_suffix(name)
    if info.st_size == 0:
        raise InputError(f"{name}: the file is empty: expected one JSON object a line.")
    _check_encoding(name)


def _check_suffix(name: str) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        return
    known = "is not supported yet" if suffix in OTHER_FORMATS else "is no data format known here"
    raise InputError(f"{name}: {suffix or 'a name without a suffix'} {known}: use one of {', '.join(SUFFIXES)}.")


def _check_encoding(name: str) -> None:
    """Raise for encodings in which no line could be read."""
    with _open(name) as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(head) > 3 and (head[0] == 0 or head[1] == 0)):
        raise InputError(f"{name}: the file is UTF-16 or UTF-32: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it).")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"PAR1")):
        raise InputError(f"{name}: the file is compressed or binary, whatever its name says: unpack it to JSON Lines.")


def _open(name: str) -> Any:
    try:
        return open(name, "rb")
    except OSError as error:
        raise InputError(f"{name}: cannot be opened: {error.strerror}.") from None


def _first_byte(name: str) -> bytes:
    """The first byte that is neither white space nor part of a byte order mark."""
    with _open(name) as file:
        while chunk := file.read(65536):
            if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return bytes(text[:1])
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
                yield _item_from_line(name, number, line)


def _item_from_line(name: str, number: int, line: bytes) -> Row | Problem:
    try:
        return _row(name, number, _parse(_decode(line)))
    except _Refused as error:
        return Problem(name, number, "line", str(error), "json")


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


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def _parse(text: str) -> Any:
    """One JSON value filling the whole of `text`."""
    try:
        value, end = _scan(text, len(text) - len(text.lstrip()))
    except json.JSONDecodeError as error:
        raise _Refused(_json_reason(text, error)) from None
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


def _scan(text: str, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise _Refused(f"is nested deeper than {MAX_DEPTH} levels") from None
    except (json.JSONDecodeError, _Refused):
        raise
    except ValueError:
        raise _Refused("holds a number with too many digits") from None


def _row(name: str, number: int, value: Any) -> Row | Problem:
    if not isinstance(value, dict):
        return Problem(name, number, "line", f"is a JSON {_json_type(value)}, not an object {{...}}", "json")
    _check_values(value)
    return Row(value, name, number)


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}.get(type(value), "object")


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
    if text.isascii():
        bad = "\0" in text and "a NUL character"
    else:
        bad = ("\0" in text and "a NUL character") or (_has_surrogate(text) and "a lone surrogate (half a character)")
    if bad:
        raise _Refused(f"{where or 'a key'} holds {bad}")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _array_items(name: str) -> Iterator[Row | Problem]:
    """The elements of a file that is one JSON array; a syntax error ends it, as no later row can be told."""
    text = _array_text(name)
    cursor = _Cursor(text, text.index("[") + 1)
    first = True
    while not cursor.at("]"):
        if not first and not cursor.take(","):
            yield Problem(name, cursor.line, "file", "the array is not closed: a comma or ] is missing here", "json")
            return
        item, end = _element(name, cursor)
        yield item
        if end is None:
            return
        cursor.move(end)
        first = False
    if rest := text[cursor.position + 1 :].strip():
        yield Problem(name, cursor.line, "file", f"more text follows the array: {excerpt(rest)}", "json")


class _Cursor:
    """A position in a text that knows its line and stands on no white space."""

    def __init__(self, text: str, position: int) -> None:
        self.text, self.position, self.line = text, 0, 1
        self.move(position)

    def move(self, position: int) -> None:
        position = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def at(self, mark: str) -> bool:
        return self.text.startswith(mark, self.position)

    def take(self, mark: str) -> bool:
        """Step over `mark` if it stands here."""
        found = self.at(mark)
        if found:
            self.move(self.position + len(mark))
        return found


def _element(name: str, cursor: _Cursor) -> tuple[Row | Problem, int | None]:
    """The element that stands here, and where it ends; None where that cannot be told."""
    try:
        value, end = _scan(cursor.text, cursor.position)
    except json.JSONDecodeError as error:
        line = cursor.line + cursor.text.count("\n", cursor.position, error.pos)
        reason = f"is not valid JSON: {error.msg}; the rest of the array is not read"
        return Problem(name, line, "file", reason, "json"), None
    except _Refused as error:
        return Problem(name, cursor.line, "line", str(error), "json"), _lenient_end(cursor.text, cursor.position)
    try:
        return _row(name, cursor.line, value), end
    except _Refused as error:
        return Problem(name, cursor.line, "line", str(error), "json"), end


def _lenient_end(text: str, position: int) -> int | None:
    """Where an element ends whose values are refused (NaN, a key twice)."""
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return None


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
