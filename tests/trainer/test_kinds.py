"""What every kind of training promises: layouts change no gradient, resuming changes no bit, and neither does the rest.

And what the loop offers to kinds that are still to come: "best" by a metric that is to rise.
"""

import signal

import pytest
import torch

import fourbit
from fourbit.data.batch import Batch
from fourbit.errors import InputError
from fourbit.lora.layer import adapter_parameters
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.sft import SFTTrainer
from fourbit.trainer.step import as_sums, parts_of

PAIRED = ("sigmoid", "ipo", "orpo", "bco", "simpo")
JUDGED = ("kto", "bco-unpaired", "apo-zero-unpaired")
DISTILLED = ("distill from the base", "distill from another model")
POLICIES = ("grpo", "rloo", "ppo")
KINDS = ("sft", *PAIRED, *JUDGED, "reward", *POLICIES, *DISTILLED)
STATEFUL = (
    "sft",
    "sigmoid",
    "bco",
    "kto",
    "bco-unpaired",
    "reward",
    "grpo",
    "ppo",
    *DISTILLED,
)  # one for each kind of state
DEFAULTS = (("plain", torch.float32, "cpu"), ("dtype", torch.bfloat16, "cpu"), ("device", torch.float32, "meta"))
LAYOUTS = ({"micro_batch": 1}, {"micro_batch": 3}, {"packing": False}, {"packing": False, "micro_batch": 1})


def gradients(trainer):
    trainer.token_budget = 10**6  # "auto" is one micro-batch
    batches, _ = trainer.step_data(0)
    parts = [part for batch in batches for part in parts_of(as_sums(trainer.sums(batch), batch), backward=True)]
    loss = sum(part.loss for part in parts)
    return loss.item(), {name: parameter.grad for name, parameter in trainer.parameters.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_layout_changes_a_gradient(make, kind):
    """Packed rows, shared prompts, padded rows, any split into micro-batches; of a dense base and one in 4 bits."""
    for dtype, quantize, allowed, layouts in (
        (torch.float64, None, 1e-10, LAYOUTS),
        (torch.float64, "nf4", 1e-10, LAYOUTS[1:3]),
        (torch.float32, None, 2e-5, LAYOUTS[1:3]),
    ):
        loaded = {"dtype": dtype, "quant_type": quantize, "b_seed": 0}
        loaded["batch_size"] = 8
        value, whole = gradients(make(kind, **loaded))
        assert len(whole) == 28 + (kind == "reward") + 29 * (kind == "ppo")
        assert all(gradient.norm() > 0 for name, gradient in whole.items() if "value" not in name)  # its head is 0
        for layout in layouts:
            other_value, other = gradients(make(kind, **loaded, **layout))
            assert other_value == pytest.approx(value, rel=allowed), layout
            for name, gradient in whole.items():
                assert (gradient - other[name]).norm() <= allowed * gradient.norm(), f"{layout}: gradient of {name}"


@pytest.mark.parametrize("b_seed, stop", [(None, 3), (0, 1), (0, 5)], ids=["fresh", "trained before", "late"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_resume_is_bit_exact(make, tmp_path, stopping, assert_same_runs, kind, b_seed, stop):
    """Stopped after any step (in an epoch, at its edge, by an evaluation), the run ends as if it never had been.

    With dropout, shared prompts, and a reference that is the base or the start: weights, optimizer, random generators,
    the best so far, what the kind of training carries, files and metrics.
    """
    options = dict(val=True, eval_every=3, save_every=2, steps=6, dropout=0.2, b_seed=b_seed)
    make(kind, tmp_path / "whole", **options).train(display=None)
    result = make(kind, tmp_path / "cut", **options).train(display=stopping(stop))
    assert result.signal == signal.SIGINT and result.steps == stop and result.checkpoint is not None
    assert not list((tmp_path / "cut").glob("*.safetensors")), "an adapter is that of a whole run"
    result = make(kind, tmp_path / "cut", resume="auto", **options).train(display=None)
    assert result.signal is None and result.steps == 6
    assert_same_runs(tmp_path / "whole", tmp_path / "cut", 6)


@pytest.mark.parametrize("kind", ["sft", "kto", "ppo"])
def test_torchs_default_dtype_and_device_change_nothing(make, tmp_path, assert_same_runs, kind):
    """As a script leaves them that made its model in bf16, or on a GPU."""
    for name, dtype, device in DEFAULTS:
        trainer = make(kind, tmp_path / name, steps=2, val=True, eval_every=1, save_every=1)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                trainer.train(display=None)
        finally:
            torch.set_default_dtype(torch.float32)
    for name in ("dtype", "device"):
        assert_same_runs(tmp_path / "plain", tmp_path / name, 2)


@pytest.mark.parametrize("kind", ["sft", "sigmoid", "kto", "reward", *DISTILLED])
def test_checkpointing_evaluating_and_saving_change_nothing(make, tmp_path, kind):
    """Recomputed activations, evaluations and checkpoints at every step, or none of them: the same adapter."""
    some = {"checkpointing": "on", "val": True, "eval_every": 1, "save_every": 1}
    for name, options in {"plain": {"checkpointing": "off"}, "more": some}.items():
        options = {"steps": 4, "keep_best": False, "dropout": 0.2} | options
        make(kind, tmp_path / name, **options).train(display=None)
    plain, more = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("plain", "more"))
    assert plain and plain == more


@pytest.mark.parametrize("kind", ["sft", "sigmoid", "reward"])
def test_an_adapter_of_any_name_is_trained_and_saved(make, tmp_path, adapted, kind):
    """As "default" is, beside another that stays as it is, though it could train."""

    def renamed(folder, **loaded):
        model, tokenizer = adapted(folder, **loaded)
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8), "mine", seed=0)
        return model, tokenizer

    make(kind, tmp_path / "default", steps=3).train(display=None)
    trainer = make(kind, tmp_path / "mine", adapted=renamed, steps=3, adapter="mine")
    idle = adapter_parameters(trainer.model)
    before = {name: p.detach().clone() for name, p in idle.items()}
    for parameter in idle.values():
        parameter.requires_grad_()
    trainer.train(display=None)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in idle.items())
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("default", "mine")]
    assert files[0] and files[0] == files[1]


class ByEntropy(SFTTrainer):
    best_metric, best_is = "entropy", "highest"


def test_the_best_is_by_any_metric_up_or_down(adapted, tiny_folder, rows, val_rows, tmp_path):
    """Its own metric decides what is kept and when to stop, though the loss says otherwise."""
    options = dict(batch_size=4, lr=2e-2, steps=40, eval_every=1, save_every=2, patience=3)
    config = fourbit.SFTConfig(out=str(tmp_path), **options)
    trainer = ByEntropy(*adapted(tiny_folder, dropout=0.2), train=rows, val=val_rows, config=config)
    result = trainer.train(display=None)
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in r}
    best = max(records, key=lambda step: records[step]["val_entropy"])
    assert result.best_step == best and result.val["entropy"] == records[best]["val_entropy"]
    assert result.stopped_early and result.steps == best + 3
    assert min(records, key=lambda step: records[step]["val_loss"]) != best, (
        "choose a metric that differs from the loss"
    )
    assert trainer.evaluate()["entropy"] == pytest.approx(result.val["entropy"], rel=1e-6), "its weights are in place"


def test_a_batch_says_what_its_loss_is_a_sum_over(make):
    """Trained tokens of rows, pairs of preferences: what a step's loss is divided by."""
    (rows,), (pairs,) = (make(kind, micro_batch=4).step_data(0)[0] for kind in ("sft", "sigmoid"))
    assert isinstance(rows, Batch) and rows.weight == rows.trained > 4 == pairs.weight < pairs.trained


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda model: fourbit.attach(model, fourbit.LoRAConfig(2, 4), "b"),
            "is frozen .*carries b, default; active: b",
        ),
        (lambda model: fourbit.use(model, "default", weights=[0.5]), "counts 0.5 times .*active: default"),
        (lambda model: fourbit.use(model), r"is not active .*carries default; active: none\): call fourbit.use"),
        (
            lambda model: (fourbit.copy_adapter(model, "default", "mine"), fourbit.remove_adapter(model, "default")),
            "is not there .*carries mine; active: none",
        ),
    ],
    ids=["frozen", "half", "off", "another name"],
)
def test_what_is_trained_must_be_there_active_and_trainable(make, rows, tmp_path, change, named):
    """Else the error says what is there; when the trainer is made, and again when it begins."""
    trainer = make("sft", tmp_path)
    change(trainer.model)
    with pytest.raises(InputError, match=f"'default', and it {named}"):
        trainer.train(display=None)
    with pytest.raises(InputError, match=named):
        SFTTrainer(trainer.model, trainer.tokenizer, train=rows, config=fourbit.SFTConfig(out=str(tmp_path)))
