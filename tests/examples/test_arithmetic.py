"""The sums of examples/arithmetic: that test problems are new, that a program tells who is right, and the demo."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[2] / "examples" / "arithmetic"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"arithmetic_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def rows(name: str) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def test_test_problems_have_other_numbers_and_words_and_their_answers_are_right() -> None:
    seen = {name: rows(name) for name in ("train", "valid", "test")}
    pairs = {name: {_numbers(row) for row in some} for name, some in seen.items()}
    assert not pairs["train"] & (pairs["valid"] | pairs["test"])
    made = module("make_problems")
    assert len(seen["test"]) == 200 and not {*made.TRAIN} & {*made.TEST}
    for row in (row for some in seen.values() for row in some):
        told = [*map(int, re.findall(r"\d+", row["messages"][0]["content"]))]
        assert int(row["answer"]) in (sum(told), max(told) - min(told))
        assert row["messages"][-1]["content"].endswith(f" = {row['answer']}")


def _numbers(row: dict) -> tuple[int, int]:  # type: ignore[type-arg]
    """a and b of a + b, whatever is asked."""
    *_, result = re.findall(r"\d+", row["messages"][-1]["content"])
    a, sign, b = row["messages"][-1]["content"].split()[:3]
    return (int(a), int(b)) if sign == "+" else (int(result), int(b))


def test_files_are_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("make_problems")
    monkeypatch.setattr(made, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_problems.py"])
    made.main()
    for name in ("train", "valid", "test"):
        assert (tmp_path / f"{name}.jsonl").read_text() == (HERE / f"{name}.jsonl").read_text()
