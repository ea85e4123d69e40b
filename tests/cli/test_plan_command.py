"""`fourbit plan`: quick, and from little."""

import time
from pathlib import Path

import pytest

from fourbit.cli.main import main

TICKETS = Path(__file__).parents[2] / "examples" / "tickets" / "train.jsonl"


def test_a_plan_is_made_in_seconds(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.process_time()
    assert main(["plan", "--model", str(smollm2), "--data", str(TICKETS)]) == 0
    assert time.process_time() - begun < 8  # 13 with torch's fake tensors, 4 here
    assert "fits 8 GiB" in capsys.readouterr().out
