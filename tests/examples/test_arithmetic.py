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
    made, told = module("make_problems"), dict[str, set[tuple[int, ...]]]()
    for name, wordings in (("train", made.TRAIN), ("valid", made.TRAIN), ("test", made.TEST)):
        told[name], shown = set(), 0
        for row in rows(name):
            question, answer = (message["content"] for message in row["messages"])
            numbers = tuple(map(int, re.findall(r"\d+", question)))
            (signs,) = {signs for signs, some in wordings.items() if any(_asks(text, question) for text in some)}
            way, result = made.worked(signs, *numbers)
            a, b, c = numbers
            assert int(row["answer"]) == result == a + int(f"{signs[0]}{b}") + int(f"{signs[1]}{c}")
            assert answer in (way, str(result))
            shown += answer == way
            told[name].add(numbers)
        assert 0.1 < shown / len(rows(name)) < 0.3, "a fifth shows the way"
    assert not told["train"] & (told["valid"] | told["test"]) and len(rows("test")) == 200
    assert not {*sum(made.TRAIN.values(), ())} & {*sum(made.TEST.values(), ())}


def _asks(wording: str, question: str) -> bool:
    """Whether a question is this wording with its blanks filled."""
    return re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(wording)), question) is not None


def test_files_are_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("make_problems")
    monkeypatch.setattr(made, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_problems.py"])
    made.main()
    for name in ("train", "valid", "test"):
        assert (tmp_path / f"{name}.jsonl").read_text() == (HERE / f"{name}.jsonl").read_text()
