"""Files to rows; a line or an element that is none is one problem, with its line.

A file is JSON Lines or one JSON array. It is read as bytes and line by line, so a broken line costs that line and not
the file, and memory is bounded by the longest line allowed. Faults of a whole file (missing, a directory, UTF-16,
empty) raise at once: they cannot be skipped.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from .row import Problem, Row, type_name
from .strict_json import Refused, elements, parse

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
