"""Every hostile input ends as the rule says (see harness.py), or is in the list of those that do not yet (known.py).

All of them take minutes: `pytest -m slow tests/hostile`.
"""

from collections import Counter
from pathlib import Path

import pytest
from families import FAMILIES
from harness import KILL_SECONDS, KNOWN_KILL_SECONDS, Case, Forks, broken_rules, copied, snapshot
from known import KNOWN

CASES = {case.name: case for cases in FAMILIES.values() for case in cases}


def marked(case: Case) -> object:
    """The case's name, expected to fail where it is known to."""
    known = [pytest.mark.xfail(reason=KNOWN[case.name], strict=True)] if case.name in KNOWN else []
    return pytest.param(case.name, marks=known)


@pytest.mark.slow
@pytest.mark.parametrize("name", [marked(case) for case in CASES.values()])
def test_ends_as_the_rule_says(name: str, start: Path, forks: Forks, tmp_path: Path) -> None:
    case = CASES[name]
    here = copied(start, tmp_path / "here", case.made)
    case.make(here)
    before = snapshot(here)
    hangs = KNOWN.get(name, "").startswith("hangs")
    outcome = forks.run(case, here, KNOWN_KILL_SECONDS if hangs else KILL_SECONDS)
    broken = broken_rules(case, outcome, before, snapshot(here), forks.level)
    assert not broken, f"{'; '.join(broken)}\n{outcome.err.decode(errors='replace')[-3000:]}"


def test_there_are_as_many_as_promised() -> None:
    assert len(CASES) == sum(map(len, FAMILIES.values())), "two cases of one name"
    assert len(CASES) >= 400


def test_what_is_known_is_a_case() -> None:
    assert KNOWN.keys() <= CASES.keys()


def test_few_legal_inputs_are_among_them() -> None:
    ends = Counter(case.ends for case in CASES.values())
    assert ends["done"] + ends["either"] <= len(CASES) // 8, ends
