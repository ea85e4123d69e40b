"""Several adapters in one run: each ends as it does alone, and what befalls one befalls it alone."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

import fourbit
from fourbit.data.encode import load
from fourbit.errors import InputError, NumericError
from fourbit.lora.active import remove_adapter
from fourbit.lora.layer import adapter_parameters
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.sweep import SweepTrainer, grid

EIGHT = {  # settings of the adapter, of its training; c has other rows than the rest, h the fewest steps
    "a": ({"rank": 8}, {}),
    "b": ({"rank": 16, "rslora": True}, {"lr": 1e-3}),
    "c": ({"rank": 4}, {"seed": 3, "epochs": 2}),
    "d": ({"rank": 8, "alpha": 4.0}, {"schedule": "linear", "warmup": 2}),
    "e": ({"rank": 9}, {"weight_decay": 0.1, "lora_plus": 4.0}),
    "f": ({"rank": 8, "target": "attn"}, {"max_grad_norm": 0.05}),
    "g": ({"rank": 12}, {"optimizer": "lion", "lr": 3e-4}),
    "h": ({"rank": 8}, {"batch_size": 3, "steps": 2, "schedule": "constant"}),
    "i": ({"kind": "adalora", "rank": 2, "initial_rank": 4, "rank_warmup": 0.2, "rank_final": 0.4}, {}),
    "j": (
        {"kind": "adalora", "rank": 3, "initial_rank": 4, "rank_warmup": 0.2, "rank_final": 0.4},
        {"seed": 5, "epochs": 2},
    ),
    "k": ({"kind": "dora", "rank": 4}, {}),
}


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    """One model of float64, whose adapters tests take off again, and its tokenizer."""
    return fourbit.load(tiny_folder, quant_type="nf4", dtype=torch.float64)


@pytest.fixture(scope="module")
def sets(loaded, rows, val_rows, tmp_path_factory):
    """The rows, others of them with longer answers, and those to validate on."""
    path = tmp_path_factory.mktemp("other") / "other.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()][::-2]
    for line in lines:
        line["messages"][-1]["content"] += " and more"
    path.write_text("\n".join(map(json.dumps, lines)))
    return [load([file], loaded[1]) for file in (rows, path, val_rows)]


@pytest.fixture
def trainers(loaded, sets, tmp_path):
    """A function: trainers of these adapters, each in its folder in `folder`; several on one model."""
    model, tokenizer = loaded
    there = []

    def make(names="abcdefgh", folder="sweep", *, val=None, **options):
        while there:
            remove_adapter(model, there.pop())
        made = []
        for name in names:
            lora, own = EIGHT[name]
            fourbit.attach(model, fourbit.LoRAConfig(**lora), name, seed=7, dtype=torch.float64)
            there.append(name)
            own = {"batch_size": 8, "lr": 3e-3, "epochs": 1} | own | options
            config = fourbit.SFTConfig(out=str(tmp_path / folder / name), **own)
            rows = sets[name == "c"]
            made.append(fourbit.SFTTrainer(model, tokenizer, train=rows, val=val, config=config, adapter=name))
        return made

    yield make
    make("")


def weights(trainer):
    return {name: p.detach().clone() for name, p in adapter_parameters(trainer.model, trainer.adapter).items()}


def worst(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def test_eight_adapters_equal_eight_runs_alone(trainers, tmp_path, sets):
    """Weights after all steps, the loss, norm and rate of each step, evaluations and the best: of ranks, targets,
    rates, schedules, optimizers, clipping, seeds, rows and numbers of steps of their own."""
    together = trainers(val=sets[2])
    found = SweepTrainer(together).train(display=None)
    assert not found.failed and {r.steps for r in found.results.values()} == {2, 3, 4}
    ends = {trainer.adapter: weights(trainer) for trainer in together}
    for name in "abcdefgh":
        (alone,) = trainers(name, "alone", val=sets[2])
        result = alone.train(display=None)
        assert worst(ends[name], weights(alone)) < 1e-9, name
        for kept in ("loss", "val_loss", "best_step", "tokens", "steps"):
            assert getattr(found.results[name], kept) == pytest.approx(getattr(result, kept), abs=1e-9), (name, kept)
        for ours, theirs in zip(
            *(read_metrics(tmp_path / run / name / "metrics.jsonl") for run in ("sweep", "alone")), strict=True
        ):
            for key in theirs.keys() & {"loss", "lr", "grad_norm", "token_accuracy", "entropy", "val_loss"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (name, ours["step"], key)
    best = min(found.results, key=lambda name: found.results[name].val_loss)
    assert found.best == best and f"\n{best} " in found.table()


def test_kinds_with_state_of_their_own_do_not_meddle(trainers, sets):
    """AdaLoRA's sensitivities and masks, which the best weights and resuming bring back, are each one's own; DoRA."""
    options = {"val": sets[2], "eval_every": 2, "save_every": 3, "lr": 2e-2}
    SweepTrainer(made := trainers("ijk", **options)).train(display=None)
    ends = {trainer.adapter: weights(trainer) for trainer in made}
    SweepTrainer(trainers("ijk", "cut", **options)).train(display=Stop("j", 4))
    SweepTrainer(made := trainers("ijk", "cut", **options, resume="auto")).train(display=None)
    assert all(worst(weights(trainer), ends[trainer.adapter]) < 1e-12 for trainer in made)
    for name in "ijk":
        (alone,) = trainers(name, "alone", **options)
        alone.train(display=None)
        assert worst(ends[name], weights(alone)) < 1e-9, name


def moved(trainer):
    """Weights as in the middle of training: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def gradients_of(trainer):
    return {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}


@pytest.mark.parametrize("layout", [{}, {"packing": False}, {"micro_batch": 1}], ids=["packed", "padded", "one by one"])
def test_one_batch_has_each_adapters_gradients(trainers, layout):
    """Of three in forward passes together, as of each alone; a loss over all tokens would be far off."""

    def step(made):
        courses = {t.adapter: t.step_data(0)[0] for t in made}
        for trainer in made:
            trainer.recompute = False
            moved(trainer)
        SweepTrainer(made)._forward_backward(courses)
        found = {t.adapter: gradients_of(t) for t in made}
        means = {t.adapter: sum(mean.item() for mean, _ in t.run.gathered) for t in made}
        return found, means, {name: sum(batch.weight for batch in own) for name, own in courses.items()}

    ours, means, counted = step(trainers("ach", **layout))
    for name in "ach":
        (alone,) = trainers(name, "alone", **layout)
        moved(alone)
        mean, _ = alone.run.forward_backward(*alone.step_data(0)[0])
        theirs = gradients_of(alone)
        scale = max(gradient.abs().max().item() for gradient in theirs.values())
        assert scale > 1e-3 and worst(ours[name], theirs) < 1e-12 and means[name] == pytest.approx(mean.item(), 1e-12)
        over_all = {key: gradient * counted[name] / sum(counted.values()) for key, gradient in ours[name].items()}
        assert worst(over_all, theirs) > scale / 5


class Looks(fourbit.Callback):
    def on_step(self, run, record):
        return {"mode": torch.get_deterministic_debug_mode()}


def test_the_first_says_whether_a_sweep_is_deterministic(trainers, tmp_path):
    first, second = trainers("ab", steps=1)
    first.config = replace(first.config, deterministic=True)
    first.callbacks = [Looks()]
    SweepTrainer([first, second]).train(display=None)
    assert read_metrics(tmp_path / "sweep" / "a" / "metrics.jsonl")[0]["mode"] == 2
    assert torch.get_deterministic_debug_mode() == 0


def test_one_that_diverges_ends_alone(trainers, tmp_path):
    """NaN in one adapter: its steps are skipped, its run ends with the error that it has alone, and the others'
    weights are those of a sweep without it; where all diverge, that is the error."""
    SweepTrainer(kept := trainers("ab", "two")).train(display=None)
    ends = {trainer.adapter: weights(trainer) for trainer in kept}

    def spoilt(names, folder):
        made = trainers(names, folder)
        with torch.no_grad():
            next(iter(made[-1].parameters.values()))[0, 0] = torch.nan
        return made

    with pytest.raises(NumericError) as alone:
        spoilt("d", "alone")[0].train(display=None)
    made = spoilt("abd", "three")
    found = SweepTrainer(made).train(display=None)
    assert found.failed == {"d": str(alone.value).replace(f"{tmp_path}/alone", f"{tmp_path}/three")}
    assert "d " in found.table() and "failed: loss or gradient was not finite" in found.table()
    assert all(worst(weights(trainer), ends[trainer.adapter]) < 1e-9 for trainer in made[:2])
    assert not (tmp_path / "three" / "d" / "adapter_model.safetensors").exists()
    with pytest.raises(NumericError, match="not finite"):
        SweepTrainer(spoilt("d", "all")).train(display=None)


class Stop:
    """Sends this process a signal once one's step has been recorded."""

    def __init__(self, name, step):
        self.name, self.step, self.shown = name, step, []

    def __call__(self, total, start, name):
        self.shown.append((name, total, start))
        return _Shown(self, name)


class _Shown:
    def __init__(self, stop, name):
        self.stop, self.name = stop, name

    def show(self, record):
        if (self.name, record["step"]) == (self.stop.name, self.stop.step):
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text): ...

    def close(self): ...


def test_stopped_and_resumed_it_ends_as_if_it_never_had_been(trainers, sets, tmp_path):
    """Each goes on from its own checkpoint; h is done before the signal, and is not trained again."""
    options = {"val": sets[2], "eval_every": 2, "save_every": 2, "epochs": 2}
    whole = SweepTrainer(made := trainers("ach", "whole", **options)).train(display=None)
    ends = {trainer.adapter: weights(trainer) for trainer in made}
    found = SweepTrainer(trainers("ach", **options)).train(display=(stop := Stop("a", 3)))
    assert stop.shown == [("a", 6, 0), ("c", 4, 0), ("h", 2, 0)]
    assert {name: result.steps for name, result in found.results.items()} == {"a": 3, "c": 3, "h": 2}
    assert found.results["a"].signal == signal.SIGINT and found.results["a"].checkpoint is not None
    again = SweepTrainer(made := trainers("ach", resume="auto", **options)).train(display=None)
    assert again.results.keys() == whole.results.keys() and again.best == whole.best
    for trainer in made:
        assert worst(weights(trainer), ends[trainer.adapter]) == 0
        assert losses(tmp_path / "sweep" / trainer.adapter) == losses(tmp_path / "whole" / trainer.adapter)


def test_each_adapter_is_a_run_of_its_own(trainers, loaded, tmp_path):
    """Its folder opens as an adapter, and its own trainer goes on from its checkpoint, alone."""
    SweepTrainer(made := trainers("ab", save_every=1)).train(display=None)
    ends = {trainer.adapter: weights(trainer) for trainer in made}
    fourbit.load_adapter(loaded[0], tmp_path / "sweep" / "b", name="opened")
    opened = adapter_parameters(loaded[0], "opened")
    remove_adapter(loaded[0], "opened")
    assert worst(opened, ends["b"]) < 1e-7  # fp32 masters
    (tmp_path / "sweep" / "b" / "adapter_model.safetensors").unlink()
    (alone,) = trainers("b", resume=str(tmp_path / "sweep" / "b" / "checkpoints" / "step-000002"))
    alone.train(display=None)
    assert worst(weights(alone), ends["b"]) < 1e-9


@pytest.mark.parametrize(("kind", "buffer"), [("adalora", ".kept"), ("vera", ".vera_A"), ("lora-fa", ".lora_A")])
def test_checkpoints_do_not_know_what_their_adapter_is_called(loaded, sets, tmp_path, kind, buffer):
    """So that one of a sweep goes on alone, under another name: of kinds with buffers too."""
    (model, tokenizer), found = loaded, []
    for name in ("default", "rank=2"):
        fourbit.attach(model, fourbit.LoRAConfig(kind=kind, rank=2), name, seed=7, dtype=torch.float64)
        config = fourbit.SFTConfig(out=str(tmp_path / name))
        trainer = fourbit.SFTTrainer(model, tokenizer, train=sets[0], config=config, adapter=name)
        found.append(trainer.run.weights())
        remove_adapter(model, name)
        assert any(key.endswith(buffer) and key not in trainer.parameters for key in found[-1])
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_paged_states_stay_within_their_budgets(trainers, tmp_path, monkeypatch):
    """The same weights and losses, also where memory runs out in a backward and all states make room; what an adapter
    that is done had on the device goes to the host."""
    SweepTrainer(plain := trainers("ah", "plain")).train(display=None)
    ends = {trainer.adapter: weights(trainer) for trainer in plain}
    made = trainers("ah", optimizer="paged-adamw", optimizer_budget="128KiB")
    held, calls, real = [], [], torch.Tensor.backward

    def note():
        pagers = [each.run.optimizer.pager for each in made]
        held.append([0 if pager is None else pager.held for pager in pagers])

    def backward(self):
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        real(self)

    for trainer in made:
        trainer.applied = lambda _: note()
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    SweepTrainer(made).train(display=None)
    for trainer in made:
        assert worst(weights(trainer), ends[trainer.adapter]) == 0
        assert losses(tmp_path / "sweep" / trainer.adapter) == losses(tmp_path / "plain" / trainer.adapter)
        assert trainer.run.optimizer.pager.counters.misses and trainer.run.retries == 2
    assert max(map(max, held)) <= 128 * 1024 and held[-1][1] == 0 < held[0][0]


def test_trainers_that_do_not_go_together_are_refused(trainers, loaded, sets, tmp_path):
    a, b = trainers("ab")
    config = fourbit.SFTConfig(out=a.config.out)
    fourbit.use(loaded[0], "b")
    twin = fourbit.SFTTrainer(*loaded, train=sets[0], config=config, adapter="b")
    own = fourbit.SFTTrainer(*loaded, train=sets[0], config=b.config, adapter="b", loss=lambda model, batch: 0)
    for others in ([a, twin], [a, a], [a, own]):
        with pytest.raises(InputError, match="a sweep takes SFTTrainers on one model with no loss"):
            SweepTrainer(others)


def test_a_grid_names_every_combination():
    found = grid({"rank": [4, 16], "lr": ["1e-4", 0.5], "data": ["a/b.jsonl"]})
    assert list(found) == ["rank=4,lr=1e-4,data=a_b_jsonl", "rank=4,lr=0_5,data=a_b_jsonl", *list(found)[2:]]
    assert list(found.values())[3] == {"rank": 16, "lr": 0.5, "data": "a/b.jsonl"} and len(found) == 4
    alike = grid({"data": ["a b", "a/b", "x" * 300]})
    assert len(alike) == 3 and max(map(len, alike)) < 128
