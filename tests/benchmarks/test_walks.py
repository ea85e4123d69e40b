"""The walks through the package are counted as `benchmarks.walks` says, and cross real files."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import CHECKOUT, walks
from fourbit.lora.config import LoRAConfig

RATE = walks.RATE


@pytest.fixture(scope="module")
def found() -> dict[str, walks.Walk]:
    return walks.walks()


def test_walks_cross_files_of_the_package_in_order(found: dict[str, walks.Walk]) -> None:
    assert found.keys() == walks.LIMITS.keys() == walks.FIRST_HOUSE.keys()
    for walk in found.values():
        assert all((CHECKOUT / file).is_file() for file in walk.files)
    rate, chat, pair = ([*walk.files] for walk in found.values())
    assert rate[0] == "cli/main.py" and rate[-1].startswith("optim/")
    for rows in (chat, pair):
        assert rows.index("data/read.py") < rows.index("data/batch.py") < rows.index("kernels/chunked_head.py")
        rows = [file for file in rows if file != "models/foreign.py"]  # where a model is asked whether it is one
        assert not any(file.startswith("models/") or "lora.py" in file for file in rows)  # a toy's affair


def test_no_walk_is_longer_than_its_limit(found: dict[str, walks.Walk]) -> None:
    crossed = {name: list(walk.files) for name, walk in found.items() if len(walk.files) > walks.LIMITS[name]}
    assert crossed == {}


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (RATE, True),
        (str(RATE), True),
        (torch.tensor([RATE]), True),
        ([{"lr": RATE}], True),
        (2 * RATE, False),
        (torch.tensor([RATE, 1.0]), False),
        ([[{"lr": RATE}]], False),
        (SimpleNamespace(lr=RATE), False),  # no object of ours
        (LoRAConfig(alpha=RATE), True),
    ],
)
def test_what_a_hand_holds(value: Any, held: bool) -> None:
    assert walks.in_hand(value) == held


def calls(*rows: tuple[int | None, bool, bool, bool]) -> list[int]:
    """Which of these calls (caller, the update is inside, the rate is in hand, it is handed back) are on the way."""
    met: list[int] = []
    walk = walks.RateWalk()
    walk.calls = [
        walks.Call(a, SimpleNamespace(co_qualname=str(i)), None, u, h, r) for i, (a, u, h, r) in enumerate(rows)
    ]  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walks, "file_of", lambda code: code.co_qualname)
        met += [int(name) for name in walk.walk().files]
    return met


def test_who_is_on_the_way() -> None:
    main, parse, log, update = (
        (None, True, True, False),
        (0, False, True, True),
        (0, False, True, False),
        (0, True, True, False),
    )
    assert calls(main, parse, log, update) == [0, 1, 3]
    assert calls(main, log, (1, False, True, True)) == [0], "handed back to one who only looks"
    assert calls(main, (0, True, False, False)) == [0], "updates without the rate"
