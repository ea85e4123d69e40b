"""`fourbit reward` and `fourbit distill` on a tiny model: what they leave, say, refuse and resume."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import fourbit
from fourbit.cli.config_file import read_config
from fourbit.cli.load import CONFIG
from fourbit.cli.main import main
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.reward_model import HEAD

Capture = pytest.CaptureFixture[str]
WORDS = ["ab", "c", "def", "gh", "i", "jkl"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x" * i} for i, w in enumerate(WORDS)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was fine-tuned on nf4-nodq."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    flags = ["--rank", "8", "--lr", "1e-2", "--quant", "nf4-nodq", "--epochs", "6"]
    assert main(["sft", "--model", str(tiny_folder), "--data", str(rows), "--out", str(out), *flags]) == 0
    return out


def reward(model: Path, pairs: Path, out: Path, *more: str) -> int:
    flags = ["--batch-size", "3", "--lr", "1e-2", "--rank", "4", *more]
    return main(["reward", "--model", str(model), "--data", str(pairs), "--out", str(out), *flags])


def distill(model: Path, teacher: Path | str, rows: Path, out: Path, *more: str) -> int:
    flags = ["--teacher", str(teacher), "--lr", "1e-2", *more]
    return main(["distill", "--model", str(model), "--data", str(rows), "--out", str(out), *flags])


def settings_of(out: Path) -> dict[str, object]:
    return {name: setting.value for name, setting in read_config(str(out / CONFIG)).items()}


def test_reward_reports_held_out_accuracy_and_leaves_a_model_that_scores(
    tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert reward(tiny_folder, pairs, tmp_path, "--val", str(pairs), "--epochs", "8", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["val_reward_accuracy"] == 1 and values["val_reward_margin"] > 0 and values["steps"] == 16
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=6e-8)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", HEAD, CONFIG, "metrics.jsonl", "loss.png"}
    model, tokenizer = fourbit.load(tiny_folder, quantize="nf4")
    scorer = fourbit.RewardModel.load(model, tmp_path)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    chosen, rejected = (
        scorer.score(tokenizer, [{"prompt": row["prompt"], "completion": row[side]} for row in rows])
        for side in ("chosen", "rejected")
    )
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert sum(margins) / 6 == pytest.approx(values["val_reward_margin"], abs=1e-4)


def test_reward_prints_its_figures(tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    assert reward(tiny_folder, pairs, tmp_path, "--val", "30%", "--steps", "1") == 0
    out = capsys.readouterr().out
    assert "reward accuracy" in " ".join(out.split()) and "validation loss" in out


def test_reward_goes_on_from_an_adapter_and_from_a_head(
    tiny_folder: Path, pairs: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ["reward", "--model", str(tiny_folder), "--data", str(pairs), "--batch-size", "3", "--lr", "1e-2"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*args, "--adapter", str(teacher), "--out", str(first), "--epochs", "4"]) == 0
    assert "head: goes on" not in capsys.readouterr().err
    assert settings_of(first)["quant"] == "nf4-nodq" and settings_of(first)["adapter"] == str(teacher)
    assert main([*args, "--adapter", str(first), "--out", str(second), "--steps", "1"]) == 0
    assert f"head: goes on from {first}" in capsys.readouterr().err
    assert "rank" not in settings_of(second), "the adapter brings its own"
    assert main(["reward", str(second / CONFIG), "--resume"]) == 0
    losses = [read_metrics(folder / "metrics.jsonl")[0]["loss"] for folder in (first, second)]
    assert losses[0] == pytest.approx(math.log(2), abs=6e-8) and losses[1] < 0.65, "it goes on"
    (first / HEAD).write_bytes(b"broken")
    assert main([*args, "--adapter", str(first), "--out", str(tmp_path / "third")]) == 2
    assert "no valid safetensors file" in capsys.readouterr().err


def test_a_finished_reward_run_resumes_to_nothing_and_another_is_refused(
    tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert reward(tiny_folder, pairs, tmp_path, "--steps", "2") == 0
    before = (tmp_path / HEAD).read_bytes()
    assert main(["reward", str(tmp_path / CONFIG), "--resume"]) == 0
    assert (tmp_path / HEAD).read_bytes() == before
    assert main(["reward", str(tmp_path / CONFIG), "--resume", "--center", "0.1"]) == 2
    assert "other options (center: 0.0 -> 0.1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--center", "-1"], "--center must be at least 0, got -1"),
        (["--center-rewards-coefficient", "1"], "it is called --center here"),
        (["--loss", "ipo"], "unknown flag --loss"),
        (["--truncation", "keep"], "--truncation must be drop or answer, got 'keep'"),
        (["--adapter", "nowhere"], "the adapter nowhere brings its own rank: leave them out"),
        (["--dtype", "float16"], "training in float16 loses small gradients"),
    ],
)
def test_what_reward_refuses(
    tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: Capture, flags: list[str], error: str
) -> None:
    assert reward(tiny_folder, pairs, tmp_path, *flags) == 2
    assert error in capsys.readouterr().err


def test_reward_takes_no_judged_rows(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "judged.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    assert reward(tiny_folder, data, tmp_path / "o") == 2
    assert f"{data}:1: row: is not a preference pair" in capsys.readouterr().err


def test_distill_from_the_same_base_keeps_one_copy(
    tiny_folder: Path, rows: Path, val_rows: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A narrower student of the adapter; the link to the model is the model."""
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    flags = ["--teacher-adapter", str(teacher), "--rank", "2", "--quant", "nf4-nodq", "--epochs", "6", "--json"]
    assert distill(tiny_folder, link, rows, tmp_path / "o", *flags, "--val", str(val_rows)) == 0
    printed = capsys.readouterr()
    assert f"teacher: the student's own base, in memory once, with the adapter {teacher}" in printed.err
    assert printed.err.count("model: ") == 1 and "somewhat off" not in printed.err
    values, records = json.loads(printed.out), read_metrics(tmp_path / "o" / "metrics.jsonl")
    assert values["val_loss"] < records[0]["loss"] / 2 and "val_perplexity" not in values
    assert settings_of(tmp_path / "o")["teacher_quant"] == "nf4-nodq"
    student, _ = fourbit.load(tiny_folder, quantize="nf4-nodq")
    assert len(fourbit.load_adapter(student, tmp_path / "o")) == 14


def test_distill_from_another_form_loads_it(
    tiny_folder: Path, rows: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A dense teacher mends what 4 bits lost; an adapter of another form is remarked on."""
    flags = ["--teacher-quant", "none", "--steps", "2"]
    assert distill(tiny_folder, tiny_folder, rows, tmp_path / "a", *flags) == 0
    err = capsys.readouterr().err
    assert err.count("model: ") == 2 and f"teacher: {tiny_folder}, without an adapter" in err
    assert read_metrics(tmp_path / "a" / "metrics.jsonl")[0]["loss"] > 0
    flags += ["--teacher-adapter", str(teacher), "--divergence", "jsd", "--jsd-beta", "0.3", "--top-k", "9"]
    assert distill(tiny_folder, tiny_folder, rows, tmp_path / "b", *flags) == 0
    assert "the teacher's adapter was trained on nf4-nodq; on none it will be somewhat off" in capsys.readouterr().err
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert distill(tiny_folder, copy, rows, tmp_path / "c", "--teacher-adapter", str(teacher), "--steps", "1") == 0
    assert settings_of(tmp_path / "c")["teacher_quant"] == "nf4-nodq", "as its adapter was trained"
    assert capsys.readouterr().err.count("model: ") == 2


def test_distill_into_all_weights(
    tiny_folder: Path, rows: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = ["--teacher-adapter", str(teacher), "--full", "--lr", "1e-3", "--steps", "2"]
    assert distill(tiny_folder, tiny_folder, rows, tmp_path, *flags) == 0
    settings = settings_of(tmp_path)
    assert settings["quant"] == "none" and settings["teacher_quant"] == "nf4-nodq" and "rank" not in settings
    old, new = (fourbit.load(folder)[0].state_dict() for folder in (tiny_folder, tmp_path))
    assert not all(torch.equal(old[name], new[name]) for name in old)
    assert main(["distill", str(tmp_path / CONFIG), "--resume"]) == 0


def test_distill_with_the_base_as_anchor(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    """A student that starts as its teacher has something to learn once the data's tokens count."""
    assert distill(tiny_folder, tiny_folder, rows, tmp_path, "--sft-weight", "1", "--steps", "3") == 0
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert first["divergence"] == pytest.approx(0, abs=1e-6) and last["divergence"] > 0
    assert first["loss"] == pytest.approx(first["cross_entropy"], abs=1e-5)


def test_a_resumed_student_keeps_its_teacher(
    tiny_folder: Path, rows: Path, teacher: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert distill(tiny_folder, tiny_folder, rows, tmp_path, "--teacher-adapter", str(teacher), "--steps", "1") == 0
    second = ["--teacher-adapter", str(teacher), "--adapter", str(tmp_path), "--steps", "1"]
    assert distill(tiny_folder, tiny_folder, rows, tmp_path / "second", *second) == 0
    capsys.readouterr()
    for out in (tmp_path, tmp_path / "second"):
        assert main(["distill", str(out / CONFIG), "--resume"]) == 0
    assert main(["distill", str(tmp_path / CONFIG), "--resume", "--teacher-quant", "none"]) == 2
    assert "is a run with teacher_quant nf4, and is resumed with none; use the same" in capsys.readouterr().err


NOTHING = "the teacher is what the student starts as, so there is nothing to learn: give another teacher"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], NOTHING),
        (["--adapter", "{adapter}", "--teacher-adapter", "{adapter}"], NOTHING),
        (["--teacher", "nowhere"], "teacher nowhere does not exist; give a Hugging Face folder or a .gguf file"),
        (["--teacher-adapter", "nowhere"], "teacher_adapter nowhere is no folder with adapter_config.json"),
        (["--teacher-quant", "int4"], "--teacher-quant must be one of nf4, nf4-nodq, none or null, got 'int4'"),
        (["--jsd-beta", "0.5"], "--jsd-beta belongs to divergence jsd, got 0.5 with forward-kl"),
        (["--divergence", "kl"], "--divergence must be one of forward-kl, reverse-kl or jsd, got 'kl'"),
        (["--temperature", "0"], "--temperature must be above 0 and finite, got 0"),
        (["--kd-temperature", "2"], "it is called --temperature here"),
        (["--full", "--rank", "4"], "full training has no adapter: leave out rank, or leave out full"),
        (["--full", "--adapter", "{adapter}"], "full training has no adapter: leave out adapter"),
        (["--full", "--quant", "nf4"], "full training needs the dense model: quant nf4"),
        (["--sft-weight", "1", "--top-k", "260"], "top_k must be at most 259, the vocabulary, got 260"),
    ],
)
def test_what_distill_refuses(
    tiny_folder: Path, rows: Path, teacher: Path, tmp_path: Path, capsys: Capture, flags: list[str], error: str
) -> None:
    given = [flag.format(adapter=teacher) for flag in flags]
    assert distill(tiny_folder, tiny_folder, rows, tmp_path, *given) == 2
    assert error in capsys.readouterr().err


def test_a_teacher_of_other_tokens_is_refused(tiny_folder: Path, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    assert distill(tiny_folder, other, rows, tmp_path / "o") == 2
    assert "teacher and student have different tokenizers (259 and 259 tokens; 'a' is 65" in capsys.readouterr().err
