"""The road of examples/rlhf: what it reads of a run, and draws."""

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
    records = [{"step": n, "reward": 5.0, "reward/exact": right} for n, right in ((1, 1.0), (2, 0.5))]
    records += [
        {"step": n, "val_reward": 9.0, "val_reward/judge": n / 10, "val_reward/exact": right}
        for n, right in ((10, 0.4), (20, 0.2))
    ]
    records.insert(3, {"step": 11, "reward/exact": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    course = rlhf.evaluations(tmp_path, Path("judge"))
    assert course == [
        {"step": 10, "said": 1.0, "right": 0.4, "drawn": 0.75},
        {"step": 20, "said": 2.0, "right": 0.2, "drawn": 0.25},
    ]
    rlhf.draw({"grpo": [{"step": 0, "said": None, "right": 0.1, "drawn": 0.1}, *course]}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_of_one_wrong_field_and_who_compares(rlhf: ModuleType, tmp_path: Path) -> None:
    rows = list(map(json.loads, rlhf.misfiled(rlhf.TICKETS / "train.jsonl", tmp_path / "p").read_text().splitlines()))
    tickets = list(map(json.loads, (rlhf.TICKETS / "train.jsonl").read_text().splitlines()))
    spec = importlib.util.spec_from_file_location("labeller", SCRIPT.parent / "labeller.py")
    assert spec is not None and spec.loader is not None and len(rows) == len(tickets) == 640
    labeller = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(labeller)
    for row, ticket in zip(rows, tickets, strict=True):
        chosen, rejected = (row[name][0]["content"] for name in ("chosen", "rejected"))
        assert chosen == ticket["messages"][-1]["content"] and row["prompt"] == ticket["messages"][:-1]
        assert [labeller.fields_right("", text, ticket) for text in (chosen, rejected)] == [3, 2]
    assert labeller.fields_right("", "anything", tickets[0]) < 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_following_the_reward_model_pays_in_truth(tmp_path: Path) -> None:
    """The whole road: GRPO's and PPO's adapters are right on 5 points more of the test tickets than the policy was."""
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path, "--runs", "grpo", "ppo"], check=False)
    assert done.returncode == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert all(scores[name]["exact"] >= scores["SFT"]["exact"] + 0.05 for name in ("grpo", "ppo"))
