"""What a run shows: a line in place of the line before on a terminal, and lines of their own in a file."""

import os
from typing import Any

import pytest

from fourbit.trainer.progress import CLEARED, display_for

RECORD: dict[str, Any] = {"loss": 2.0, "lr": 1e-3, "tokens_per_second": 9.0, "optimizer_bytes": 0, "skipped": False}


@pytest.mark.parametrize("live", [True, False])
def test_a_line(live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: live)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((30, 24)))
    display = display_for(4)
    for step in (1, 2, 3, 4):
        display.show(RECORD | {"step": step})
    display.message("told")
    display.show({"step": 4, "val_loss": 1.0})
    display.close()
    said = capsys.readouterr().err
    if live:
        lines = said.split(CLEARED)[1:]
        assert [line.startswith(f"step {i}/4  left 0:00  loss 2") for i, line in enumerate(lines[:4], 1)] == [True] * 4
        assert all(len(line) <= 29 for line in lines[:4]) and lines[4] == "told\n" and said.endswith("\n")
    else:
        first, last, told, validated = said.splitlines()
        assert first.startswith("step 1/4  left 0:00  loss 2.0000") and last.startswith("step 4/4")
        assert told == "told" and "val loss 1.0000" in validated
