"""Fine-tuning end to end on a tiny model: it learns, layout never changes a gradient, resuming is bit-exact."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

import fourbit
from fourbit.data.batch import pack_batch, pad_batch
from fourbit.data.encode import load as load_rows
from fourbit.data.template import template_for
from fourbit.errors import InputError, NumericError
from fourbit.lora.peft_files import adapter_state
from fourbit.trainer.checkpoint import load_checkpoint
from fourbit.trainer.evaluate import answer_all, evaluate_loss, exact_match
from fourbit.trainer.losses.tokens import batch_token_scores
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.sft import SFTTrainer

TINY = fourbit.LoRAConfig(rank=4, alpha=8)


def batch_token_losses(model, batch):
    return -batch_token_scores(model, batch).logps


def adapted(folder, *, quantize="nf4", dtype=torch.float32, dropout=0.0, b_seed=None):
    model, tokenizer = fourbit.load(folder, quantize=quantize, dtype=dtype)
    fourbit.attach(model, replace(TINY, dropout=dropout), dtype=dtype)
    if b_seed is not None:  # B is zero at first, which would hide half of every gradient
        generator = torch.Generator().manual_seed(b_seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, tokenizer


def config_for(out, **options):
    return fourbit.SFTConfig(out=str(out), **({"batch_size": 4, "lr": 1e-2, "epochs": 2} | options))


def train(folder, rows, out, *, val=None, dropout=0.1, load=adapted, **options):
    model, tokenizer = load(folder, dropout=dropout) if load is adapted else load(folder)
    trainer = SFTTrainer(model, tokenizer, train=rows, val=val, config=config_for(out, **options))
    return model, trainer, trainer.train(display=None)


def test_learns_and_leaves_what_it_promised(tiny_folder, rows, val_rows, tmp_path):
    _, trainer, result = train(tiny_folder, rows, tmp_path, val=val_rows, epochs=6, dropout=0.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, result.steps + 1)) == list(range(1, 37))
    assert steps[-1]["loss"] < steps[0]["loss"] / 1.5 and result.val_loss < steps[0]["loss"]
    assert sum(r["tokens"] for r in steps) == result.tokens
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "loss.png").stat().st_size > 5000
    again, _ = fourbit.load(tiny_folder, quantize="nf4")
    fourbit.load_adapter(again, tmp_path)
    assert evaluate_loss(again, trainer.val_set.examples) == pytest.approx(result.val_loss, abs=1e-6)
    assert result.val_loss == min(r["val_loss"] for r in records if "val_loss" in r)


def gradients(model, batches):
    trained = sum(batch.trained for batch in batches)
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        part = batch_token_losses(model, batch).sum(dtype=torch.float64) / trained
        part.backward()
        loss += part.item()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_packed_is_padded_is_any_split(tiny_folder, rows, quantize):
    model, tokenizer = adapted(tiny_folder, quantize=quantize, dtype=torch.float64, b_seed=3)
    examples = load_rows([rows], tokenizer).examples[:8]
    loss, want = gradients(model, [pad_batch(examples, 0)])
    assert len(want) == 28  # A and B of 14 linears
    layouts = {
        "packed": [pack_batch(examples)],
        "4 x 2": [pad_batch(examples[i : i + 2], 0) for i in range(0, 8, 2)],
        "2 x 4 packed": [pack_batch(examples[:4]), pack_batch(examples[4:])],
        "one by one": [pack_batch([example]) for example in examples],
        "another pad token": [pad_batch(examples, 7)],
    }
    for layout, batches in layouts.items():
        got_loss, got = gradients(model, batches)
        assert got_loss == pytest.approx(loss, abs=1e-10), layout
        for name, gradient in want.items():
            assert (got[name] - gradient).norm() <= 1e-10 * gradient.norm(), (layout, name)


def test_a_wrong_normalisation_would_be_seen(tiny_folder, rows):
    """The mean of micro-batch means, the usual mistake, differs from the truth by far more than the test allows."""
    model, tokenizer = adapted(tiny_folder, dtype=torch.float64)
    data = load_rows([rows], tokenizer, loss_on="all")
    examples = sorted(data.examples, key=lambda e: len(e.ids))[-8:]
    examples = examples[:4] + sorted(data.examples, key=lambda e: len(e.ids))[:4]
    loss, _ = gradients(model, [pad_batch(examples, 0)])
    means = [batch_token_losses(model, pad_batch(part, 0)).mean().item() for part in (examples[:4], examples[4:])]
    assert abs(sum(means) / 2 - loss) > 1e-4


def test_packed_examples_do_not_see_each_other(tiny_folder, rows):
    model, tokenizer = adapted(tiny_folder, b_seed=1)
    examples = load_rows([rows], tokenizer).examples[:5]
    before = batch_token_losses(model, pack_batch(examples)).split([sum(e.trained) for e in examples])
    changed = replace(examples[2], ids=[*examples[2].ids[:12], *[9] * (len(examples[2].ids) - 12)])
    after = batch_token_losses(model, pack_batch([*examples[:2], changed, *examples[3:]]))
    after = after.split([sum(e.trained) for e in examples])
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 2), i


def final_state(out, step):
    tensors, state = load_checkpoint(out / "checkpoints" / f"step-{step:06d}")
    state["config"].pop("out"), state["config"].pop("resume")
    return tensors, state


def assert_same(a, b):
    (tensors_a, state_a), (tensors_b, state_b) = a, b
    assert state_a == state_b
    assert {g: set(t) for g, t in tensors_a.items()} == {g: set(t) for g, t in tensors_b.items()}
    for group, members in tensors_a.items():
        for name, tensor in members.items():
            assert torch.equal(tensor, tensors_b[group][name]), f"{group}/{name}"


class Stop:
    """Sends this process a signal once a step has been recorded: the polite way to end a run."""

    def __init__(self, step, total, start):
        self.step = step

    def show(self, record):
        if record["step"] == self.step and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text): ...

    def close(self): ...


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7, 11])
def test_resume_is_bit_exact(tiny_folder, rows, val_rows, tmp_path, stop):
    """Stopped after any step (in an epoch, at its edge, by an evaluation), the run ends as if it never had been."""
    options = dict(val=val_rows, eval_every=3, save_every=4, dropout=0.2)
    train(tiny_folder, rows, tmp_path / "whole", **options)
    model, tokenizer = adapted(tiny_folder, dropout=0.2)
    first = SFTTrainer(
        model, tokenizer, train=rows, val=val_rows, config=config_for(tmp_path / "cut", eval_every=3, save_every=4)
    )
    result = first.train(display=partial(Stop, stop))
    assert result.signal == signal.SIGINT and result.steps == stop and result.checkpoint is not None
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    model, _, result = train(tiny_folder, rows, tmp_path / "cut", **options, resume="auto")
    assert result.signal is None and result.steps == 12
    assert_same(final_state(tmp_path / "whole", 12), final_state(tmp_path / "cut", 12))
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]
    figures = [
        [{k: v for k, v in r.items() if k not in ("tokens_per_second", "rss_anon")} for r in read_metrics(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    ]
    assert figures[0] == figures[1]


def test_resume_refuses_another_run(tiny_folder, rows, val_rows, tmp_path):
    train(tiny_folder, rows, tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        train(tiny_folder, rows, tmp_path)
    with pytest.raises(InputError, match=r"other options \(lr: 0.01 -> 0.02\)"):
        train(tiny_folder, rows, tmp_path, lr=2e-2, resume="auto")
    with pytest.raises(InputError, match="other training data"):
        train(tiny_folder, val_rows, tmp_path, resume="auto")


def test_resume_auto_starts_afresh_where_nothing_is(tiny_folder, rows, tmp_path):
    _, _, result = train(tiny_folder, rows, tmp_path, steps=2, resume="auto")
    assert result.steps == 2


def test_two_runs_are_identical(tiny_folder, rows, tmp_path):
    for name in ("a", "b"):
        train(tiny_folder, rows, tmp_path / name, steps=5)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_evaluating_changes_nothing(tiny_folder, rows, val_rows, tmp_path):
    train(tiny_folder, rows, tmp_path / "a", steps=5, keep_best=False)
    train(tiny_folder, rows, tmp_path / "b", val=val_rows, eval_every=1, steps=5, keep_best=False)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_checkpointing_changes_nothing(tiny_folder, rows, tmp_path):
    for choice in ("off", "on"):
        train(tiny_folder, rows, tmp_path / choice, steps=5, checkpointing=choice)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("off", "on")]
    assert files[0] == files[1]


def test_keeps_the_best_and_stops_early(tiny_folder, rows, val_rows, tmp_path):
    """A rate far too high makes the validation loss rise: the best weights are kept, and the run ends."""
    model, trainer, result = train(
        tiny_folder, rows, tmp_path, val=val_rows, lr=0.5, epochs=50, eval_every=2, patience=3, dropout=0.0
    )
    losses = {r["step"]: r["val_loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in r}
    assert result.stopped_early and result.steps < trainer.total
    assert result.val_loss == min(losses.values()) == losses[result.best_step]
    assert result.steps == result.best_step + 2 * 3
    assert evaluate_loss(model, trainer.val_set.examples) == pytest.approx(result.val_loss, rel=1e-6)


def test_three_bad_steps_end_the_run(tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    before = {k: v.clone() for k, v in adapter_state(model).items()}
    with pytest.raises(NumericError, match="3 steps in a row"):
        SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path)).train(display=None)
    assert all(torch.equal(v, before[k]) for k, v in adapter_state(model).items())
    (dump,) = tmp_path.glob("nonfinite-step-*.json")
    assert len(json.loads(dump.read_text())["sources"]) == 4
    assert not (tmp_path / "adapter_model.safetensors").exists()
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert all(r["skipped"] and r["loss"] is None for r in steps) and len(steps) == 3


def test_one_bad_step_is_skipped_and_counted(tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    trainer = SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path, steps=4))
    original, calls = model.hidden, []

    def poisoned(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs) * (math.nan if len(calls) == 3 else 1)  # call 1 measures activations

    model.hidden = poisoned
    result = trainer.train(display=None)
    skipped = [r["skipped"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert skipped == [False, True, False, False] and result.skipped_steps == 1
    assert all(torch.isfinite(v).all() for v in adapter_state(model).values())


def test_full_fine_tuning(tiny_folder, rows, tmp_path):
    load = partial(fourbit.load, quantize="none")
    model, _, _ = train(tiny_folder, rows, tmp_path, load=load, full=True, lr=1e-3, epochs=3)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert records[-1]["loss"] < records[0]["loss"]
    again, tokenizer = fourbit.load(tmp_path)
    ids = torch.tensor([tokenizer.encode("hello")])
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("quantize, full, message", [("nf4", True, "dense model"), ("none", False, "no adapter")])
def test_refuses_what_it_cannot_train(tiny_folder, rows, tmp_path, quantize, full, message):
    model, tokenizer = fourbit.load(tiny_folder, quantize=quantize)
    with pytest.raises(InputError, match=message):
        SFTTrainer(model, tokenizer, train=rows, config=config_for(tmp_path, full=full))


def test_answers_are_scored(tiny_folder, rows, tmp_path):
    """Overfit until the answers are right, then ask for them."""
    model, trainer, _ = train(tiny_folder, rows, tmp_path, epochs=40, dropout=0.0, lr=2e-2)
    data = trainer.train_set
    template = template_for(trainer.tokenizer)
    answers = answer_all(model, trainer.tokenizer, template, data.samples, max_new_tokens=8)
    assert exact_match(answers) > 0.8
    assert answers[0].expected and answers[0].prompt.endswith("<|im_start|>assistant\n")
    assert exact_match([replace(a, answer=a.answer + "x") for a in answers]) == 0


def test_tensorboard(tiny_folder, rows, tmp_path):
    train(tiny_folder, rows, tmp_path, steps=3, log=("tensorboard",))
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert events.stat().st_size > 200
