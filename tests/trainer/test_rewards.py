"""Rewards: checks, a user's functions in a process of their own, and thirty ways in which these go wrong."""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fourbit.data.batch import Encoded, Example
from fourbit.errors import InputError
from fourbit.trainer.rewards import Answered, Failed, RewardFunction, Rewards, Worker, check, each, expected

ROW = {"prompt": "2 + 2?", "answer": "so it is 4"}


def named(spec: str) -> RewardFunction:
    found = check(spec)
    assert found is not None
    return found


def totals(judged: Rewards, answers: list[Answered]) -> list[float]:
    return [earned["reward"] for earned in judged(answers)]


def answered(answer: str, row: dict[str, Any] | None = None, prompt: str = "2 + 2?") -> Answered:
    return Answered(prompt, answer, ROW if row is None else row, Example((Encoded([1, 2], [False, True]),)))


@pytest.mark.parametrize(
    "spec, answer, holds",
    [
        ("exact", " so it is 4 ", True), ("exact", "4", False),
        ("contains", "well, so it is 4, yes", True), ("contains", "4", False),
        ("number", "1, 2, 3 and 4", True), ("number", "4 or 5", False), ("number", "four", False),
        ("number", "4.0", True), ("number", "-4", False), ("number", "8-4", True), ("number", "3,4", True),
        ("last-line:number", "9\nis 4", True), ("last-line:number", "4\nor 9", False),
        ("fields:a,b", '{"a": 1, "b": 2, "c": 3}', True), ("fields:a,b", '{"a": 1}', False), ("fields:a", "{", False),
        ("words:2-3", "one two", True), ("words:2-3", "one", False), ("words:2-3", "1 2 3 4", False),
        (r"format:<a>.*</a>", " <a>x\ny</a> ", True), (r"format:<a>.*</a>", "<a>x</a> and", False),
    ],
)  # fmt: skip
def test_checks_hold_or_not(spec: str, answer: str, holds: bool) -> None:
    assert named(spec)("2 + 2?", answer, ROW) == float(holds)


def test_numbers_with_commas_and_json_and_patterns_are_compared() -> None:
    assert named("number")("", "it is 1,234.50", {"answer": "1234.5"}) == 1
    assert named("json")("", '{"b": 1, "a": [2]}', {"answer": '{"a": [2], "b": 1}'}) == 1
    assert named("regex")("", "room 101", {"answer": r"\d{3}"}) == 1
    assert check("exactly") is None and check("rewards.py:score") is None
    for spec in ("words:3", "words:a-b", "format:(", "fields:", "format:"):
        with pytest.raises(InputError, match=spec.partition(":")[0]):
            check(spec)


def test_what_a_row_expects_is_its_answer() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert expected({"messages": talk}) == "a" and expected({"messages": talk[:1]}) is None
    assert expected({"prompt": "q", "solution": 4}) == "4" and expected({"prompt": "q"}) is None


def test_a_row_without_an_answer_earns_nothing_and_says_so() -> None:
    judged = Rewards({"exact": (1.0, each(named("exact")))})
    assert math.isnan(*totals(judged, [answered("None", {"prompt": "q"})]))
    assert judged.failures == {"exact: has no answer in the row to compare with": 1}


def test_a_source_of_weight_0_is_shown_and_neither_earned_nor_missed() -> None:
    def fails(prompt: str, answer: str, row: Any) -> float:
        raise Failed("cannot say")

    given = {"earned": (2.0, each(lambda *_: 1.5)), "seen": (0.0, each(lambda *_: 7.0)), "broken": (0.0, each(fails))}
    judged = Rewards(given)
    (earned,) = judged([answered("x", {})])
    assert earned["reward"] == 3.0 and earned["reward/seen"] == 7.0 and math.isnan(earned["reward/broken"])
    assert judged.failures == {"broken: cannot say": 1}


def test_failures_of_many_words_are_counted_under_few_names(worker: Any) -> None:
    rewards = Rewards({"m": (1.0, worker("raise ValueError(answer)", 20.0))})
    rewards([answered(str(i)) for i in range(60)])
    assert len(rewards.failures) <= 21 and sum(rewards.failures.values()) == 60


def test_answers_of_forks_are_not_taken_for_the_next_ones(worker: Any) -> None:
    judged = Rewards({"m": (1.0, worker("import os; os.fork(); return float(answer)", 20.0))})
    assert totals(judged, [answered(str(i)) for i in range(5)]) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_file_may_import_packages_of_names_that_ours_have(worker: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text("TWO = 2")
    one = worker("import metrics, config_of_mine; return metrics.TWO", 20.0)
    (tmp_path / "config_of_mine.py").write_text("")
    assert totals(Rewards({"m": (1.0, one)}), [answered("a")]) == [2.0]


BAD: dict[str, tuple[str, str]] = {
    "raises": ("raise KeyError('colour')", "raised KeyError: 'colour' (line 3)"),
    "raises in depth": ("return inner()\ndef inner():\n    return 1 / 0", "raised ZeroDivisionError"),
    "raises without words": ("raise ValueError", "raised ValueError"),
    "raises many lines": ("raise ValueError('a\\n' * 50)", "raised ValueError: a a"),
    "hangs": ("import time; time.sleep(60)", "took more than 0.5 s"),
    "spins": ("while True: pass", "took more than 0.5 s"),
    "is nan": ("return float('nan')", "gave nan"),
    "is infinite": ("return float('-inf')", "gave -inf"),
    "is huge": ("return 1e30", "gave 1e+30"),
    "is a long whole number": ("return 10 ** 400", "no number"),
    "is text": ("return '1.0'", "gave '1.0', which is no number"),
    "is nothing": ("pass", "gave None"),
    "is a list": ("return [1.0]", "gave [1.0]"),
    "is a dictionary": ("return {'reward': 1}", "no number"),
    "is no JSON": ("return {1}", "raised TypeError"),
    "is an object": ("return object()", "raised TypeError"),
    "is complex": ("return 1j", "raised TypeError"),
    "exits": ("import sys; sys.exit(3)", "ended its process"),
    "exits at once": ("import os; os._exit(0)", "ended its process"),
    "is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended its process"),
    "interrupts itself": ("raise KeyboardInterrupt", "ended its process"),
    "closes its output": ("import os; os.closerange(0, 99)\n    os._exit(0)", "ended its process"),
    "recurses": ("return score(prompt, answer, row)", "raised RecursionError"),
    "reads what is not its own": ("return float(input())", "raised EOFError"),
    "forks and leaves": ("import os\n    if os.fork(): os._exit(0)\n    import time; time.sleep(60)", "took more"),
}  # fmt: skip
FINE = {
    "prints": "print('hello'); return 2.0",
    "prints to its own output": "import os; os.write(1, b'noise\\n'); return 2.0",
    "is true": "return (True + 1)",
    "is numpy's": "import numpy; return numpy.float32(2)",
    "needs its neighbour": "from beside import TWO; return TWO",
    "starts something": "import subprocess; subprocess.run(['true']); return 2",
}


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made = list[Worker]()

    def make(body: str, seconds: float = 0.5, head: str = "def score(prompt, answer, row):") -> Worker:
        (tmp_path / "beside.py").write_text("TWO = 2")
        (tmp_path / "rewards.py").write_text(f"{head}\n    {body}\n")
        made.append(Worker(tmp_path / "rewards.py", "score", seconds))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reward_is_a_counted_failure_and_the_next_call_works(kind: str, worker: Any) -> None:
    body, why = BAD[kind]
    bad = worker(f"if row.get('fine'): return 1.5\n    {body}")
    begun = time.monotonic()
    judged = Rewards({"mine": (2.0, bad)})
    failed, fine = judged([answered("a"), answered("b", {"fine": True})])
    assert time.monotonic() - begun < 20
    (message,) = judged.failures
    assert judged.failures[message] == 1 and message.startswith("mine: ") and why in message and "\n" not in message
    assert len(message) < 400
    assert math.isnan(failed["reward/mine"]) and math.isnan(failed["reward"])
    assert fine == {"reward/mine": 1.5, "reward": 3.0}
    assert totals(Rewards({"mine": (2.0, each(lambda *_: float("nan")))}, failed=-1.0), [answered("a")]) == [-2.0]


@pytest.mark.parametrize("kind", FINE)
def test_honest_rewards_may_print_read_and_import(kind: str, worker: Any) -> None:
    judged = Rewards({"mine": (1.0, worker(FINE[kind], 20.0))})
    assert totals(judged, [answered("a"), answered("b")]) == [2.0, 2.0] and not judged.failures


def test_a_function_of_many_is_called_once_and_gives_as_many(worker: Any) -> None:
    head = "CALLS = []\ndef score(prompts, answers, rows):"
    many = worker("CALLS.append(1); return [len(a) + 10 * len(CALLS) for a in answers]", 5, head)
    assert totals(Rewards({"m": (1.0, many)}), [answered("a"), answered("abc")]) == [11, 13]
    judged = Rewards({"m": (1.0, worker("return [1.0]", 5, head))})
    judged([answered("a"), answered("abc")])
    assert judged.failures == {"m: gave [1.0], not a list of 2 numbers": 2}


@pytest.mark.parametrize(
    "body, name, why",
    [
        ("def other(a, b, c): return 1", "score", "no function 'score'"),
        ("score = 3", "score", "no function 'score'"),
        ("def score(x): return 1", "score", r"must take \(prompt, answer, row\)"),
        ("import nothing_of_this_name", "score", "ModuleNotFoundError"),
        ("def score(:", "score", "SyntaxError"),
        ("exit()", "score", "ended its process"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_a_run(tmp_path: Path, body: str, name: str, why: str) -> None:
    (tmp_path / "rewards.py").write_text(body)
    with pytest.raises(InputError, match=why):
        Worker(tmp_path / "rewards.py", name)
    with pytest.raises(InputError, match="FileNotFoundError"):
        Worker(tmp_path / "nothing.py", name)


def test_what_a_reward_started_ends_with_it(tmp_path: Path, worker: Any) -> None:
    note = tmp_path / "pid"
    body = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(p.pid))"
    one = worker(f"{body}; return 1.0", 20.0)
    assert totals(Rewards({"m": (1.0, one)}), [answered("a")]) == [1.0]
    one.stop()
    for _ in range(50):
        time.sleep(0.02)
        state = Path(f"/proc/{note.read_text()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
    os.kill(int(note.read_text()), 9)
    pytest.fail("what it started goes on")
