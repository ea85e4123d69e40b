"""guarantees.md and modules.md in docs keep their word: each row has its parts, and each test named exists and runs."""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


def rows(page: str) -> list[list[str]]:
    """The cells of each row of the page's tables, without heads and rules."""
    table = [line for line in page.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [row for row in found if row[0] not in ("promise", "with") and not set("".join(row)) <= {"-"}]


ROWS = [row for page in ("guarantees.md", "modules.md") for row in rows((ROOT / "docs" / page).read_text())]


def fault_of_row(row: list[str]) -> str | None:
    """What a row of the page lacks."""
    if len(row) != 3 or not all(row):
        return "needs a promise, a bound and tests"
    if NAMED.sub("", row[2]).strip() or not NAMED.search(row[2]):
        return "names its tests as `tests/folder/test_file.py::test_name`, with nothing between them"
    return None


def always_skipped(marks: list[ast.expr]) -> bool:
    """Whether one of these decorators or marks is `skip`, `xfail`, or `skipif(True)`."""
    for mark in marks:
        words = ast.unparse(mark)
        if re.search(r"\bmark\.(skip|xfail)\b", words) or re.search(r"\bskipif\((True|1)\b", words):
            return True
    return False


@lru_cache(maxsize=1)
def parsed(source: str) -> list[ast.stmt]:
    """A file's statements; of a file that many rows name, parsed once."""
    return ast.parse(source).body


def fault_of_test(source: str, name: str) -> str | None:
    """Why pytest would not run `name` (or `Class::name`) of this file."""
    body = parsed(source)
    for node in body:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        if named and always_skipped([node.value]):
            return "its whole file is skipped"
    for part in name.split("::"):
        if not re.match(r"test|Test", part):
            return f"pytest does not collect {part}"
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        if not found:
            return f"there is no {part}"
        if always_skipped(found[-1].decorator_list):
            return f"{part} is skipped"
        body = found[-1].body
    return None


def test_rows_have_their_parts() -> None:
    assert len(ROWS) >= 60
    assert {row[0]: fault_of_row(row) for row in ROWS if fault_of_row(row)} == {}


def test_no_promise_is_made_twice() -> None:
    promises = [row[0] for row in ROWS]
    assert sorted(promises) == sorted(set(promises))


def test_every_named_test_runs() -> None:
    faults = {}
    for file, name in sorted({named for row in ROWS for named in NAMED.findall(row[2])}):
        path = ROOT / file
        fault = fault_of_test(path.read_text(), name) if path.is_file() else "there is no such file"
        if fault:
            faults[f"{file}::{name}"] = fault
    assert faults == {}, "docs/guarantees.md names tests that do not run: a test that moved takes its name there along"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["a", "b"], "needs a promise"),
        (["a", "", "`tests/x/test_y.py::test_z`"], "needs a promise"),
        (["a", "b", "test_z"], "names its tests"),
        (["a", "b", "`tests/x/test_y.py::test_z` and more"], "names its tests"),
    ],
)
def test_planted_rows_are_judged(row: list[str], words: str) -> None:
    assert words in str(fault_of_row(row))


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def test_a(): ...", "test_b", "there is no test_b"),
        ("def helper(): ...", "helper", "does not collect"),
        ("class TestA:\n    def test_b(self): ...", "TestA::test_c", "there is no test_c"),
        ("@pytest.mark.skip(reason='x')\ndef test_a(): ...", "test_a", "is skipped"),
        ("@pytest.mark.xfail\ndef test_a(): ...", "test_a", "is skipped"),
        ("@pytest.mark.skipif(True, reason='x')\ndef test_a(): ...", "test_a", "is skipped"),
        ("pytestmark = pytest.mark.skip(reason='x')\ndef test_a(): ...", "test_a", "whole file"),
    ],
)
def test_planted_tests_are_judged(source: str, name: str, words: str) -> None:
    assert words in str(fault_of_test(source, name))


def test_a_test_that_needs_a_gpu_counts() -> None:
    source = "@pytest.mark.skipif(not torch.cuda.is_available(), reason='x')\n@given(x)\ndef test_a(): ..."
    assert fault_of_test(source, "test_a") is None
