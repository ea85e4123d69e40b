"""Every bad file or line ends in one clear sentence that names the place; good oddities (BOM, CRLF, ...) are read."""

import json
import os
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.data import read
from fourbit.data.row import BadRow, Place, Row
from fourbit.errors import InputError, clean

GOOD = b'{"a": 1}'


def read_rows(path: object) -> tuple[list[Row], list[BadRow]]:
    """The rows of a file, and its problems."""
    items = list(read.read_rows(path))  # type: ignore[arg-type]  # what is no row too
    rows = [item for item in items if isinstance(item, Row)]
    return rows, [item for item in items if isinstance(item, BadRow)]


LATIN1 = "; if the file is Latin-1, convert it with iconv -f LATIN1 -t UTF-8"

# name of the file, its bytes, what the error says after the path
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("d.jsonl", b"", " holds no rows: expected one JSON object a line."),
    "blank lines only": ("d.jsonl", b"\n\n  \r\n", " holds no rows: expected one JSON object a line."),
    "byte order mark only": ("d.jsonl", b"\xef\xbb\xbf", " holds no rows: expected one JSON object a line."),
    "empty array": ("d.json", b"[]", " holds no rows: expected one JSON object a line."),
    "empty array in spaces": ("d.json", b" \n[ \n]\n", " holds no rows: expected one JSON object a line."),
    "utf-16 le": (
        "d.jsonl",
        '{"a": 1}'.encode("utf-16"),
        ": the file is UTF-16 or UTF-32: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it).",
    ),
    "utf-16 be": (
        "d.jsonl",
        b"\xfe\xff" + '{"a": 1}'.encode("utf-16-be"),
        ": the file is UTF-16 or UTF-32: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it).",
    ),
    "utf-16 without a mark": (
        "d.jsonl",
        '{"a": 1}'.encode("utf-16-le"),
        ": the file is UTF-16 or UTF-32: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it).",
    ),
    "utf-32": (
        "d.jsonl",
        '{"a": 1}'.encode("utf-32"),
        ": the file is UTF-16 or UTF-32: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does it).",
    ),
    "gzip inside": (
        "d.jsonl",
        b"\x1f\x8b\x08\x00rest",
        ": the file is compressed or binary, whatever its name says: unpack it to JSON Lines.",
    ),
    "zip inside": (
        "d.json",
        b"PK\x03\x04rest",
        ": the file is compressed or binary, whatever its name says: unpack it to JSON Lines.",
    ),
    "zstd inside": (
        "d.ndjson",
        b"\x28\xb5\x2f\xfdrest",
        ": the file is compressed or binary, whatever its name says: unpack it to JSON Lines.",
    ),
    "parquet inside": (
        "d.jsonl",
        b"PAR1rest",
        ": the file is compressed or binary, whatever its name says: unpack it to JSON Lines.",
    ),
    "parquet": ("d.parquet", GOOD, ": .parquet is no format that is read here: use one of .jsonl, .ndjson, .json."),
    "csv": ("d.csv", b"a,b\n1,2\n", ": .csv is no format that is read here: use one of .jsonl, .ndjson, .json."),
    "gz": ("d.jsonl.gz", GOOD, ": .gz is no format that is read here: use one of .jsonl, .ndjson, .json."),
    "txt": ("d.txt", GOOD, ": .txt is no format that is read here: use one of .jsonl, .ndjson, .json."),
    "unknown suffix": ("d.rows", GOOD, ": .rows is no format that is read here: use one of .jsonl, .ndjson, .json."),
    "no suffix": (
        "rows",
        GOOD,
        ": a name without a suffix is no format that is read here: use one of .jsonl, .ndjson, .json.",
    ),
    "array, not utf-8": ("d.json", b'[{"a": "\xe9"}]', ": is not UTF-8: byte 0xe9 at column 9" + LATIN1 + "."),
    "array, missing comma": (
        "d.json",
        b'[{"a": 1}\n{"a": 2}]',
        ": is not valid JSON at line 2, column 1: Expecting ',' delimiter, near '[{\"a\": 1}\\n{\"a\": 2}]'.",
    ),
    "array not closed": ("d.json", b'[{"a": 1},\n{"a": 2}\n', ": ends before the JSON value is complete."),
    "array, text after": ("d.json", b'[{"a": 1}]\nmore', ": more text follows the JSON value: 'more'."),
    "array, bad element": (
        "d.json",
        b'[{"a": 1},\n{"b": tru}]',
        ": is not valid JSON at line 2, column 7: Expecting value, near '1},\\n{\"b\": tru}]'.",
    ),
    "array, comma only": ("d.json", b"[,]", ": is not valid JSON at column 2: Expecting value, near '[,]'."),
    "array, huge integer": ("d.json", b'[{"a": ' + b"9" * 5000 + b"}]", ": holds a number with too many digits."),
    "array with NUL": ("d.json", b'[{"a": "\0"}]', ": holds NUL bytes: the file is damaged, or not UTF-8 text."),
}

# the bytes of a whole file, and what the one problem says after the path
LINES: dict[str, tuple[bytes, str]] = {
    "latin-1": (b'{"a": "caf\xe9"}\n', ":1: line: is not UTF-8: byte 0xe9 at column 11" + LATIN1),
    "truncated utf-8": (GOOD + b'\n{"a": "\xe2\x82"}\n', ":2: line: is not UTF-8: byte 0xe2 at column 8" + LATIN1),
    "overlong utf-8": (b'{"a": "\xc0\xaf"}\n', ":1: line: is not UTF-8: byte 0xc0 at column 8" + LATIN1),
    "surrogate in utf-8": (b'{"a": "\xed\xa0\x80"}\n', ":1: line: is not UTF-8: byte 0xed at column 8" + LATIN1),
    "NUL byte": (b'{"a": "x\0y"}\n', ":1: line: holds NUL bytes: the file is damaged, or not UTF-8 text"),
    "escaped NUL": (b'{"a": "x\\u0000y"}\n', ":1: line: a holds a NUL character"),
    "escaped NUL deep": (b'{"a": [{"b": "\\u0000"}]}\n', ":1: line: a[0].b holds a NUL character"),
    "lone surrogate": (b'{"a": "\\ud800"}\n', ":1: line: a holds a lone surrogate (half a character)"),
    "lone low surrogate": (b'{"a": "\\udc00x"}\n', ":1: line: a holds a lone surrogate (half a character)"),
    "surrogates swapped": (b'{"a": "\\udc00\\ud83d"}\n', ":1: line: a holds a lone surrogate (half a character)"),
    "surrogate in a key": (b'{"\\ud800": 1}\n', ":1: line: a key holds a lone surrogate (half a character)"),
    "not JSON": (GOOD + b"\nhello\n", ":2: line: is not JSON: 'hello'; expected an object {...}"),
    "a long line of text": (
        b"x" * 200 + b"\n",
        f":1: line: is not JSON: '{'x' * 31} ... (122 more characters) ... {'x' * 16}'; expected an object {{...}}",
    ),
    "comma after a row": (
        GOOD + b",\n" + GOOD + b"\n",
        ":1: line: more text follows the JSON value: ',': one object a line, without commas between",
    ),
    "two objects on a line": (
        GOOD + GOOD + b"\n",
        ":1: line: more text follows the JSON value: '{\"a\": 1}': one object a line, without commas between",
    ),
    "text after a row": (GOOD + b" # first\n", ":1: line: more text follows the JSON value: '# first'"),
    "cut short": (
        b'{"a": "x\n',
        ":1: line: ends before the JSON value is complete: each row must stand whole on one line",
    ),
    "open brace": (b"{\n", ":1: line: ends before the JSON value is complete: each row must stand whole on one line"),
    "value missing": (b'{"a":}\n', ":1: line: is not valid JSON at column 6: Expecting value, near '{\"a\":}'"),
    "single quotes": (
        b"{'a': 1}\n",
        ":1: line: is not valid JSON at column 2: Expecting property name enclosed in double quotes, near \"{'a': 1}\"",
    ),
    "tab in a string": (
        b'{"a": "x\ty"}\n',
        ':1: line: is not valid JSON at column 9: Invalid control character at, near \'{"a": "x\\ty"}\'',
    ),
    "bad escape": (
        b'{"a": "\\x41"}\n',
        ':1: line: is not valid JSON at column 8: Invalid \\escape, near \'{"a": "\\\\x41"}\'',
    ),
    "NaN": (b'{"a": NaN}\n', ":1: line: holds NaN, which is not JSON: use null or leave the field out"),
    "Infinity": (
        b'{"a": [-Infinity]}\n',
        ":1: line: holds -Infinity, which is not JSON: use null or leave the field out",
    ),
    "huge float": (b'{"a": 1e999}\n', ":1: line: holds the number '1e999', too large for a float"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}\n", ":1: line: holds a number with too many digits"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}\n', ":1: line: the key 'a' stands twice in one object"),
    "duplicate key deep": (b'{"m": [{"r": 1, "r": 1}]}\n', ":1: line: the key 'r' stands twice in one object"),
    "65 levels": (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}\n", ":1: line: is nested deeper than 64 levels"),
    "100,000 levels": (
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        ":1: line: is nested deeper than 64 levels",
    ),
    "array on a line": (GOOD + b"\n[1, 2]\n", ":2: line: is a list, not an object {...}"),
    "string": (b'"text"\n', ":1: line: is a string, not an object {...}"),
    "null": (GOOD + b"\nnull\n", ":2: line: is null, not an object {...}"),
    "control characters are escaped": (
        b"\x1b[31mred\n",
        ":1: line: is not JSON: '\\x1b[31mred'; expected an object {...}",
    ),
}


ELEMENTS = {
    "number": (b"[1]", "row 1 of {}: row: is a number, not an object {{...}}"),
    "null": (b'[\n{"a": 1},\nnull]', "row 2 of {}: row: is null, not an object {{...}}"),
    "NaN": (
        b'[{"a": NaN}, {"a": 1}]',
        "row 1 of {}: row: holds NaN, which is not JSON: use null or leave the field out",
    ),
    "key twice": (b'[{"a": 1, "a": 1},\n{"a": 1}]', "row 1 of {}: row: the key 'a' stands twice in one object"),
    "infinity": (b'[{"a": 1},{"b": 1e999}]', "row 2 of {}: row: holds the number '1e999', too large for a float"),
    "surrogate": (b'[{"a": "\\ud800"}, {"a": 1}]', "row 1 of {}: row: a holds a lone surrogate (half a character)"),
}


@pytest.mark.parametrize("case", ELEMENTS)
def test_a_bad_element_costs_itself_and_not_its_array(case: str, tmp_path: Path) -> None:
    content, says = ELEMENTS[case]
    path = tmp_path / "d.json"
    path.write_bytes(content)
    rows, problems = read_rows(path)
    assert [str(problem) for problem in problems] == [says.format(path)]
    assert len(rows) == (content != b"[1]")


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_clear_error(case: str, tmp_path: Path) -> None:
    name, content, says = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value) == f"{path}{says}"


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_one_clear_problem(case: str, tmp_path: Path) -> None:
    content, says = LINES[case]
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    _, problems = read_rows(path)
    assert [str(problem) for problem in problems] == [f"{path}{says}"]
    assert "\n" not in str(problems[0])


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    fifo, loop, gone = tmp_path / "pipe.jsonl", tmp_path / "loop.jsonl", tmp_path / "gone.jsonl"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    gone.symlink_to(tmp_path / "nowhere.jsonl")
    cases = {
        str(tmp_path / "none.jsonl"): ": cannot be opened: No such file or directory.",
        str(gone): ": cannot be opened: No such file or directory.",
        str(
            tmp_path
        ): ": must be a regular file, and is a directory: name the data file in it (one of .jsonl, .ndjson, .json).",
        str(fifo): ": must be a regular file, and is a pipe or device: write the rows to a file first.",
        "/dev/zero": ": must be a regular file, and is a pipe or device: write the rows to a file first.",
        str(loop): ": cannot be opened: Too many levels of symbolic links.",
        "x" * 5000 + ".jsonl": ": cannot be opened: File name too long.",
    }
    for path, says in cases.items():
        with pytest.raises(InputError) as caught:
            read_rows(path)
        assert str(caught.value) == clean(path + says)
    with pytest.raises(InputError, match=r"cannot be opened: .*null"):
        read_rows("a\0b.jsonl")


def test_a_trailing_comma_is_named(tmp_path: Path) -> None:
    """Python's own words for it changed in 3.13."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1,}\n')
    _, (problem,) = read_rows(path)
    assert re.search(
        r"column [89]: (Expecting property name|Illegal trailing comma).*, near '{\"a\": 1,}'", str(problem)
    )


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denied by hand, because root may read every file."""

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD)
    monkeypatch.setattr(read, "open", denied, raising=False)
    with pytest.raises(InputError, match=r"d\.jsonl: cannot be opened: Permission denied\.$"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b'{"a": 0}\n{"a": 1}\n', [1, 2]),
        (b'{"a": 0}\n{"a": 1}', [1, 2]),
        (b'{"a": 0}\r\n{"a": 1}\r\n', [1, 2]),
        (b'\xef\xbb\xbf{"a": 0}\n{"a": 1}\n', [1, 2]),
        (b'\n\n{"a": 0}\n   \n\t{"a": 1}  \n\n', [3, 5]),
        (b'[{"a": 0}, {"a": 1}]', [1, 2]),
        (b'\xef\xbb\xbf[\n  {"a": 0},\n  {\n   "a":\n 1}\n]\n', [1, 2]),
        ('{"a": 0, "t": "\u2028 caf\u00e9 \U0001f600"}\n{"a": 1}\n'.encode(), [1, 2]),
        (b'{"a": 0, "t": "\\ud83d\\ude00"}\n{"a": 1}\n', [1, 2]),
    ],
    ids=["plain", "no final newline", "crlf", "bom", "blank lines", "array", "array over lines", "unicode", "pairs"],
)
def test_good_oddities_are_read(content: bytes, lines: list[int], tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    rows, problems = read_rows(path)
    assert problems == []
    assert [row.data["a"] for row in rows] == [0, 1]
    assert [row.place.number for row in rows] == lines
    assert {row.place.name for row in rows} == {str(path)}


def test_a_bad_line_does_not_cost_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\nbad\n{"a": 2}\n\xff\n{"a": 3}\n')
    rows, problems = read_rows(path)
    assert [(row.place.number, row.data["a"]) for row in rows] == [(1, 1), (3, 2), (5, 3)]
    assert [problem.place.number for problem in problems] == [2, 4]


def test_a_huge_line_costs_its_line_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'\n{"a": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    rows, problems = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.place.number for row in rows] == [1, 3]
    assert [str(problem) for problem in problems] == [f"{path}:2: line: is longer than 16 MiB"]
    assert peak < 40 * 2**20, f"a capped line of 16 MiB took {peak} bytes"


def test_a_line_that_does_not_end_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sparse file of any size, which would be read for minutes."""
    monkeypatch.setattr(read, "MAX_DISCARDED_BYTES", 32 << 20)
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD)
    os.truncate(path, 40 << 30)
    with pytest.raises(InputError, match=r"d\.jsonl: line 2 is longer than 32 MiB: write one object a line\.$"):
        read_rows(path)


def test_a_key_twice_among_many_is_found_in_no_time(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    keys = [*range(300_000), 299_999]
    path.write_text("{" + ", ".join(f'"{key}": 0' for key in keys) + "}")
    start = time.process_time()
    _, (problem,) = read_rows(path)
    assert str(problem).endswith("line: the key '299999' stands twice in one object")
    assert time.process_time() - start < 5


def test_a_line_of_exactly_the_cap_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 20)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": "12345678901"}\n{"a": "1234567890"}\n')
    rows, problems = read_rows(path)
    assert [row.place.number for row in rows] == [2] and [problem.place.number for problem in problems] == [1]


def test_64_levels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}\n")
    assert len(read_rows(path)[0]) == 1


def test_a_huge_array_is_refused_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_ARRAY_BYTES", 10)
    path = tmp_path / "d.json"
    path.write_bytes(b'[{"a": 12345}]')
    with pytest.raises(
        InputError, match="a JSON array of 14 bytes; at most 10 are read whole: write one object a line"
    ):
        read_rows(path)


def test_a_problem_is_one_printable_line() -> None:
    problem = BadRow(Place("a\nb.jsonl", 3), "messages", "holds \x1b[31m and \ud800 and caf\u00e9")
    assert str(problem) == "a\\nb.jsonl:3: messages: holds \\x1b[31m and \\ud800 and caf\u00e9"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_problems(content: bytes) -> None:
    """No byte string makes the reader raise anything but InputError."""
    path = Path(os.environ["PYTEST_TMP"]) / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        rows, problems = read_rows(path)
    except InputError:
        return
    assert all(isinstance(row.data, dict) for row in rows)
    assert all(str(problem).startswith(f"{path}:") for problem in problems)


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=5), st.booleans())
def test_what_was_written_is_read(objects: list[dict[str, object]], array: bool) -> None:
    path = Path(os.environ["PYTEST_TMP"]) / "round.jsonl"
    path.write_text(json.dumps(objects, indent=1) if array else "\n".join(map(json.dumps, objects)))
    rows, problems = read_rows(path)
    held = [row.data for row in rows]
    clean = [o for o in objects if "\\u0000" not in json.dumps(o)]
    assert held == clean and len(problems) == len(objects) - len(clean)


@pytest.fixture(autouse=True)
def _folder_for_hypothesis(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis runs many examples in one test, so a function's own `tmp_path` is not for it."""
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path_factory.getbasetemp()))
