"""What a run may go on from: another base, dtype, trainer or teacher is refused, another layout is told, and a run is
made longer where its course allows it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fourbit
from fourbit.errors import InputError
from fourbit.lora.layer import adapter_parameters
from fourbit.trainer.checkpoint import load_checkpoint, save_checkpoint
from fourbit.trainer.config import SFTConfig
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.resume import SavedState, as_json, changed_options, check_resumed, layout
from fourbit.trainer.run import RunState


class Told:
    """A display that keeps the messages."""

    def __init__(self):
        self.messages = []

    def __call__(self, total, start):
        return self

    def show(self, record): ...

    def message(self, text):
        self.messages.append(text)

    def close(self): ...


def begun(make, kind, stopping, **options):
    """A run that has done two steps of six."""
    make(kind, **{"steps": 6} | options).train(display=stopping(2))


def moved(trainer):
    trainer.model.model.norm.weight.data.add_(1e-6)
    return trainer


def test_another_run_is_refused(make, stopping, rows, pairs):
    begun(make, "sft", stopping)
    for kind, options, change, named in [
        ("sft", {}, moved, "another base"),
        ("sft", {"dtype": torch.bfloat16}, None, "another dtype"),
        ("sft", {"target": "attn"}, None, "another form of its adapter"),
        ("sft", {"dropout": 0.5}, None, "another form of its adapter"),
        ("distill from the base", {}, None, "another trainer .'SFTTrainer', now 'DistillTrainer'.*teacher .None"),
        ("sigmoid", {"rows": pairs}, None, "another trainer"),
    ]:
        again = make(kind, **{"steps": 6, "resume": "auto", "rows": rows} | options)
        with pytest.raises(
            InputError, match=rf"(?s)was written by a run with {named}.*begin a new run in another fold"
        ):
            (change(again) if change else again).train(display=None)


def test_what_stands_beside_an_adapter_is_as_it_was(stopping, adapted, tiny_folder, rows, tmp_path):
    """Other adapters that are active, how much they count, weights of its own that are frozen, its dtype."""

    def run(*, beside=0.5, frozen=None, dtype=torch.float32, **options):
        model, tokenizer = adapted(tiny_folder, b_seed=1)
        fourbit.attach(model, fourbit.LoRAConfig(rank=4), "mine", seed=0, dtype=dtype)
        fourbit.use(model, "mine", *["default"] * bool(beside), weights=[1.0, beside] if beside else None)
        if frozen is not None:
            for name, parameter in adapter_parameters(model, "mine").items():
                if "lora_A" in name:
                    parameter.requires_grad_(False).data.add_(frozen)
        config = SFTConfig(out=str(tmp_path / f"{frozen is None}"), steps=4, batch_size=4, **options)
        return fourbit.SFTTrainer(model, tokenizer, train=rows, config=config, adapter="mine")

    run().train(display=stopping(2))
    run(frozen=0.0).train(display=stopping(2))
    for changed, named in [
        ({"beside": 0}, "adapter beside it"),
        ({"beside": 0.4}, "adapter beside it"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"frozen": 0.1}, "frozen part"),
    ]:
        with pytest.raises(InputError, match=f"by a run with another .*{named}"):
            run(resume="auto", **changed).train(display=None)
    assert run(resume="auto").train(display=None).steps == run(resume="auto", frozen=0.0).train(display=None).steps == 4


def test_gradients_of_before_enter_no_step(make, tmp_path):
    """Left by another's backward pass, or by a step that was cut off, and then resumed in the same object."""
    make("sft", tmp_path / "plain", steps=4).train(display=None)
    trainer = make("sft", tmp_path / "left", steps=4, save_every=2)
    for parameter in trainer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    update = trainer.run.optim_step

    def interrupted(lr=None):
        if trainer.run.steps == 2:
            raise KeyboardInterrupt
        return update(lr)

    trainer.run.optim_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train(display=None)
    trainer.config = replace(trainer.config, resume="auto")
    trainer.train(display=None)
    plain, left = ([r["grad_norm"] for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("plain", "left"))
    assert plain == left


def test_another_teacher_is_refused(make, stopping):
    begun(make, "distill from another model", stopping)
    again = make("distill from another model", steps=6, resume="auto")
    again.teacher.model.norm.weight.data.add_(1e-3)
    with pytest.raises(InputError, match="another teacher"):
        again.train(display=None)


def test_a_distillation_is_no_fine_tuning(make, stopping):
    begun(make, "distill from the base", stopping)
    with pytest.raises(InputError, match=r"another trainer .'DistillTrainer', now 'SFTTrainer'"):
        make("sft", steps=6, resume="auto").train(display=None)


def test_full_training_is_resumed_by_its_settings(make, stopping, tiny_folder, rows, tmp_path):
    """All weights come from the checkpoint, so those of the base that is loaded again do not matter."""

    def run(**options):
        model, tokenizer = fourbit.load(tiny_folder)
        config = SFTConfig(out=str(tmp_path), full=True, steps=4, batch_size=4, lr=1e-3, **options)
        return fourbit.SFTTrainer(model, tokenizer, train=rows, config=config)

    run().train(display=stopping(2))
    assert moved(run(resume="auto")).train(display=None).steps == 4


def test_other_threads_are_told(make, stopping, monkeypatch):
    begun(make, "sft", stopping)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    told = Told()
    assert make("sft", steps=6, resume="auto").train(display=told).steps == 6
    assert any("resumed with another number of threads" in text and "now '99'" in text for text in told.messages)


def going_on(then, first, done=5, **state):
    """The notes of a run on eight rows that is resumed after `done` steps with other options."""
    device, depends = torch.device("cpu"), {"base": "a"}
    old, new = (SFTConfig(**{"out": "o", "batch_size": 4, "lr": 1e-3} | options) for options in (first, first | then))
    saved = SavedState(RunState(done=done, **state), as_json(old), "d", depends, layout(old, device), {})
    now = SavedState(RunState(), as_json(new), "d", depends, layout(new, device), {})
    return check_resumed(Path("step-000005"), saved, now, new, 8)


def test_another_layout_is_told():
    assert going_on({"micro_batch": 2, "packing": False}, {"steps": 9}) == [
        "resumed with another packing ('True', now 'False'), another micro_batch ('auto', now '2'): the same training, "
        "not bit for bit the same"
    ]
    assert going_on({"checkpointing": "on"}, {"steps": 9}) == []


def test_the_same_layout_is_not_told(make, stopping):
    begun(make, "sft", stopping)
    told = Told()
    make("sft", steps=6, resume="auto").train(display=told)
    assert len(told.messages) == 1 and told.messages[0].startswith("resumed from")


LONGER = [
    ({"schedule": "constant", "warmup": 2}, {}),
    pytest.param({"schedule": "inverse-sqrt", "warmup": 2}, {}, marks=pytest.mark.slow),
    pytest.param({"schedule": "wsd", "warmup": 0, "decay": 1}, {}, marks=pytest.mark.slow),  # before its decay
    ({"schedule": "constant", "warmup": 0}, {"schedule": "wsd", "decay": 3}),  # led down at last
    pytest.param({"schedule": "cosine", "warmup": 3}, {}, marks=pytest.mark.slow),  # while it warms up
]


@pytest.mark.parametrize(("first", "then"), LONGER)
def test_a_longer_run_is_the_one_that_was_meant_so(make, stopping, tmp_path, first, then):
    """Weights, optimizer and generators, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"dropout": 0.2, "save_every": 3}
    make("sft", whole, steps=9, **common | first | then).train(display=None)
    make("sft", parts, steps=5, **common | first).train(display=stopping(3))
    if first["schedule"] in ("constant", "inverse-sqrt"):
        make("sft", parts, steps=5, resume="auto", **common | first).train(display=None)  # to its end
    told = Told()
    make("sft", parts, steps=9, resume="auto", **common | first | then).train(display=told)
    assert any("goes on to step 9" in text and "it was to end at step 5" in text for text in told.messages)
    ends = [load_checkpoint(out / "checkpoints" / "step-000009")[0] for out in (whole, parts)]
    for group in ("weights", "optimizer", "rng"):
        assert all(torch.equal(t, ends[1][group][name]) for name, t in ends[0][group].items()), group


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ({}, {}, r"a run of 9 steps by schedule cosine has the learning rate 0.00\d+ in step \d, and this one \(5 st"),
        ({"schedule": "linear"}, {}, "schedule linear has the learning rate"),
        ({"schedule": "wsd", "decay": 2}, {}, "schedule wsd has the learning rate 0.001 in step 5"),
        ({"schedule": "constant"}, {"warmup": 0.5}, "schedule constant has the learning rate"),
        ({"schedule": "constant"}, {"schedule": "linear"}, "schedule linear has the learning rate"),
        ({"schedule": "constant"}, {"steps": 3}, "5 steps of this run are done, more than the 3 asked for"),
    ],
)
def test_a_run_whose_rates_would_be_others_is_refused(first, then, named):
    with pytest.raises(InputError, match=named) as caught:
        going_on({"steps": 9} | then, {"steps": 5, "warmup": 0} | first)
    assert "begin a new run from what this one saved, with another out (an adapter as adapter=" in str(caught.value)


def test_the_advice_for_a_run_that_cannot_be_longer_works(make, tiny_folder, rows, tmp_path):
    make("sft", steps=2).train(display=None)
    with pytest.raises(InputError, match="as adapter="):
        make("sft", steps=4, resume="auto").train(display=None)
    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.load_adapter(model, tmp_path)
    config = SFTConfig(out=str(tmp_path / "more"), steps=2, batch_size=4)
    assert fourbit.SFTTrainer(model, tokenizer, train=rows, config=config).train(display=None).steps == 2


def test_the_end_of_a_shorter_run_counts_as_an_evaluation_and_says_so():
    best = {"best_metrics": {"loss": 1.0}, "evaluated": 5}
    notes = going_on({"steps": 9, "schedule": "constant", "warmup": 0}, {"steps": 5, "schedule": "constant"}, **best)
    assert any("the evaluation after step 5, its end then, counts for the best step too" in note for note in notes)


def test_a_run_that_stopped_early_stays_so():
    with pytest.raises(InputError, match="stopped early, after step 5, and more steps change nothing"):
        going_on({"steps": 40}, {"steps": 20, "schedule": "constant"}, stopped_early=True)


def test_a_finished_run_says_so():
    assert going_on({}, {"steps": 5})[0].startswith("all 5 steps of this run were done: to go on from it")


def test_a_checkpoint_of_nan_is_refused(make, stopping, tmp_path):
    begun(make, "sft", stopping)
    tensors, state = load_checkpoint(tmp_path / "checkpoints" / "step-000002")
    name = min(tensors["weights"])
    tensors["weights"][name] = tensors["weights"][name] * 0 + 1
    path = save_checkpoint(tmp_path / "checkpoints", 3, tensors, state)
    tensors["weights"][name] = tensors["weights"][name] * float("nan")
    with pytest.raises(InputError, match="holds NaN or infinity"):
        _signed(path, tensors["weights"])
        load_checkpoint(path)


def _signed(path, weights):
    """The checkpoint with these weights, and a manifest that fits: what a stranger's program may write."""
    import hashlib

    from safetensors.torch import save_file

    save_file(weights, path / "weights.safetensors")
    body = json.loads((path / "manifest.json").read_text())
    raw = (path / "weights.safetensors").read_bytes()
    body["files"]["weights.safetensors"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    del body["sha256"]
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_bytes(json.dumps(body, sort_keys=True, indent=1).encode() + b"\n")


def test_damaged_metrics_are_left_out_and_told(make, stopping, tmp_path):
    begun(make, "sft", stopping)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first.replace(b'"step": 1', b'"step": "x"') + second + b'5\n{"loss": 1}\n' + second[:9])
    told = Told()
    make("sft", steps=6, resume="auto").train(display=told)
    assert any("3 lines damaged, or not of this run" in text for text in told.messages)
    assert any("lacks 1 of the 2 steps that are done" in text for text in told.messages)
    assert [record["step"] for record in read_metrics(path)] == [2, 3, 4, 5, 6]


def rules(**options):
    return SFTConfig(out="o", **options)


@pytest.mark.parametrize(
    ("options", "numbers", "error"),
    [
        (
            {"steps": 1, "warmup": 1000},
            (3, None),
            r"warmup 1000 is 1,000 steps, and the run has 1 step \(3 rows",
        ),
        ({"epochs": 2, "warmup": 2}, (8, None), "warmup 2 is 2 steps, and the run has 2 steps"),
        ({"steps": 10, "schedule": "wsd", "warmup": 8, "decay": 8}, (80, None), "decay 8 is 8 steps after 8 of warmup"),
        ({"steps": 10, "schedule": "wsd", "decay": 0.01}, (80, None), "decay 0.01 is 0 steps after 0 of warmup"),
        ({"epochs": 3, "patience": 3}, (80, 8), "patience 3 needs more than 3 evaluations, and there will be 3"),
        ({}, (0, None), "there are no rows to train on"),
        ({"patience": 1}, (80, None), "patience needs validation rows: give val, say 5%"),
        ({"eval_every": 1}, (80, None), "eval_every needs validation rows: give val, say 5%"),
        ({}, (8, 0), "no row was left for validation"),
        ({}, (0, 8), "no row was left to train on: rows of one prompt .* Give validation rows of their own"),
    ],
)
def test_settings_that_cannot_do_what_they_say_are_refused_with_the_numbers(options, numbers, error):
    with pytest.raises(InputError, match=error):
        rules(**options).check_rows(*numbers)


def test_a_short_run_takes_the_settings_of_a_long_one():
    """Nothing in them is against each other: the end is saved and evaluated anyway."""
    rules(steps=1, schedule="wsd", eval_every=100, save_every=100).check_rows(80, 8)


def test_files_may_lie_elsewhere_on_resuming():
    """Their contents are compared: rows as the template renders them."""
    assert changed_options(as_json(rules(template="a.jinja")), rules(template="/b/a.jinja")) == []


@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(1, 50),
    st.sampled_from(["cosine", "linear", "constant", "inverse-sqrt", "wsd"]),
    st.floats(0, 1) | st.integers(0, 60), st.none() | st.floats(0.01, 1) | st.integers(1, 60),
)  # fmt: skip
def test_what_passes_reaches_the_full_rate_and_decays_as_told(rows, batch, steps, schedule, warmup, decay):
    config = rules(steps=steps, batch_size=batch, schedule=schedule, warmup=warmup)
    config = replace(config, decay=decay) if schedule == "wsd" else config
    try:
        config.check_rows(rows, None)
    except InputError:
        return
    rates = [config.rate_factor(step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(1)
    if schedule == "wsd" and decay is not None and decay >= 1:
        rising = int(warmup) if warmup >= 1 else round(warmup * steps)
        assert sum(rate == 1 for rate in rates) >= steps - rising - int(decay)


def test_a_micro_batch_is_no_larger_than_its_batch():
    with pytest.raises(InputError, match="micro_batch splits the 8 examples of a step \\(batch_size\\), got 9"):
        rules(micro_batch=9)
