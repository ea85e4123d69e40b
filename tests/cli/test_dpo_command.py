"""`fourbit dpo` end to end: on a fresh adapter and on top of one, what it records, what it says, what it refuses."""

import json
import math
from pathlib import Path

import pytest

from fourbit.cli.config_file import read_config
from fourbit.cli.dpo import Options as DPOOptions
from fourbit.cli.load import CONFIG
from fourbit.cli.main import main
from fourbit.cli.parse import parse
from fourbit.trainer.metrics import read_metrics

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["ab", "c", "def", "gh", "i", "jkl"]
    rows = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x" * i} for i, w in enumerate(words)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def start(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sft"
    flags = ["--rank", "4", "--lr", "1e-2", "--quant", "nf4-nodq", "--steps", "4"]
    assert main(["sft", "--model", str(tiny_folder), "--data", str(rows), "--out", str(out), *flags]) == 0
    return out


def dpo(tiny_folder: Path, pairs: Path, out: Path, *more: str) -> int:
    flags = ["--batch-size", "3", "--lr", "1e-2", *more]
    return main(["dpo", "--model", str(tiny_folder), "--data", str(pairs), "--out", str(out), *flags])


def test_on_top_of_an_adapter(tiny_folder: Path, pairs: Path, start: Path, tmp_path: Path, capsys: Capture) -> None:
    assert (
        dpo(tiny_folder, pairs, tmp_path, "--adapter", str(start), "--val", str(pairs), "--epochs", "4", "--json") == 0
    )
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["val_reward_accuracy"] == 1 and values["val_reward_margin"] > 0 and values["steps"] == 8
    assert "reference: the adapter as it is at the start" in printed.err
    settings = {name: setting.value for name, setting in read_config(str(tmp_path / CONFIG)).items()}
    assert settings["reference"] == "start" and settings["adapter"] == str(start)
    assert settings["quant"] == "nf4-nodq", "that of the adapter it goes on from"
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    ranks = [json.loads((folder / "adapter_config.json").read_text())["r"] for folder in (start, tmp_path)]
    assert ranks == [4, 4]


def test_the_saved_config_goes_on_from_the_adapter_too(
    tiny_folder: Path, pairs: Path, start: Path, tmp_path: Path
) -> None:
    assert dpo(tiny_folder, pairs, tmp_path / "a", "--adapter", str(start), "--steps", "2", "--save-every", "1") == 0
    config = str(tmp_path / "a" / CONFIG)
    assert main(["dpo", config, "--out", str(tmp_path / "b")]) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert main(["dpo", config, "--resume", str(tmp_path / "a" / "checkpoints" / "step-000001")]) == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == files[0]


def test_the_saved_config_repeats_the_run(tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ("--loss", "sigmoid=0.5", "--loss", "sft", "--beta", "0.3", "--steps", "2", "--rank", "4")
    assert dpo(tiny_folder, pairs, tmp_path / "a", *flags) == 0
    assert "validation loss" not in capsys.readouterr().out
    assert main(["dpo", str(tmp_path / "a" / CONFIG), "--out", str(tmp_path / "b")]) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_dropped_pairs_are_named(tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    assert dpo(tiny_folder, pairs, tmp_path, "--max-length", "37", "--steps", "1", "--rank", "4") == 0
    err = capsys.readouterr().err
    assert "1 dropped (too long)" in err and f"dropped: {pairs}:6" in err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--loss", "dpo"], "unknown loss 'dpo'; did you mean sigmoid?"),
        (["--loss-type", "ipo"], "unknown flag --loss-type: it is called --loss here"),
        (["--ref-model", "m"], "it is called --reference here (reference is base or start; there never is a second"),
        (["--beta", "0"], "--beta must be a number above 0, got 0"),
        (["--adapter", "nowhere"], "adapter nowhere is no folder with adapter_config.json"),
        (["--loss", "kto"], "it looks like a preference pair: use"),
    ],
)
def test_what_cannot_work_is_refused(
    tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture, flags: list[str], error: str
) -> None:
    assert dpo(tiny_folder, pairs, tmp_path, *flags) == 2
    assert error in capsys.readouterr().err


def test_an_adapter_brings_its_own_rank(
    tiny_folder: Path, pairs: Path, start: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert dpo(tiny_folder, pairs, tmp_path, "--adapter", str(start), "--rank", "8") == 2
    assert f"the adapter {start} brings its own rank: leave them out" in capsys.readouterr().err


def test_losses_come_from_a_file_too(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: m\ndata: d\nout: o\nloss: [sigmoid=0.8, sft=0.2]\nbeta: 0.2\n")
    options, _ = parse(DPOOptions, "dpo", [str(config)])
    assert options.objective().losses == {"sigmoid": 0.8, "sft": 0.2} and options.objective().beta == 0.2


def test_a_reward_model_answers_nothing(
    tiny_folder: Path, pairs: Path, rows: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = str(tmp_path / "rm")
    flags = ["--model", str(tiny_folder), "--data", str(pairs), "--rank", "4", "--steps", "2"]
    assert main(["reward", *flags, "--out", out]) == 0
    assert f"fourbit.RewardModel.load(model, '{out}')" in capsys.readouterr().out
    assert dpo(tiny_folder, pairs, tmp_path / "dpo", "--adapter", out) == 2
    assert f"adapter {out} is a reward model's" in capsys.readouterr().err
    assert main(["eval", "--model", str(tiny_folder), "--adapter", out, "--data", str(rows)]) == 2
    assert f"adapter {out} is a reward model's" in capsys.readouterr().err


def test_answers_of_one_label_are_noted(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    judged = tmp_path / "judged.jsonl"
    judged.write_text("\n".join(json.dumps({"prompt": f"say {w}", "completion": w, "label": True}) for w in "abc"))
    assert dpo(tiny_folder, judged, tmp_path / "out", "--loss", "kto", "--steps", "1", "--rank", "4") == 0
    assert "all 3 answers are judged good: there is nothing to compare with" in capsys.readouterr().err
