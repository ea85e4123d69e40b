"""`fourbit dpo`, `reward` and `distill` on a tiny model: what they leave, say, refuse and resume."""

import json
import math
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourbit
from fourbit.cli.config_file import CONFIG, read_run
from fourbit.cli.main import main
from fourbit.data import template as templates
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.reward_model import HEAD

WORDS = ["ab", "c", "def", "gh", "i", "jkl"]
PAIRS = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x" * i} for i, w in enumerate(WORDS)]
ADAPTER = "adapter_model.safetensors"
Go = Callable[..., str]


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fine-tuned on nf4-nodq: what dpo and reward go on from, and distill's teacher."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    flags = ["--rank", "8", "--lr", "1e-2", "--quant", "nf4-nodq", "--epochs", "6"]
    assert main(["sft", "--model", str(tiny_folder), "--data", str(rows), "--out", str(out), *flags]) == 0
    return str(out)


@pytest.fixture
def go(here: Path, typed: Go) -> Go:
    """Runs a command on its data into a folder and gives what it printed, stdout after stderr."""
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))

    def run(command: str, out: str, flags: str = "", *, code: int = 0) -> str:
        own = "--teacher m --data rows.jsonl" if command == "distill" else "--batch-size 3 --data pairs.jsonl"
        return typed(f"{command} --model m --lr 1e-2 {own} --out {out} {flags}", code=code)

    return run


def last_line(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


def losses(out: str, name: str = "loss") -> list[float]:
    """A metric of each step."""
    return [record[name] for record in read_metrics(Path(out) / "metrics.jsonl") if name in record]


@pytest.mark.parametrize(
    ("command", "flags", "error"),
    [
        ("dpo", "--loss dpo", "unknown loss 'dpo'; did you mean sigmoid?"),
        ("dpo", "--loss-type ipo", "unknown flag --loss-type: it is called --loss here"),
        ("dpo", "--beta 0", "--beta must be above 0 and finite, got 0"),
        ("dpo", "--adapter nowhere", "adapter nowhere is no folder with adapter_config.json"),
        ("dpo", "--adapter {adapter} --rank 8", "{adapter} brings its own rank: leave them out"),
        ("dpo", "--loss kto", "it looks like a preference pair, which"),
        ("reward", "--center -1", "--center must be at least 0, got -1"),
        ("reward", "--loss ipo", "unknown flag --loss"),
        ("reward", "--truncation keep", "--truncation must be drop or answer, got 'keep'"),
        ("reward", "--adapter nowhere --rank 4", "the adapter nowhere brings its own rank: leave them out"),
        ("reward", "--dtype float16", "training in float16 loses small gradients"),
        ("distill", "", "the teacher is what the student starts as, so there is nothing to learn: give another"),
        ("distill", "--adapter {adapter} --teacher-adapter {adapter}", "so there is nothing to learn"),
        ("distill", "--teacher nowhere", "teacher nowhere does not exist; give a Hugging Face folder or a .gguf file"),
        ("distill", "--teacher-adapter nowhere", "teacher_adapter nowhere is no folder with adapter_config.json"),
        ("distill", "--teacher-quant int4", "--teacher-quant must be one of nf4, nf4-nodq, none or null, got 'in"),
        ("distill", "--jsd-beta 0.5", "--jsd-beta would do nothing, as divergence is forward-kl"),
        ("distill", "--divergence kl", "--divergence must be one of forward-kl, reverse-kl or jsd, got 'kl'"),
        ("distill", "--temperature 0", "--temperature must be above 0 and finite, got 0"),
        ("distill", "--full --rank 4", "full training has no adapter: leave out rank, or leave out full"),
        ("distill", "--full --adapter {adapter}", "full training has no adapter: leave out adapter"),
        ("distill", "--full --quant nf4", "full training needs the dense model: quant nf4"),
        ("distill", "--sft-weight 1 --top-k 260", "top_k must be at most 259, the vocabulary, got 260"),
    ],
)
def test_what_cannot_work_is_refused(go: Go, adapter: str, command: str, flags: str, error: str) -> None:
    assert error.format(adapter=adapter) in go(command, "o", flags.format(adapter=adapter), code=2)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--steps 3 --warmup 3", "warmup 3 is 3 steps, and the run has 3 steps (22 rows, 8 a step): no step would"),
        ("--steps 9 --schedule wsd --decay 20", "decay 20 is 20 steps after 0 of warmup, and the run has 9 steps"),
        ("--val val.jsonl --patience 2", "patience 2 needs more than 2 evaluations, and there will be 1"),
        ("--val 4%", "a share of 4.0000% of 22 rows for validation is less than a row on one side"),
        ("--val 96%", "each side needs 4.55% at least; or give validation rows of their own"),
        ("--train-tokens <tool>", "train_tokens '<tool>' is no token of this model: give some that it has"),
        ("--micro-batch 9", "--micro-batch splits the 8 examples of a step"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_read(
    typed: Go, monkeypatch: pytest.MonkeyPatch, flags: str, error: str
) -> None:
    monkeypatch.setattr("fourbit.cli.train.load_weights", lambda *args: pytest.fail("the model was read"))
    assert error in typed(f"sft --model m --data rows.jsonl --out o {flags}", code=2)


def test_what_draws_needs_a_temperature(typed: Go) -> None:
    for flags, name in (("--top-k 5", "--top-k"), ("--top-p 0.9", "--top-p")):
        assert f"{name} draws, and temperature 0 takes the likeliest token" in typed(f"chat --model m {flags}", code=2)


def test_an_evaluation_measures_something(typed: Go) -> None:
    assert "--answers a would stay empty" in typed("eval --model m rows.jsonl --match none --answers a", code=2)
    assert "--base is off, and there is no adapter" in typed("eval --model m rows.jsonl --no-base", code=2)


def test_a_run_is_made_longer(here: Path, typed: Go) -> None:
    typed("sft --model m --data rows.jsonl --out o --schedule constant --warmup 0 --rank 2 --steps 2")
    said = typed("sft o/config.yaml --resume --steps 3")
    assert "goes on to step 3 by schedule constant; it was to end at step 2" in said
    assert "all 3 steps of this run were done: to go on from it, see the README" in typed("sft o/config.yaml --resume")
    said = typed("sft o/config.yaml --resume --steps 9 --schedule linear", code=2)
    assert "cannot become that run" in said and "begin a new run from what this one saved, with another --out" in said
    assert len(losses("o")) == 3
    assert "adapter: goes on from o" in typed("sft --model m --data rows.jsonl --adapter o --out more --steps 1")


def test_dpo_on_top_of_an_adapter(go: Go, adapter: str) -> None:
    said = go("dpo", "o", f"--adapter {adapter} --val pairs.jsonl --epochs 4 --json")
    values, settings = last_line(said), read_run("o")
    assert values["val_reward_accuracy"] == 1 and values["val_reward_margin"] > 0 and values["steps"] == 8
    assert "reference: the adapter as it is at the start" in said
    assert settings["reference"] == "start" and settings["adapter"] == adapter
    assert settings["quant"] == "nf4-nodq", "that of the adapter it goes on from"
    assert losses("o")[0] == pytest.approx(math.log(2), abs=1e-6)
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in (adapter, "o")]
    assert ranks == [8, 8]


def test_the_saved_config_goes_on_from_the_adapter_too(here: Path, go: Go, typed: Go, adapter: str) -> None:
    go("dpo", "a", f"--adapter {adapter} --steps 2 --save-every 1")
    typed(f"dpo a/{CONFIG} --out b")
    first = (here / "a" / ADAPTER).read_bytes()
    assert first == (here / "b" / ADAPTER).read_bytes()
    (here / "a" / ADAPTER).unlink()
    typed(f"dpo a/{CONFIG} --resume a/checkpoints/step-000001")
    assert (here / "a" / ADAPTER).read_bytes() == first


def test_the_saved_config_repeats_the_run(here: Path, go: Go, typed: Go) -> None:
    assert "validation loss" not in go("dpo", "a", "--loss sigmoid=0.5 --loss sft --beta 0.3 --steps 2 --rank 4")
    typed(f"dpo a/{CONFIG} --out b")
    assert (here / "a" / ADAPTER).read_bytes() == (here / "b" / ADAPTER).read_bytes()


def test_dropped_pairs_are_named(go: Go) -> None:
    said = go("dpo", "o", "--max-length 37 --steps 1 --rank 4")
    assert "1 dropped (too long)" in said and "dropped: pairs.jsonl:6" in said


def test_answers_of_one_label_are_noted(here: Path, typed: Go) -> None:
    judged = [{"prompt": f"say {w}", "completion": w, "label": True} for w in "abc"]
    (here / "judged.jsonl").write_text("\n".join(map(json.dumps, judged)))
    said = typed("dpo --model m --data judged.jsonl --out o --loss kto --steps 1 --rank 4")
    assert "all 3 answers are judged good: there is nothing to compare with" in said
    said = typed("reward --model m --data judged.jsonl --out rm", code=2)
    assert "judged.jsonl:1: row: is not a preference pair" in said


def test_a_reward_model_scores_held_out_pairs(here: Path, go: Go) -> None:
    values = last_line(go("reward", "o", "--val pairs.jsonl --epochs 8 --rank 4 --json"))
    assert values["val_reward_accuracy"] == 1 and values["val_reward_margin"] > 0 and values["steps"] == 16
    assert losses("o")[0] == pytest.approx(math.log(2), abs=6e-8)
    names = {path.name for path in (here / "o").iterdir()}
    assert names >= {"adapter_config.json", ADAPTER, HEAD, CONFIG, "metrics.jsonl", "loss.png"}
    model, tokenizer = fourbit.load("m", quant_type="nf4")
    scorer = fourbit.RewardModel.load(model, "o")
    chosen, rejected = (
        scorer.score(tokenizer, [{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS])
        for side in ("chosen", "rejected")
    )
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert sum(margins) / 6 == pytest.approx(values["val_reward_margin"], abs=1e-4)


def test_a_reward_model_answers_nothing(go: Go, typed: Go) -> None:
    said = go("reward", "rm", "--val 30% --steps 1 --rank 4")
    assert "reward accuracy" in " ".join(said.split()) and "validation loss" in said
    assert "fourbit.RewardModel.load(model, 'rm')" in said
    error = "adapter rm is a reward model's"
    for command, flag in (("dpo", "--adapter"), ("distill", "--adapter"), ("distill", "--teacher-adapter")):
        assert error in go(command, "o", f"{flag} rm", code=2)
    assert error in typed("eval --model m --adapter rm --data rows.jsonl", code=2)


def test_reward_goes_on_from_an_adapter_and_from_a_head(here: Path, go: Go, typed: Go, adapter: str) -> None:
    assert "head: goes on" not in go("reward", "first", f"--adapter {adapter} --epochs 4")
    assert read_run("first")["quant"] == "nf4-nodq" and read_run("first")["adapter"] == adapter
    assert "head: goes on from first" in go("reward", "second", "--adapter first --steps 1")
    assert "rank" not in read_run("second"), "the adapter brings its own"
    before = (here / "second" / HEAD).read_bytes()
    typed(f"reward second/{CONFIG} --resume")
    assert (here / "second" / HEAD).read_bytes() == before, "a finished run resumes to nothing"
    assert losses("first")[0] == pytest.approx(math.log(2), abs=6e-8) and losses("second")[0] < 0.65, "it goes on"
    said = go("reward", "second", "--adapter first --steps 1 --resume --center 0.1", code=2)
    assert "other options (center: 0.0 -> 0.1)" in said
    (here / "first" / HEAD).write_bytes(b"broken")
    assert "no valid safetensors file" in go("reward", "third", "--adapter first", code=2)


def test_distill_from_the_same_base_keeps_one_copy(here: Path, go: Go, adapter: str) -> None:
    """A narrower student of the adapter; the link to the model is the model."""
    (here / "link").symlink_to(here / "m")
    flags = f"--teacher-adapter {adapter} --rank 2 --quant nf4-nodq --epochs 6 --teacher link --val val.jsonl --json"
    said = go("distill", "o", flags)
    assert f"teacher: the student's own base, in memory once, with the adapter {adapter}" in said
    assert said.count("model: ") == 1 and "somewhat off" not in said
    values = last_line(said)
    assert values["val_loss"] < losses("o")[0] / 2 and "val_perplexity" not in values
    assert read_run("o")["teacher_quant"] == "nf4-nodq"
    student, _ = fourbit.load("m", quant_type="nf4", double_quant=False)
    assert len(fourbit.load_adapter(student, "o")) == 14


def test_distill_from_another_form_loads_it(here: Path, go: Go, adapter: str) -> None:
    """A dense teacher mends what 4 bits lost; an adapter of another form is remarked on."""
    said = go("distill", "a", "--teacher-quant none --steps 2")
    assert said.count("model: ") == 2 and "teacher: m, without an adapter" in said and losses("a")[0] > 0
    form = "--divergence jsd --jsd-beta 0.3 --top-k 9"
    said = go("distill", "b", f"--teacher-quant none --steps 2 --teacher-adapter {adapter} {form}")
    assert f"the adapter {adapter} was trained on nf4-nodq; on the dense base it will be somewhat off" in said
    shutil.copytree(here / "m", here / "copy")
    said = go("distill", "c", f"--teacher copy --teacher-adapter {adapter} --steps 1")
    assert read_run("c")["teacher_quant"] == "nf4-nodq", "as its adapter was trained"
    assert said.count("model: ") == 2


@pytest.mark.parametrize("loss", ["kto", "bco-unpaired", "bco"])
def test_a_dry_run_of_losses_that_carry_numbers_from_step_to_step(here: Path, typed: Any, loss: str) -> None:
    judged = [{"prompt": f"say {w}", "completion": w, "label": w > "a"} for w in "abc"]
    pairs = [{"prompt": f"say {w}", "chosen": w, "rejected": "no"} for w in "abc"]
    (here / "rows_.jsonl").write_text("\n".join(map(json.dumps, pairs if loss == "bco" else judged)))
    assert "peak" in typed(f"dpo --model m --data rows_.jsonl --out o --loss {loss} --batch-size 3 --dry-run")


def test_a_dry_run_takes_a_teacher_of_transformers(here: Path, typed: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(here / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(here / "m" / name, here / "gpt2")
    assert "peak" in typed("distill --model m --teacher gpt2 --data rows.jsonl --out o --dry-run")


def test_distill_into_all_weights(go: Go, typed: Go, adapter: str) -> None:
    go("distill", "o", f"--teacher-adapter {adapter} --full --lr 1e-3 --steps 2")
    settings = read_run("o")
    assert settings["quant"] == "none" and settings["teacher_quant"] == "nf4-nodq" and "rank" not in settings
    old, new = (fourbit.load(folder)[0].state_dict() for folder in ("m", "o"))
    assert not all(torch.equal(old[name], new[name]) for name in old)
    typed(f"distill o/{CONFIG} --resume")


def test_distill_with_the_base_as_anchor(go: Go) -> None:
    """A student that starts as its teacher has something to learn once the data's tokens count."""
    go("distill", "o", "--sft-weight 1 --steps 3")
    divergence = losses("o", "divergence")
    assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[-1] > 0
    assert losses("o")[0] == pytest.approx(losses("o", "cross_entropy")[0], abs=1e-5)


def test_a_resumed_student_keeps_its_teacher(go: Go, typed: Go, adapter: str) -> None:
    go("distill", "first", f"--teacher-adapter {adapter} --steps 1")
    go("distill", "second", f"--teacher-adapter {adapter} --adapter first --steps 1")
    for out in ("first", "second"):
        typed(f"distill {out}/{CONFIG} --resume")
    said = typed(f"distill first/{CONFIG} --resume --teacher-quant none", code=2)
    assert "was written by a run with another teacher" in said


def test_a_run_whose_template_writes_the_date_is_resumed_on_another_day(
    here: Path, typed: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.today() + timedelta(1)

    (here / "dated.jinja").write_text("{{ strftime_now('%d') }} " + templates.builtin("chatml"))
    typed("sft --model m --data rows.jsonl --val 20% --template dated.jinja --steps 1 --out o")
    monkeypatch.setattr(templates, "Date", Tomorrow)
    assert "all 1 steps of this run were done" in typed(f"sft o/{CONFIG} --resume")


def test_a_run_is_resumed_where_its_files_lie_now(here: Path, typed: Go, adapter: str) -> None:
    """Run, model, data, template and adapter moved: they are compared by what they hold."""
    (here / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    shutil.copytree(adapter, "a")
    typed("sft --model m --data rows.jsonl --adapter a --template t.jinja --steps 2 --save-every 1 --out o")
    (here / "new").mkdir()
    for name in ("m", "rows.jsonl", "t.jinja", "a", "o"):
        (here / name).rename(here / "new" / name)
    first = (here / "new/o" / ADAPTER).read_bytes()
    (here / "new/o" / ADAPTER).unlink()
    moved = "--model new/m --data new/rows.jsonl --adapter new/a --template new/t.jinja --out new/o"
    typed(f"sft new/o/{CONFIG} {moved} --resume new/o/checkpoints/step-000001")
    assert (here / "new/o" / ADAPTER).read_bytes() == first


def test_a_teacher_of_other_tokens_is_refused(here: Path, go: Go) -> None:
    raw = json.loads((shutil.copytree(here / "m", here / "other") / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (here / "other" / "tokenizer.json").write_text(json.dumps(raw))
    said = go("distill", "o", "--teacher other", code=2)
    assert "teacher and student have different tokenizers (259 and 259 tokens; 'a' is 65" in said


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_tokens_train_beside_any_adapter_and_what_follows_uses_them(here: Path, typed: Go, kind: str) -> None:
    flags = f"--kind {kind} --train-tokens '<|im_end|>' --steps 3 --lr 1e-2 --quant nf4-nodq"
    typed(f"sft --model m --data rows.jsonl --out o {flags}")
    config = json.loads((here / "o" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [258]}
    assert config.get("use_dora", False) is (kind == "dora")
    typed("eval --model m --adapter o --data val.jsonl")
    rows = load_file(here / "o" / "adapter_model.safetensors")
    before = load_file(here / "m" / "model.safetensors")["model.embed_tokens.weight"]
    (own,) = [tensor for key, tensor in rows.items() if "tokens_delta" in key]
    assert own.shape == (1, 32) and not torch.equal(own[0], before[258].float())
    assert not any("lm_head" in key for key in rows)  # tied: one part's rows
    again = typed("sft --model m --data rows.jsonl --adapter o --train-tokens '<|im_end|>' --out p", code=2)
    assert "brings its own train_tokens: leave them out" in again
