"""The road of examples/rlhf: what it reads of a run, and draws."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "rlhf" / "rlhf.py"


@pytest.fixture
def rlhf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr("sys.path", [*sys.path])  # the script puts its neighbours on it
    spec = importlib.util.spec_from_file_location("rlhf_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_said_and_what_was_right_come_from_evaluations_alone(rlhf: ModuleType, tmp_path: Path) -> None:
    records = [{"step": 1, "reward": 5.0, "reward/exact": 1.0}]
    records += [
        {"step": n, "val_reward": 9.0, "val_reward/judge": n / 10, "val_reward/exact": right}
        for n, right in ((10, 0.4), (20, 0.2))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    course = rlhf.evaluations(tmp_path, Path("judge"))
    assert course == [{"step": 10, "said": 1.0, "right": 0.4}, {"step": 20, "said": 2.0, "right": 0.2}]
    rlhf.draw({"grpo": [{"step": 0, "said": None, "right": 0.1}, *course]}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
