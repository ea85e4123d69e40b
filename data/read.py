"""Files to rows; a line or an element that is none is one problem, with its line.

A file is JSON Lines or one JSON array. It is read as bytes and line by line, so a broken line costs that line and not
the file, and memory is bounded by the longest line allowed. Faults of a whole file (missing, a directory, UTF-16,
empty) raise at once: they cannot be skipped. JSON is taken strictly: no key twice, no NaN, no half characters, 64
levels.
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
from .row import Problem, Row, excerpt, type_name

MAX_DEPTH = 64
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 256 * 1024 * 1024
DISCARD_BYTES = 1 << 20
MAX_DISCARDED_BYTES = 1 << 28
SUFFIXES = (".jsonl", ".ndjson", ".json")
OTHER_FORMATS = (".parquet", ".csv", ".tsv", ".gz", ".zst", ".txt", ".md", ".arrow", ".yaml", ".yml")


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row | Problem]:
    """All rows of a `.jsonl`, `.ndjson` or `.json` file, and a problem for every line that holds no JSON object.

    Blank lines are passed over; a UTF-8 byte order mark and CRLF line ends are accepted. A file whose first character
    is `[` is read as one JSON array. Raises InputError for a file that cannot be read at all or that holds no rows.
    """
    name, empty = os.fspath(path), True
    _check_file(name)
    for item in _array_items(name) if _first_byte(name) == b"[" else _line_items(name):
        yield item
        empty = False
    if empty:
        raise InputError(f"{name}: the file holds no rows: expected one JSON object a line.")


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
                start = file.tell()
                while line and not line.endswith(b"\n"):
                    line = file.readline(DISCARD_BYTES)
                    if file.tell() - start > MAX_DISCARDED_BYTES:
                        size = f"{MAX_DISCARDED_BYTES // 2**20} MiB"
                        raise InputError(f"{name}: line {number} is longer than {size}: write one object a line.")
                yield Problem(name, number, "line", f"is longer than {MAX_LINE_BYTES // 2**20} MiB", "json")
            elif line.strip():
                yield _item(name, number, line)


def _item(name: str, line: int, raw: bytes | str) -> Row | Problem:
    """What a line, or an element of an array, holds: an object, or a problem."""
    try:
        value = parse(raw if isinstance(raw, str) else _decode(raw))
        if not isinstance(value, dict):
            raise Refused(f"is {type_name(value)}, not an object {{...}}")
        return Row(value, name, line)
    except Refused as error:
        return Problem(name, line, "line", f"{error}{error.hint}", "json")


def _decode(line: bytes) -> str:
    if b"\0" in line:
        raise Refused("holds NUL bytes: the file is damaged, or not UTF-8 text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise Refused(
            f"is not UTF-8: byte 0x{byte:02x} at column {error.start + 1}; if the file is Latin-1, convert it with"
            " iconv -f LATIN1 -t UTF-8"
        ) from None


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
    except Refused as error:
        raise InputError(f"{name}: {error}.") from None


class Refused(ValueError):
    """A text that is no JSON, or holds a value that a dataset must not; `hint` is for one that is a row."""

    def __init__(self, reason: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def _refuse_constant(text: str) -> NoReturn:
    raise Refused(f"holds {text}, which is not JSON: use null or leave the field out")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"holds the number {excerpt(text, 20)}, too large for a float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refused(f"the key {excerpt(twice)} stands twice in one object")
    return result


_UNFIT = re.compile("[\0\ud800-\udfff]")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def parse(text: str) -> Any:
    """One JSON value filling the whole of `text`. Raises Refused."""
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip()))
    except json.JSONDecodeError as error:
        raise _no_json(text, error) from None
    except RecursionError:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels") from None
    except Refused:
        raise
    except ValueError:
        raise Refused("holds a number with too many digits") from None
    if rest := text[end:].strip():
        hint = ": one object a line, without commas between" if rest.startswith((",", "{")) else ""
        raise Refused(f"more text follows the JSON value: {excerpt(rest)}", hint)
    if "\\u" in text or _UNFIT.search(text) or text.count("{") + text.count("[") > MAX_DEPTH:  # few rows are so
        _check_values(value)
    return value


def _no_json(text: str, error: json.JSONDecodeError) -> Refused:
    if not text.lstrip().startswith(("{", "[", '"')):
        return Refused(f"is not JSON: {excerpt(text.strip())}", "; expected an object {...}")
    if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
        return Refused("ends before the JSON value is complete", ": each row must stand whole on one line")
    near = excerpt(text[max(0, error.pos - 10) : error.pos + 20].strip(), 40)
    return Refused(f"is not valid JSON at column {error.pos + 1}: {error.msg}, near {near}")


def _check_values(value: Any) -> None:
    """Refuse text that no tokenizer takes, and nesting that would exhaust the stack later."""
    stack = [(value, "", 0)]
    while stack:
        node, where, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise Refused(f"is nested deeper than {MAX_DEPTH} levels")
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
    raise Refused(f"{where or 'a key'} holds {what}")


# Arrays.

_SPACE = re.compile(r"[ \t\r\n]*")
_ANY = json.JSONDecoder()


def elements(text: str) -> Iterator[tuple[int, str, str]]:
    """Of the array that fills a text: (line, an element's text, ""), or (line, "", what is wrong), so that a reader
    can name a bad one. A syntax error is the last: no more can be told."""
    at, line, counted = _past_space(text, text.index("[") + 1), 1, 0  # `line` is that of character `counted`
    first = True
    while not text.startswith("]", at):
        if not first:
            line, counted = line + text.count("\n", counted, at), at
            if not text.startswith(",", at):
                yield line, "", "the array is not closed: a comma or ] is missing here"
                return
            at = _past_space(text, at + 1)
        line, counted, first = line + text.count("\n", counted, at), at, False
        try:
            end = _ANY.raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            line += text.count("\n", at, error.pos)
            yield line, "", f"is not valid JSON: {error.msg}; the rest of the array is not read"
            return
        except (ValueError, RecursionError):  # digits or brackets without end: a strict reader of the rest says which
            yield line, text[at:], ""
            return
        yield line, text[at:end], ""
        at = _past_space(text, end)
    if rest := text[at + 1 :].strip():
        yield line + text.count("\n", counted, at), "", f"more text follows the array: {excerpt(rest)}"


def _past_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]
