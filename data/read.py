"""Files and objects to rows; a line, an element or an object that is none is one problem, with its place.

A file is JSON Lines or one JSON array. It is read as bytes and line by line, so a broken line costs that line and not
the file, and memory is bounded by the longest line allowed. Faults of a whole file (missing, a directory, UTF-16,
empty) raise at once: they cannot be skipped. JSON is taken strictly: no key twice, no NaN, no half characters, 64
levels. Objects (a list of dicts, a dataset, a generator) are held to the same.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import Dataset as TorchDataset

from ..errors import InputError, shown
from .row import BadRow, Place, Row, type_name

MAX_DEPTH = 64
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 256 * 1024 * 1024
DISCARD_BYTES = 1 << 20
MAX_DISCARDED_BYTES = 1 << 28
MAX_UNCOUNTED = 200_000  # rows of what has no length, and may have no end
SUFFIXES = (".jsonl", ".ndjson", ".json")


Rows = str | os.PathLike[str] | Iterable[object] | TorchDataset[object]


def sources(rows: Any, name: str = "rows") -> list[Iterator[Row | BadRow]]:
    """Of one or several files, or of rows given as objects, which errors call `name`: a `read_rows` of each."""
    paths = isinstance(rows, list | tuple) and rows and all(isinstance(row, str | os.PathLike) for row in rows)
    return [read_rows(path) for path in rows] if paths else [read_rows(rows, name)]


def read_rows(rows: Rows, name: str = "rows") -> Iterator[Row | BadRow]:
    """All rows of a `.jsonl`, `.ndjson` or `.json` file, and a problem for every line that holds no JSON object.

    Blank lines are passed over; a UTF-8 byte order mark and CRLF line ends are accepted. A file whose first character
    is `[` is read as one JSON array. Rows may also be given as objects, which errors then call `name`: dicts, or lists
    of messages, in anything that has an end and can be gone through or counted through, as a `datasets.Dataset`, a
    torch one or a generator (of what has no length 200,000 rows at most). Arrays and tensors in them count as lists.
    Raises InputError for what cannot be read at all or holds no rows."""
    none = "give one dict a row; a generator gives its rows but once"
    if isinstance(rows, str | os.PathLike):
        name, none = os.fspath(rows), "expected one JSON object a line"
        items = _file_items(name)
    else:
        items = _objects(rows, name)
    empty = True
    for item in items:
        yield item
        empty = False
    if empty:
        raise InputError(f"{name} holds no rows: {none}.")


def _objects(rows: Any, name: str) -> Iterator[Row | BadRow]:
    """Of rows given as objects each as a row, or a problem."""
    if isinstance(rows, Mapping):
        raise InputError(f"{name} is one dict, of {shown([*rows])}: give a list of rows, or one of its parts")
    try:
        most = max(len(rows), MAX_UNCOUNTED)
        rows = rows if hasattr(rows, "__iter__") else map(rows.__getitem__, range(len(rows)))
    except (TypeError, NotImplementedError):  # no length, also of a class that has __len__, as torch's loaders
        most = MAX_UNCOUNTED
    try:
        items = iter(rows)
    except TypeError:
        what = "a file's path, several, a list of dicts or another iterable of dicts"
        raise InputError(f"{name} must be {what}, got {shown(rows)} ({type(rows).__name__})") from None
    for number, item in enumerate(items, 1):
        if number > most:
            raise InputError(f"{name} goes on after {most:,} rows: list(itertools.islice(rows, N)) takes the first N")
        given = {"messages": item} if isinstance(item, list) else item
        yield _item(Place(name, number, in_file=False), "row", partial(json_value, given))


def _file_items(name: str) -> Iterator[Row | BadRow]:
    with _opened(name) as file:
        yield from _objects(_array(file, name), name) if _first_byte(file, name) == b"[" else _line_items(file, name)


def _opened(name: str) -> BinaryIO:
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):
            inside = f"a directory: name the data file in it (one of {', '.join(SUFFIXES)})"
            what = inside if stat.S_ISDIR(mode) else "a pipe or device: write the rows to a file first"
            raise InputError(f"{name}: must be a regular file, and is {what}.")
        if (suffix := Path(name).suffix.lower()) not in SUFFIXES:
            what = suffix or "a name without a suffix"
            raise InputError(f"{name}: {what} is no format that is read here: use one of {', '.join(SUFFIXES)}.")
        return open(name, "rb")
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the latter of a NUL in the name
        raise InputError(f"{name}: cannot be opened: {getattr(error, 'strerror', error)}.") from None


def _first_byte(file: BinaryIO, name: str) -> bytes:
    """The first byte that is no white space; the file is left after its byte order mark. Raises for what holds no such
    lines."""
    chunk = file.read(65536)
    if chunk.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(chunk) > 3 and 0 in chunk[:2]):
        raise InputError(f"{name}: the file is UTF-16 or UTF-32: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it).")
    if chunk.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"PAR1")):
        what = "the file is compressed or binary, whatever its name says"
        raise InputError(f"{name}: {what}: unpack it to JSON Lines.")
    mark = 3 * chunk.startswith(b"\xef\xbb\xbf")
    chunk = chunk[mark:]
    while chunk and not chunk.strip():
        chunk = file.read(65536)
    file.seek(mark)
    return chunk.lstrip()[:1]


def _line_items(file: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            start = file.tell()
            while line and not line.endswith(b"\n"):
                line = file.readline(DISCARD_BYTES)
                if file.tell() - start > MAX_DISCARDED_BYTES:
                    size = f"{MAX_DISCARDED_BYTES // 2**20} MiB"
                    raise InputError(f"{name}: line {number} is longer than {size}: write one object a line.")
            yield BadRow(Place(name, number), "line", f"is longer than {MAX_LINE_BYTES // 2**20} MiB", "json")
        elif line.strip():
            yield _item(Place(name, number), "line", partial(parse, line))


def _item(place: Place, field: str, read: Callable[[], Any]) -> Row | BadRow:
    """What a line, an element of an array or an object holds: a row, or a problem."""
    try:
        value = read()
        if not isinstance(value, dict):
            raise Refused(f"is {type_name(value)}, not an object {{...}}")
        return Row(value, place)
    except Refused as error:
        return BadRow(place, field, f"{error}{error.hint}", "json")


def _array(file: BinaryIO, name: str) -> list[Any]:
    """The objects that a file of one array holds; a Refused in the place of a value that is none."""
    if (size := os.fstat(file.fileno()).st_size) > MAX_ARRAY_BYTES:
        raise InputError(
            f"{name}: a JSON array of {size} bytes; at most {MAX_ARRAY_BYTES} are read whole: write one object a line."
        )
    try:
        found: list[Any] = _decoded(file.read())
    except Refused as error:
        raise InputError(f"{name}: {error}.") from None
    return found


class Refused(ValueError):
    """A text that is no JSON, or holds a value that a dataset must not; `hint` is for one that is a row."""

    def __init__(self, reason: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


# What is no JSON is found by the decoder and told by `json_value`, so that one bad element does not cost an array.


def _no_constant(text: str) -> Refused:
    return Refused(f"holds {text}, which is not JSON: use null or leave the field out")


def _finite(text: str) -> float | Refused:
    if math.isfinite(value := float(text)):
        return value
    return Refused(f"holds the number {shown(text)}, too large for a float")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Refused:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return Refused(f"the key {shown(twice)} stands twice in one object")


_UNFIT = re.compile("[\0\ud800-\udfff]")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant)


def parse(text: str | bytes) -> Any:
    """One JSON value filling the whole of `text`. Raises Refused."""
    return json_value(_decoded(text))


def _decoded(raw: str | bytes) -> Any:
    if isinstance(raw, bytes) and b"\0" in raw:
        raise Refused("holds NUL bytes: the file is damaged, or not UTF-8 text")
    try:
        return _DECODER.decode(raw.decode() if isinstance(raw, bytes) else raw)
    except json.JSONDecodeError as error:
        raise _no_json(error) from None
    except UnicodeDecodeError as error:
        place = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        hint = "if the file is Latin-1, convert it with iconv -f LATIN1 -t UTF-8"
        raise Refused(f"is not UTF-8: {place}; {hint}") from None
    except RecursionError:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise Refused("holds a number with too many digits") from None


def _no_json(error: json.JSONDecodeError) -> Refused:
    text, rest = error.doc, error.doc[error.pos :].strip()
    if error.msg == "Extra data":
        hint = ": one object a line, without commas between" if rest.startswith((",", "{")) else ""
        return Refused(f"more text follows the JSON value: {shown(rest)}", hint)
    if not text.lstrip().startswith(("{", "[", '"')):
        return Refused(f"is not JSON: {shown(text.strip())}", "; expected an object {...}")
    if error.msg.startswith("Unterminated") or not rest:
        return Refused("ends before the JSON value is complete", ": each row must stand whole on one line")
    near = shown(text[max(0, error.pos - 10) : error.pos + 20].strip())
    place = f"line {error.lineno}, " if error.lineno > 1 else ""
    return Refused(f"is not valid JSON at {place}column {error.colno}: {error.msg}, near {near}")


def json_value(value: Any, where: str = "", depth: int = 0) -> Any:
    """A value as JSON has it. Raises Refused for another one, text that no tokenizer takes and nesting that would
    exhaust the stack later."""
    if depth > MAX_DEPTH:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Refused):
        raise value
    if isinstance(value, str):
        _check_text(value, where)
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise Refused(f"{where or 'the row'} has the key {shown(key, 40)}, which is no text")
            _check_text(key, where)
        return {k: json_value(child, f"{where}.{k}" if where else k, depth + 1) for k, child in value.items()}
    if isinstance(value, list | tuple):
        if {*map(type, value)} == {int}:  # tokens
            return list(value)
        return [json_value(child, f"{where}[{i}]", depth + 1) for i, child in enumerate(value)]
    if hasattr(value, "tolist"):  # an array, a tensor or one number of either
        return json_value(value.tolist(), where, depth + 1)
    held = shown(value, 20) if isinstance(value, float) else f"a {type(value).__name__}"
    raise Refused(
        f"{where or 'the row'} holds {held}, which is no text, number or list: leave the key out, or such rows"
    )


def _check_text(text: str, where: str) -> None:
    if (text.isascii() and "\0" not in text) or not (found := _UNFIT.search(text)):
        return
    what = "a NUL character" if found.group() == "\0" else "a lone surrogate (half a character)"
    raise Refused(f"{where or 'a key'} holds {what}")
