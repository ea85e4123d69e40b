"""`fourbit dpo`, `reward` and `distill` on a tiny model: what they leave, say, refuse and resume."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit
from fourbit.cli.load import CONFIG, run_settings
from fourbit.cli.main import main
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.reward_model import HEAD

WORDS = ["ab", "c", "def", "gh", "i", "jkl"]
ADAPTER = "adapter_model.safetensors"
Capture = pytest.CaptureFixture[str]
Go = Callable[..., str]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x" * i} for i, w in enumerate(WORDS)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fine-tuned on nf4-nodq: what dpo and reward go on from, and distill's teacher."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    flags = ["--rank", "8", "--lr", "1e-2", "--quant", "nf4-nodq", "--epochs", "6"]
    assert main(["sft", "--model", str(tiny_folder), "--data", str(rows), "--out", str(out), *flags]) == 0
    return str(out)


@pytest.fixture
def go(tiny_folder: Path, rows: Path, pairs: Path, capsys: Capture) -> Go:
    """Runs a command on its data and gives what it printed, stdout after stderr."""

    def run(command: str, out: Path, *flags: str, data: Path | None = None, code: int = 0) -> str:
        args = ["--model", str(tiny_folder), "--out", str(out), "--lr", "1e-2"]
        args += ["--teacher", str(tiny_folder)] if command == "distill" else ["--batch-size", "3"]
        args += ["--data", str(data or (rows if command == "distill" else pairs)), *flags]
        capsys.readouterr()
        ended = main([command, *args])
        printed = capsys.readouterr()
        assert ended == code, printed.err
        return printed.err + printed.out

    return run


def last_line(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


@pytest.mark.parametrize(
    ("command", "flags", "error"),
    [
        ("dpo", ["--loss", "dpo"], "unknown loss 'dpo'; did you mean sigmoid?"),
        ("dpo", ["--loss-type", "ipo"], "unknown flag --loss-type: it is called --loss here"),
        ("dpo", ["--ref-model", "m"], "it is called --reference here (reference is base or start; there never is a"),
        ("dpo", ["--beta", "0"], "--beta must be a number above 0, got 0"),
        ("dpo", ["--adapter", "nowhere"], "adapter nowhere is no folder with adapter_config.json"),
        ("dpo", ["--adapter", "{adapter}", "--rank", "8"], "{adapter} brings its own rank: leave them out"),
        ("dpo", ["--loss", "kto"], "it looks like a preference pair, which"),
        ("reward", ["--center", "-1"], "--center must be at least 0, got -1"),
        ("reward", ["--center-rewards-coefficient", "1"], "it is called --center here"),
        ("reward", ["--loss", "ipo"], "unknown flag --loss"),
        ("reward", ["--truncation", "keep"], "--truncation must be drop or answer, got 'keep'"),
        ("reward", ["--adapter", "nowhere", "--rank", "4"], "the adapter nowhere brings its own rank: leave them out"),
        ("reward", ["--dtype", "float16"], "training in float16 loses small gradients"),
        ("distill", [], "the teacher is what the student starts as, so there is nothing to learn: give another"),
        ("distill", ["--adapter", "{adapter}", "--teacher-adapter", "{adapter}"], "so there is nothing to learn"),
        (
            "distill",
            ["--teacher", "nowhere"],
            "nowhere: does not exist; a model is a folder with config.json and safet",
        ),
        ("distill", ["--teacher-adapter", "nowhere"], "teacher_adapter nowhere is no folder with adapter_config.json"),
        ("distill", ["--teacher-quant", "int4"], "--teacher-quant must be one of nf4, nf4-nodq, none or null, got 'in"),
        ("distill", ["--jsd-beta", "0.5"], "--jsd-beta belongs to divergence jsd, got 0.5 with forward-kl"),
        ("distill", ["--divergence", "kl"], "--divergence must be one of forward-kl, reverse-kl or jsd, got 'kl'"),
        ("distill", ["--temperature", "0"], "--temperature must be above 0 and finite, got 0"),
        ("distill", ["--kd-temperature", "2"], "it is called --temperature here"),
        ("distill", ["--full", "--rank", "4"], "full training has no adapter: leave out rank, or leave out full"),
        ("distill", ["--full", "--adapter", "{adapter}"], "full training has no adapter: leave out adapter"),
        ("distill", ["--full", "--quant", "nf4"], "full training needs the dense model: quant nf4"),
        ("distill", ["--sft-weight", "1", "--top-k", "260"], "top_k must be at most 259, the vocabulary, got 260"),
    ],
)
def test_what_cannot_work_is_refused(
    go: Go, adapter: str, tmp_path: Path, command: str, flags: list[str], error: str
) -> None:
    said = go(command, tmp_path, *(flag.format(adapter=adapter) for flag in flags), code=2)
    assert error.format(adapter=adapter) in said


def test_dpo_on_top_of_an_adapter(go: Go, pairs: Path, adapter: str, tmp_path: Path) -> None:
    said = go("dpo", tmp_path, "--adapter", adapter, "--val", str(pairs), "--epochs", "4", "--json")
    values, settings = last_line(said), run_settings(str(tmp_path))
    assert values["val_reward_accuracy"] == 1 and values["val_reward_margin"] > 0 and values["steps"] == 8
    assert "reference: the adapter as it is at the start" in said
    assert settings["reference"] == "start" and settings["adapter"] == adapter
    assert settings["quant"] == "nf4-nodq", "that of the adapter it goes on from"
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in (adapter, tmp_path)]
    assert ranks == [8, 8]


def test_the_saved_config_goes_on_from_the_adapter_too(go: Go, adapter: str, tmp_path: Path) -> None:
    go("dpo", tmp_path / "a", "--adapter", adapter, "--steps", "2", "--save-every", "1")
    config, file = str(tmp_path / "a" / CONFIG), tmp_path / "a" / ADAPTER
    assert main(["dpo", config, "--out", str(tmp_path / "b")]) == 0
    first = file.read_bytes()
    assert first == (tmp_path / "b" / ADAPTER).read_bytes()
    file.unlink()
    assert main(["dpo", config, "--resume", str(tmp_path / "a" / "checkpoints" / "step-000001")]) == 0
    assert file.read_bytes() == first


def test_the_saved_config_repeats_the_run(go: Go, tmp_path: Path) -> None:
    flags = ["--loss", "sigmoid=0.5", "--loss", "sft", "--beta", "0.3", "--steps", "2", "--rank", "4"]
    assert "validation loss" not in go("dpo", tmp_path / "a", *flags)
    assert main(["dpo", str(tmp_path / "a" / CONFIG), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / ADAPTER).read_bytes() == (tmp_path / "b" / ADAPTER).read_bytes()


def test_dropped_pairs_are_named(go: Go, pairs: Path, tmp_path: Path) -> None:
    said = go("dpo", tmp_path, "--max-length", "37", "--steps", "1", "--rank", "4")
    assert "1 dropped (too long)" in said and f"dropped: {pairs}:6" in said


def test_answers_of_one_label_are_noted(go: Go, tmp_path: Path) -> None:
    judged = tmp_path / "judged.jsonl"
    judged.write_text("\n".join(json.dumps({"prompt": f"say {w}", "completion": w, "label": True}) for w in "abc"))
    said = go("dpo", tmp_path / "out", "--loss", "kto", "--steps", "1", "--rank", "4", data=judged)
    assert "all 3 answers are judged good: there is nothing to compare with" in said
    said = go("reward", tmp_path / "rm", data=judged, code=2)
    assert f"{judged}:1: row: is not a preference pair" in said


def test_a_reward_model_scores_held_out_pairs(go: Go, tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    said = go("reward", tmp_path, "--val", str(pairs), "--epochs", "8", "--rank", "4", "--json")
    values = last_line(said)
    assert values["val_reward_accuracy"] == 1 and values["val_reward_margin"] > 0 and values["steps"] == 16
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=6e-8)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_config.json", ADAPTER, HEAD, CONFIG, "metrics.jsonl", "loss.png"}
    model, tokenizer = fourbit.load(tiny_folder, quantize="nf4")
    scorer = fourbit.RewardModel.load(model, tmp_path)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    chosen, rejected = (
        scorer.score(tokenizer, [{"prompt": row["prompt"], "completion": row[side]} for row in rows])
        for side in ("chosen", "rejected")
    )
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert sum(margins) / 6 == pytest.approx(values["val_reward_margin"], abs=1e-4)


def test_a_reward_model_answers_nothing(go: Go, tiny_folder: Path, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "rm"
    said = go("reward", out, "--val", "30%", "--steps", "1", "--rank", "4")
    assert "reward accuracy" in " ".join(said.split()) and "validation loss" in said
    assert f"fourbit.RewardModel.load(model, '{out}')" in said
    error = f"adapter {out} is a reward model's"
    for command, flag in (("dpo", "--adapter"), ("distill", "--adapter"), ("distill", "--teacher-adapter")):
        assert error in go(command, tmp_path / "o", flag, str(out), code=2)
    assert main(["eval", "--model", str(tiny_folder), "--adapter", str(out), "--data", str(rows)]) == 2
    assert error in capsys.readouterr().err


def test_reward_goes_on_from_an_adapter_and_from_a_head(go: Go, adapter: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert "head: goes on" not in go("reward", first, "--adapter", adapter, "--epochs", "4")
    assert run_settings(str(first))["quant"] == "nf4-nodq" and run_settings(str(first))["adapter"] == adapter
    assert f"head: goes on from {first}" in go("reward", second, "--adapter", str(first), "--steps", "1")
    assert "rank" not in run_settings(str(second)), "the adapter brings its own"
    before = (second / HEAD).read_bytes()
    assert main(["reward", str(second / CONFIG), "--resume"]) == 0
    assert (second / HEAD).read_bytes() == before, "a finished run resumes to nothing"
    losses = [read_metrics(folder / "metrics.jsonl")[0]["loss"] for folder in (first, second)]
    assert losses[0] == pytest.approx(math.log(2), abs=6e-8) and losses[1] < 0.65, "it goes on"
    said = go("reward", second, "--adapter", str(first), "--steps", "1", "--resume", "--center", "0.1", code=2)
    assert "other options (center: 0.0 -> 0.1)" in said
    (first / HEAD).write_bytes(b"broken")
    said = go("reward", tmp_path / "third", "--adapter", str(first), code=2)
    assert "no valid safetensors file" in said


def test_distill_from_the_same_base_keeps_one_copy(
    go: Go, tiny_folder: Path, val_rows: Path, adapter: str, tmp_path: Path
) -> None:
    """A narrower student of the adapter; the link to the model is the model."""
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    flags = ["--teacher-adapter", adapter, "--rank", "2", "--quant", "nf4-nodq", "--epochs", "6", "--json"]
    said = go("distill", tmp_path / "o", *flags, "--teacher", str(link), "--val", str(val_rows))
    assert f"teacher: the student's own base, in memory once, with the adapter {adapter}" in said
    assert said.count("model: ") == 1 and "somewhat off" not in said
    values, records = last_line(said), read_metrics(tmp_path / "o" / "metrics.jsonl")
    assert values["val_loss"] < records[0]["loss"] / 2 and "val_perplexity" not in values
    assert run_settings(str(tmp_path / "o"))["teacher_quant"] == "nf4-nodq"
    student, _ = fourbit.load(tiny_folder, quantize="nf4-nodq")
    assert len(fourbit.load_adapter(student, tmp_path / "o")) == 14


def test_distill_from_another_form_loads_it(go: Go, tiny_folder: Path, adapter: str, tmp_path: Path) -> None:
    """A dense teacher mends what 4 bits lost; an adapter of another form is remarked on."""
    flags = ["--teacher-quant", "none", "--steps", "2"]
    said = go("distill", tmp_path / "a", *flags)
    assert said.count("model: ") == 2 and f"teacher: {tiny_folder}, without an adapter" in said
    assert read_metrics(tmp_path / "a" / "metrics.jsonl")[0]["loss"] > 0
    flags += ["--teacher-adapter", adapter, "--divergence", "jsd", "--jsd-beta", "0.3", "--top-k", "9"]
    said = go("distill", tmp_path / "b", *flags)
    assert "the teacher's adapter was trained on nf4-nodq; on none it will be somewhat off" in said
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    said = go("distill", tmp_path / "c", "--teacher", str(copy), "--teacher-adapter", adapter, "--steps", "1")
    assert run_settings(str(tmp_path / "c"))["teacher_quant"] == "nf4-nodq", "as its adapter was trained"
    assert said.count("model: ") == 2


def test_distill_into_all_weights(go: Go, tiny_folder: Path, adapter: str, tmp_path: Path) -> None:
    go("distill", tmp_path, "--teacher-adapter", adapter, "--full", "--lr", "1e-3", "--steps", "2")
    settings = run_settings(str(tmp_path))
    assert settings["quant"] == "none" and settings["teacher_quant"] == "nf4-nodq" and "rank" not in settings
    old, new = (fourbit.load(folder)[0].state_dict() for folder in (tiny_folder, tmp_path))
    assert not all(torch.equal(old[name], new[name]) for name in old)
    assert main(["distill", str(tmp_path / CONFIG), "--resume"]) == 0


def test_distill_with_the_base_as_anchor(go: Go, tmp_path: Path) -> None:
    """A student that starts as its teacher has something to learn once the data's tokens count."""
    go("distill", tmp_path, "--sft-weight", "1", "--steps", "3")
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert first["divergence"] == pytest.approx(0, abs=1e-6) and last["divergence"] > 0
    assert first["loss"] == pytest.approx(first["cross_entropy"], abs=1e-5)


def test_a_resumed_student_keeps_its_teacher(go: Go, adapter: str, tmp_path: Path, capsys: Capture) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    go("distill", first, "--teacher-adapter", adapter, "--steps", "1")
    go("distill", second, "--teacher-adapter", adapter, "--adapter", str(first), "--steps", "1")
    for out in (first, second):
        assert main(["distill", str(out / CONFIG), "--resume"]) == 0
    assert main(["distill", str(first / CONFIG), "--resume", "--teacher-quant", "none"]) == 2
    assert "is a run with teacher_quant nf4, and is resumed with none; use the same" in capsys.readouterr().err


def test_a_teacher_of_other_tokens_is_refused(go: Go, tiny_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    said = go("distill", tmp_path / "o", "--teacher", str(other), code=2)
    assert "teacher and student have different tokenizers (259 and 259 tokens; 'a' is 65" in said
