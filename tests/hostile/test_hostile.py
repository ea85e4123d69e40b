"""Every hostile input ends as the rule says (see harness.py).

All of them take minutes: `pytest -m slow tests/hostile`. One in thirty-two runs with the other tests.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
from families import FAMILIES, LEGAL
from harness import Case, Forks, broken_rules, copied, snapshot

ALWAYS = 32
CASES = {case.name: case for cases in FAMILIES.values() for case in cases}
PAGE = (Path(__file__).parents[2] / "docs" / "guarantees.md").read_text()


def marked(number: int, case: Case) -> object:
    """The case's name; all but some are slow."""
    return pytest.param(case.name, marks=[pytest.mark.slow] * (number % ALWAYS > 0))


@pytest.mark.parametrize("name", [marked(number, case) for number, case in enumerate(CASES.values())])
def test_ends_as_the_rule_says(name: str, start: Path, forks: Forks, tmp_path: Path) -> None:
    case = CASES[name]
    here = copied(start, tmp_path / "here", case.made)
    case.make(here)
    before = snapshot(here)
    outcome = forks.run(case, here)
    broken = broken_rules(case, outcome, before, snapshot(here), forks.level)
    assert not broken, f"{'; '.join(broken)}\n{outcome.err.decode(errors='replace')[-3000:]}"


def test_there_are_as_many_as_promised() -> None:
    assert len(CASES) == sum(map(len, FAMILIES.values())), "two cases of one name"
    assert CASES.keys() >= LEGAL
    told = {name: int(number.replace(",", "")) for number, name in re.findall(r"([0-9][0-9,]*) of ([a-z]+)\b", PAGE)}
    assert {name: told.get(name) for name in FAMILIES} == {name: len(cases) for name, cases in FAMILIES.items()}


def test_few_legal_inputs_are_among_them() -> None:
    ends = Counter(case.ends for case in CASES.values())
    assert ends["done"] + ends["either"] <= len(CASES) // 8, ends
