"""Fine-tuning end to end on a tiny model: it learns, layout never changes a gradient, resuming is bit-exact."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from datetime import date
from functools import partial

import pytest
import torch

import fourbit
from fourbit.data import template as templates
from fourbit.data.batch import Example, pack, pad
from fourbit.data.encode import load as load_rows
from fourbit.data.template import template_for
from fourbit.errors import EnvironmentProblem, InputError, NumericError
from fourbit.lora.peft_files import adapter_state
from fourbit.trainer.checkpoint import load_checkpoint, save_checkpoint
from fourbit.trainer.evaluate import answer_all, evaluate_loss, perplexity, share_right
from fourbit.trainer.losses.tokens import batch_token_scores
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.sft import SFTTrainer

TINY = fourbit.LoRAConfig(rank=4, alpha=8)


def token_losses(model, examples, layout):
    return -batch_token_scores(model, layout(list(enumerate(examples)))).logps


def config_for(out, **options):
    return fourbit.SFTConfig(out=str(out), **({"batch_size": 4, "lr": 1e-2, "epochs": 2} | options))


@pytest.fixture
def train(adapted):
    """A function: a run to its end on a model with an adapter, or on the one that `load` gives."""

    def run(folder, rows, out, *, val=None, dropout=0.1, load=None, display=None, **options):
        model, tokenizer = load(folder) if load else adapted(folder, dropout=dropout)
        trainer = SFTTrainer(model, tokenizer, train=rows, val=val, config=config_for(out, **options))
        return model, trainer, trainer.train(display=display)

    return run


@pytest.mark.pictures
def test_learns_and_leaves_what_it_promised(train, tiny_folder, rows, val_rows, tmp_path):
    _, trainer, result = train(tiny_folder, rows, tmp_path, val=val_rows, epochs=6, dropout=0.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, result.steps + 1)) == list(range(1, 37))
    assert steps[-1]["loss"] < steps[0]["loss"] / 1.5 and result.val_loss < steps[0]["loss"]
    assert sum(r["tokens"] for r in steps) == result.tokens
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "loss.png").stat().st_size > 5000
    again, _ = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.load_adapter(again, tmp_path)
    assert evaluate_loss(again, trainer.val_set.examples) == pytest.approx(result.val_loss, abs=1e-6)
    assert result.val_loss == min(r["val_loss"] for r in records if "val_loss" in r)


def test_a_wrong_normalisation_would_be_seen(adapted, tiny_folder, rows):
    """The mean of micro-batch means, the usual mistake, differs from the truth by far more than the test allows."""
    model, tokenizer = adapted(tiny_folder, dtype=torch.float64)
    data = load_rows([rows], tokenizer, loss_on="all")
    examples = sorted(data.examples, key=lambda e: len(e.parts[0].ids))[-8:]
    examples = examples[:4] + sorted(data.examples, key=lambda e: len(e.parts[0].ids))[:4]
    loss = token_losses(model, examples, partial(pad, pad_id=0)).mean().item()
    means = [token_losses(model, part, partial(pad, pad_id=0)).mean().item() for part in (examples[:4], examples[4:])]
    assert abs(sum(means) / 2 - loss) > 1e-4


def test_packed_examples_do_not_see_each_other(adapted, tiny_folder, rows):
    model, tokenizer = adapted(tiny_folder, b_seed=1)
    examples = load_rows([rows], tokenizer).examples[:5]
    before = token_losses(model, examples, pack).split([sum(e.parts[0].trained) for e in examples])
    (part,) = examples[2].parts
    changed = Example((replace(part, ids=[*part.ids[:12], *[9] * (len(part.ids) - 12)]),))
    after = token_losses(model, [*examples[:2], changed, *examples[3:]], pack)
    after = after.split([sum(e.parts[0].trained) for e in examples])
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 2), i


def test_resume_refuses_another_run(train, tiny_folder, rows, val_rows, tmp_path):
    train(tiny_folder, rows, tmp_path)
    with pytest.raises(InputError, match="holds a run"):
        train(tiny_folder, rows, tmp_path)
    with pytest.raises(InputError, match=r"other options \(lr: 0.01 -> 0.02\)"):
        train(tiny_folder, rows, tmp_path, lr=2e-2, resume="auto")
    with pytest.raises(InputError, match="other training data"):
        train(tiny_folder, val_rows, tmp_path, resume="auto")


def test_a_run_whose_template_writes_the_date_goes_on_another_day(train, tiny_folder, rows, tmp_path, monkeypatch):
    class Day(date):
        now = "2026-11-29"

        @classmethod
        def today(cls):
            return cls.fromisoformat(cls.now)

    monkeypatch.setattr(templates, "Date", Day)
    (file := tmp_path / "dated.jinja").write_text("{{ strftime_now('%d') }} " + templates.builtin("chatml"))
    how = {"steps": 1, "template": str(file), "resume": "auto"}
    _, trainer, _ = train(tiny_folder, rows, tmp_path / "run", **how)
    assert trainer.train_set.examples[0].parts[0].text.startswith("29 ")
    Day.now = "2026-11-30"
    for resume in ("auto", str(tmp_path / "run" / "checkpoints" / "step-000001")):
        train(tiny_folder, rows, tmp_path / "run", **how | {"resume": resume})
    tokenizer, source = trainer.tokenizer, trainer.train_set.template.source
    with pytest.raises(InputError, match=re.escape("read with template=ChatTemplate(..., date='2026-11-29')")):
        train(tiny_folder, load_rows(rows, tokenizer, template=str(file)), tmp_path / "run", **how)
    fixed = templates.ChatTemplate(source, tokenizer.named_tokens, date="2026-11-29")
    train(tiny_folder, load_rows(rows, tokenizer, template=fixed), tmp_path / "run", **how)


def run_files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "loss.png"}


def test_a_refused_resume_leaves_the_run_as_it_is_and_tells_of_damaged_checkpoints(train, tiny_folder, rows, tmp_path):
    train(tiny_folder, rows, tmp_path, steps=3, save_every=1)
    (damaged := tmp_path / "checkpoints" / "step-000003" / "state.json").write_text("{}")
    before, shown = run_files(tmp_path), []
    with pytest.raises(InputError, match=r"(?s)other options \(lr.*step-000003/state.json: holds 2 bytes"):
        train(tiny_folder, rows, tmp_path, steps=3, save_every=1, lr=2e-2, resume="auto", display=shown.append)
    assert run_files(tmp_path) == before and damaged in before and not shown


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda state: state.pop("config"), "state.json lacks config"),
        (
            lambda state: state["run"].update(best_figures={}),
            "run holds 'best_figures', which this fourbit does",
        ),
        (lambda state: state.update(run=[1]), r"state.json: run must be a mapping, got \[1\]"),
        (lambda state: state["run"].update(done=-1), "state.json: run: done must be at least 0, got -1"),
        (
            lambda state: state["run"].update(best_metrics={"loss": "x"}),
            "run: best_metrics must be a mapping",
        ),
    ],
)
def test_an_odd_state_is_an_error_of_input(train, tiny_folder, rows, tmp_path, change, named):
    _, _, result = train(tiny_folder, rows, tmp_path, steps=2)
    tensors, state = load_checkpoint(result.checkpoint)
    change(state)
    save_checkpoint(tmp_path / "checkpoints", 2, tensors, state)
    with pytest.raises(InputError, match=named):
        train(tiny_folder, rows, tmp_path, steps=2, resume="auto")


def test_without_tensorboard_nothing_is_shown_or_cut(train, tiny_folder, rows, tmp_path, monkeypatch):
    train(tiny_folder, rows, tmp_path, steps=2, save_every=1)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    before = run_files(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentProblem, match="pip install tensorboard"):
        train(
            tiny_folder, rows, tmp_path, steps=2, save_every=1, resume="auto", log=("tensorboard",), display=pytest.fail
        )
    assert run_files(tmp_path) == before


@pytest.mark.parametrize(
    "out, error, named",
    [
        ("file", InputError, "out .*file is no folder: .*give another out"),
        ("file/below", InputError, "below is no folder: .*give another out"),
        ("/proc/none/x", EnvironmentProblem, "cannot write to the output folder /proc/none/x"),
    ],
)
def test_an_output_folder_that_cannot_be(train, tiny_folder, rows, tmp_path, out, error, named):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match=named):
        train(tiny_folder, rows, tmp_path / out, steps=1)


@pytest.mark.parametrize("loss, value", [(0.0, 1.0), (700.0, math.inf), (1e6, math.inf), (math.nan, math.nan)])
def test_perplexity_of_any_loss(loss, value):
    assert perplexity(loss) == pytest.approx(value, nan_ok=True)


def test_resume_auto_starts_afresh_where_nothing_is(train, tiny_folder, rows, tmp_path):
    _, _, result = train(tiny_folder, rows, tmp_path, steps=2, resume="auto")
    assert result.steps == 2


def test_two_runs_are_identical(train, tiny_folder, rows, tmp_path):
    for name in ("a", "b"):
        train(tiny_folder, rows, tmp_path / name, steps=5)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_keeps_the_best_and_stops_early(train, tiny_folder, rows, val_rows, tmp_path):
    """A rate far too high makes the validation loss rise: the best weights are kept, and the run ends."""
    model, trainer, result = train(
        tiny_folder, rows, tmp_path, val=val_rows, lr=0.5, epochs=50, eval_every=2, patience=3, dropout=0.0
    )
    losses = {r["step"]: r["val_loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in r}
    assert result.stopped_early and result.steps < trainer.total
    assert result.val_loss == min(losses.values()) == losses[result.best_step]
    assert result.steps == result.best_step + 2 * 3
    assert evaluate_loss(model, trainer.val_set.examples) == pytest.approx(result.val_loss, rel=1e-6)


def test_three_bad_steps_end_the_run(train, adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    before = {k: v.clone() for k, v in adapter_state(model).items()}
    with pytest.raises(NumericError, match=r"3 steps in a row .*; first not finite: the output of model.norm"):
        SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path)).train(display=None)
    assert all(torch.equal(v, before[k]) for k, v in adapter_state(model).items())
    (dump,) = tmp_path.glob("nonfinite-step-*.json")
    assert len(json.loads(dump.read_text())["sources"]) == 4
    assert not (tmp_path / "adapter_model.safetensors").exists()
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert all(r["skipped"] and r["loss"] is None for r in steps) and len(steps) == 3


def test_a_run_of_bad_steps_alone_is_no_success(adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    model.model.norm.weight.data[0] = math.inf
    with pytest.raises(NumericError, match="in 1 steps in a row"):
        SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path, steps=1)).train(display=None)


def test_a_loss_that_is_no_number_names_the_layer(adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    trainer = SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path))
    model.model.layers[1].mlp.down_proj.adapters["default"].lora_B.data[0, 0] = math.nan
    with pytest.raises(NumericError, match=r"train.jsonl:1 .* first in the output of model.layers.1.mlp.down_proj"):
        evaluate_loss(model, trainer.train_set.examples)


def test_one_bad_step_is_skipped_and_counted(train, adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    trainer = SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path, steps=4))
    original, calls = model.hidden, []

    def poisoned(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs) * (math.nan if len(calls) == 2 else 1)

    model.hidden = poisoned
    result = trainer.train(display=None)
    skipped = [r["skipped"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert skipped == [False, True, False, False] and result.skipped_steps == 1
    assert all(torch.isfinite(v).all() for v in adapter_state(model).values())


def test_full_fine_tuning(train, tiny_folder, rows, tmp_path):
    load = partial(fourbit.load, quant_type=None)
    model, _, _ = train(tiny_folder, rows, tmp_path, load=load, full=True, lr=1e-3, epochs=3)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert records[-1]["loss"] < records[0]["loss"]
    again, tokenizer = fourbit.load(tmp_path)
    ids = torch.tensor([tokenizer.encode("hello")])
    assert torch.equal(again(ids), model(ids))
    assert tokenizer.stop_ids == fourbit.models.load.load_tokenizer(tiny_folder).stop_ids != ()
    assert (tmp_path / "generation_config.json").is_file()


@pytest.mark.parametrize("quant_type, full, message", [("nf4", True, "dense model"), (None, False, "no adapter")])
def test_refuses_what_it_cannot_train(tiny_folder, rows, tmp_path, quant_type, full, message):
    model, tokenizer = fourbit.load(tiny_folder, quant_type=quant_type)
    with pytest.raises(InputError, match=message):
        SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path, full=full))


def test_answers_are_scored(train, tiny_folder, rows, tmp_path):
    """Overfit until the answers are right, then ask for them."""
    model, trainer, _ = train(tiny_folder, rows, tmp_path, epochs=40, dropout=0.0, lr=2e-2)
    data = trainer.train_set
    template = template_for(trainer.tokenizer)
    answers = [*answer_all(model, trainer.tokenizer, template, data.samples, max_new_tokens=8)]
    assert share_right(answers) > 0.8 and math.isnan(share_right([]))
    assert answers[0].expected and answers[0].prompt.endswith("<|im_start|>assistant\n")


def test_tensorboard(train, tiny_folder, rows, tmp_path):
    train(tiny_folder, rows, tmp_path, steps=3, log=("tensorboard",))
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert events.stat().st_size > 200
