"""The road of examples/rlhf: what it reads of a run and draws; what it claims is checked by running it, slowly."""

import importlib.util
import json
import subprocess
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


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_demo_reaches_what_it_promises(tmp_path: Path) -> None:
    """GRPO and PPO against the reward model are right on 5 points more of the validation tickets at their best step
    than the policy was, in at most 1.35 times the memory of fine-tuning; with nothing to hold it the policy earns more
    and is right less often."""
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], check=False)
    assert done.returncode == 0
    figures = json.loads((tmp_path / "scores.json").read_text())
    for name in ("grpo", "ppo"):
        before, *course = figures["courses"][name]
        assert max(one["right"] for one in course) >= before["right"] + 0.05
    before, first, *_, last = figures["courses"]["grpo-free"]
    assert last["said"] > first["said"] and last["right"] < before["right"]
    assert figures["memory"] <= 1.35
