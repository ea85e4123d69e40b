"""What the watch on a run of reinforcement says, when, and how often."""

from typing import Any

import pytest

from fourbit.trainer.watch import WINDOW, Watch

WELL = {"signal": 0.6, "reward": 0.4, "kl": 0.05, "truncated": 0.1, "answer_tokens": 40.0}
ILL: dict[str, tuple[Any, str]] = {
    "saturated": (lambda step: {"signal": 0.05, "reward": 1.0}, "of the groups all answers earn the same"),
    "growing": (lambda step: {"truncated": 0.8, "answer_tokens": 10.0 + 4 * step}, "answers grow"),
    "away": (lambda step: {"kl": 2.5}, "nats a token from its reference"),
}


@pytest.mark.parametrize("kind", ILL)
def test_each_trouble_is_said_once_and_none_where_there_is_none(kind: str) -> None:
    run: Any = None
    trouble, words = ILL[kind]
    said = list[str]()
    watch = Watch(said.append)
    for _ in range(2 * WINDOW):
        watch.on_step(run, WELL)
    assert not said
    for step in range(3 * WINDOW):
        watch.on_step(run, WELL | trouble(step))
    (sentence,) = said
    assert words in sentence and ": " in sentence


def test_a_run_without_a_reference_or_signal_of_its_own_is_left_alone() -> None:
    run: Any = None
    said = list[str]()
    watch = Watch(said.append)
    for _ in range(2 * WINDOW):
        watch.on_step(run, {"loss": 0.1, "signal": 1.0})
    assert not said
