"""One's own loss, optimizer, scheduler, metrics and callbacks in the trainers; each example is what a user writes."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, softplus

import fourbit
from fourbit.data.batch import Batch
from fourbit.errors import InputError
from fourbit.trainer.checkpoint import load_checkpoint
from fourbit.trainer.losses.tokens import batch_token_scores, summed
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.resume import described
from fourbit.trainer.step import Sums


@pytest.fixture
def trainer_of(tiny_folder, rows, val_rows, tmp_path):
    """A function: a trainer with parts of one's own, on the tiny model."""

    def make(
        out,
        *,
        kind=fourbit.SFTTrainer,
        config=fourbit.SFTConfig,
        train=rows,
        dtype=torch.float32,
        parts=None,
        **options,
    ):
        model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4", dtype=dtype)
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8), seed=0, dtype=dtype)
        parts = {"val": val_rows if kind is fourbit.SFTTrainer else None} | (parts or {})
        config = config(out=str(tmp_path / out), **({"batch_size": 4, "steps": 4, "save_every": 2} | options))
        return kind(model, tokenizer, train=train, config=config, **parts)

    return make


def focal(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 4) with gamma 2, on log-probabilities of tokens."""
    logps = batch_token_scores(model, batch).logps
    return -((1 - logps.exp()) ** 2) * logps


def focal_on_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The same from logits, for what log-probabilities do not say."""
    logits = model(batch.input_ids, batch.position_ids, batch.spans).flatten(0, 1)[batch.rows]
    losses = cross_entropy(logits.float(), batch.targets, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


def test_a_loss_of_ones_own(trainer_of, tmp_path):
    """Any split gives the same step; evaluations and keep_best go by it; perplexity is not claimed of it."""
    runs = {"whole": (focal, {}), "split": (focal, {"micro_batch": 1}), "logits": (focal_on_logits, {"packing": False})}
    losses = {}
    for name, (loss, options) in runs.items():
        trainer = trainer_of(name, parts={"loss": loss}, **options)
        result = trainer.train(display=None)
        losses[name] = [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
        assert trainer.evaluate()["loss"] == pytest.approx(result.val_loss, rel=1e-6) and "perplexity" not in result.val
    assert losses["split"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["logits"] == pytest.approx(losses["whole"], rel=1e-4)
    with pytest.raises(InputError, match=r"another loss .'focal', now None"):
        trainer_of("whole", resume="auto").train(display=None)
    with pytest.raises(InputError, match="the step's mean"):
        trainer_of("mean", parts={"loss": lambda model, batch: focal(model, batch).mean()}).train(display=None)


def test_losses_of_ones_own_on_preferences(trainer_of, tmp_path):
    """DPO's from `Scores`, a reward model's from two rewards: written again, they are the built-in ones."""
    lines = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": f"x{w}"} for w in "abcdefgh"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    both = [
        (fourbit.DPOTrainer, fourbit.DPOConfig, lambda scores: -logsigmoid(0.1 * (scores.ratio[0] - scores.ratio[1]))),
        (fourbit.RewardTrainer, fourbit.RewardConfig, lambda chosen, rejected: softplus(rejected - chosen)),
    ]
    for kind, config, loss in both:
        how = dict(kind=kind, config=config, train=tmp_path / "pairs.jsonl", lr=1e-2, steps=3)
        for name, parts in {"built-in": {}, "own": {"loss": loss}}.items():
            trainer_of(f"{kind.__name__} {name}", parts=parts, **how).train(display=None)
        own, built_in = (
            [r["loss"] for r in read_metrics(tmp_path / f"{kind.__name__} {name}" / "metrics.jsonl")]
            for name in ("own", "built-in")
        )
        assert own == pytest.approx(built_in, rel=1e-5) and own[0] > own[-1]
        with pytest.raises(InputError, match="the step's mean"):
            mean = {"loss": lambda *given, loss=loss: loss(*given).mean()}
            trainer_of(f"{kind.__name__} mean", parts=mean, **how).train(display=None)


class Stretched(torch.optim.Optimizer):
    """Keeps a number, a text and moments of 64 bits, whatever the parameters are in."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, None)})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("wide", torch.zeros_like(p, dtype=torch.float64)).add_(p.grad.double() / 3)
                    state["calls"], state["kind"] = state.get("calls", 0) + 1, ("plain", None)
                    p.data.add_(state["wide"].to(p.dtype), alpha=-group["lr"])


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW([{"params": parameters, "lr": torch.tensor(1e-2)}], foreach=False),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
    "stretched": lambda parameters: Stretched(parameters, lr=0.1),
    "ours": lambda parameters: fourbit.optim.AdamW(parameters, lr=1e-2, bits=8, min_8bit_size=64),
}
SCHEDULERS = {
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7),
    "chained": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2),
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.1),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize(
    "optimizer, scheduler",
    [
        pytest.param("sgd", None, marks=pytest.mark.slow),
        ("adamw", "exponential"),
        pytest.param("adagrad", "chained", marks=pytest.mark.slow),
        ("stretched", None),
        pytest.param("ours", "exponential", marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_and_a_scheduler_of_ones_own_go_on_bit_for_bit(trainer_of, tmp_path, optimizer, scheduler):
    """Their state is in checkpoints as safetensors and JSON; a run that was stopped ends as one that was not."""
    dtype = torch.bfloat16 if optimizer == "stretched" else torch.float32
    parts = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS.get(scheduler), "callbacks": [Stop(at=2)]}
    whole = trainer_of("whole", parts=parts | {"callbacks": []}, dtype=dtype)
    whole.train(display=None)
    with pytest.raises(KeyboardInterrupt):
        trainer_of("cut", parts=parts, dtype=dtype).train(display=None)
    trainer_of("cut", parts=parts | {"callbacks": []}, dtype=dtype, resume="auto").train(display=None)
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "step-000004") for name in ("whole", "cut")]
    assert ends[0][1]["loop"] == ends[1][1]["loop"]
    for group, tensors in ends[0][0].items():
        for name, tensor in tensors.items():
            other = ends[1][0][group][name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), f"{group}: {name}"
    rates = [r["lr"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "lr" in r]
    first = float({"adagrad": 0.01}.get(optimizer, whole.run.optimizer.param_groups[0]["initial_lr"]))
    falls = {"exponential": [1, 0.7, 0.49, 0.343], "chained": [1, 1, 2, 0.2], None: [1, 0.8536, 0.5, 0.1464]}[scheduler]
    assert rates == pytest.approx([first * fall for fall in falls], rel=1e-3)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


class Stop(fourbit.Callback):
    """Kills the run once a checkpoint of this step is there."""

    def __init__(self, at):
        self.at = at

    def on_checkpoint(self, run, folder):
        if folder.name.endswith(str(self.at)):
            raise KeyboardInterrupt


def test_an_optimizer_that_cannot_be_meant_is_refused_before_a_step(trainer_of, tiny_folder):
    strange = nn.Linear(2, 2)
    hooked = lambda parameters: torch.optim.SGD([{"params": parameters, "hook": print}], lr=0.1)
    for optimizer, said in (
        (torch.optim.SGD(strange.parameters(), lr=0.1), "2 of the optimizer's 2 parameters are not trained here"),
        (lambda parameters: torch.optim.LBFGS(parameters), "LBFGS calls the loss itself"),
        (hooked, r"groups.0.hook of the state holds .* and a checkpoint holds tensors"),
    ):
        with pytest.raises(InputError, match=said):
            trainer_of("no", parts={"optimizer": optimizer}).train(display=None)
    for options, said in (({"lr": 1e-3, "weight_decay": 0.1}, "lr, weight_decay would do nothing"), ({}, None)):
        if said:
            with pytest.raises(InputError, match=said):
                trainer_of("no", parts={"optimizer": OPTIMIZERS["sgd"]}, **options)
    with pytest.raises(InputError, match="schedule, warmup would do nothing, as a scheduler of your own"):
        trainer_of("no", parts={"scheduler": SCHEDULERS["exponential"]}, schedule="linear", warmup=0.1)
    with pytest.raises(InputError, match="head_lr would do nothing"):
        trainer_of(
            "no", kind=fourbit.RewardTrainer, config=fourbit.RewardConfig, head_lr=1.0, parts={"optimizer": hooked}
        )


class Watch(fourbit.Callback):
    """A metric of one's own, each step and each evaluation; and a stop once it is good enough."""

    def __init__(self):
        self.saved = []

    def on_step(self, run, record):
        return {"perplexity": torch.tensor(record["loss"]).exp()}

    def on_evaluate(self, run, metrics):
        answers = run.sample(["ab"], max_new_tokens=2, temperature=0)
        if run.steps >= 3:
            run.stopped = True
        return {"length": len(answers[0].ids)}

    def on_checkpoint(self, run, folder):
        self.saved.append(folder.name)


def test_callbacks_measure_and_stop(trainer_of, tmp_path):
    """Their metrics stand in metrics.jsonl; a stopped run is evaluated, saved, and stays so."""
    watch = Watch()
    trainer_of("plain", keep_best=False, steps=3, schedule="constant", eval_every=1).train(display=None)
    how = dict(keep_best=False, steps=9, schedule="constant", eval_every=1, parts={"callbacks": [watch]})
    result = trainer_of("watched", **how).train(display=None)
    assert result.stopped_early and result.steps == 3 and watch.saved == ["step-000002", "step-000003"]
    records = read_metrics(tmp_path / "watched" / "metrics.jsonl")
    assert [r["val_length"] for r in records if "val_loss" in r] == [result.val["length"]] * 3
    steps = [r for r in records if "loss" in r]
    assert [r["perplexity"] for r in steps] == pytest.approx([2.718281828 ** r["loss"] for r in steps], rel=1e-5)
    both = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "watched")]
    assert both[0] == both[1], "looking on changes nothing"
    again = trainer_of("watched", resume="auto", **how).train(display=None)
    assert again.stopped_early and again.steps == 3

    class Taken(fourbit.Callback):
        def on_step(self, run, record):
            return {"loss": 0.0}

    with pytest.raises(InputError, match="names of their own, got loss"):
        trainer_of("taken", parts={"callbacks": [Taken()]}).train(display=None)


def test_a_trainer_evaluates_alone_and_goes_on_with_itself(trainer_of, tmp_path):
    """Before training and after; one object, stopped in between, ends as one that was not."""
    trainer = trainer_of("twice", resume="auto", parts={"callbacks": [Stop(at=2)]})
    start = trainer.evaluate()
    assert start == trainer.evaluate() and start["loss"] > 0 and "perplexity" in start
    with pytest.raises(KeyboardInterrupt):
        trainer.train(display=None)
    trainer.callbacks = []
    trainer.train(display=None)
    trainer_of("once").train(display=None)
    both = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("once", "twice")]
    assert both[0] == both[1]
    with pytest.raises(InputError, match="evaluate needs validation rows: give the trainer val"):
        trainer_of("none", parts={"val": None}).evaluate()


def weighted(model: nn.Module, batch: Batch, *, gamma: float = 1) -> torch.Tensor:
    return gamma * focal(model, batch)


def halved(gamma: float) -> partial[torch.optim.lr_scheduler.LRScheduler]:
    return partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=gamma)


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        ({"loss": partial(weighted, gamma=1)}, {"loss": partial(weighted, gamma=5)}, "loss .*gamma 1.*gamma 5"),
        (
            {"optimizer": partial(torch.optim.SGD, lr=0.1)},
            {"optimizer": partial(torch.optim.SGD, lr=0.2)},
            "optimizer .*lr 0.1.*lr 0.2",
        ),
        ({"scheduler": halved(0.5)}, {"scheduler": halved(0.1)}, "scheduler .*gamma 0.5"),
    ],
)
def test_settings_of_ones_own_parts_are_those_of_the_run(trainer_of, then, now, named):
    trainer_of("run", steps=2, parts=then).train(display=None)
    with pytest.raises(InputError, match=f"another {named}"):
        trainer_of("run", steps=2, resume="auto", parts=now).train(display=None)


def test_a_run_with_a_scheduler_of_ones_own_gets_longer(trainer_of, tmp_path):
    parts = {"scheduler": halved(0.5), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    trainer_of("longer", steps=2, parts=parts).train(display=None)
    trainer_of("longer", steps=4, resume="auto", parts=parts).train(display=None)
    trainer_of("whole", steps=4, parts=parts).train(display=None)
    rates = [[r["lr"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if "lr" in r] for n in ("longer", "whole")]
    assert rates[0] == rates[1] == [0.1, 0.05, 0.025, 0.0125]


def test_how_a_step_is_computed_is_no_setting_of_the_run():
    adam = partial(torch.optim.AdamW, lr=0.1)
    assert described(adam) == described(partial(adam, fused=False)) != described(partial(adam, amsgrad=True))
    weights = [torch.zeros(2)]
    assert described(adam(weights)) == described(adam(weights, foreach=True)) != described(adam(weights, eps=1e-3))


@pytest.mark.parametrize("kind", [fourbit.DistillTrainer, fourbit.PolicyTrainer])
def test_a_loss_that_nothing_would_call_is_refused(trainer_of, kind):
    config, more = {
        fourbit.DistillTrainer: (fourbit.DistillConfig, {"teacher": None}),
        fourbit.PolicyTrainer: (fourbit.RLConfig, {"rewards": lambda prompt, answer, row: 0.0}),
    }[kind]
    with pytest.raises(InputError, match=f"{kind.__name__} has a loss of its own: leave out loss"):
        trainer_of("own", kind=kind, config=config, parts={"loss": focal, **more})
    assert trainer_of("own", kind=kind, config=config, parts=more).total == 4


class Failing(fourbit.Callback):
    def on_evaluate(self, run, metrics):
        return {"perplexity": 0.0}


def test_an_evaluation_that_fails_costs_no_step(trainer_of, tmp_path):
    how = dict(save_every=None, eval_every=3, schedule="constant")
    with pytest.raises(InputError, match="names of their own, got perplexity"):
        trainer_of("failed", parts={"callbacks": [Failing()]}, **how).train(display=None)
    assert (tmp_path / "failed" / "checkpoints" / "step-000003").is_dir()
    trainer_of("failed", resume="auto", **how).train(display=None)
    trainer_of("whole", **how).train(display=None)
    both = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("failed", "whole")]
    assert both[0] == both[1]


def test_metrics_of_a_loss_have_names_of_their_own_and_any_number(trainer_of, tmp_path):
    def named(*names: str) -> Any:
        return lambda model, batch: Sums((found := focal(model, batch)).sum(), dict.fromkeys(names, summed(found)))

    with pytest.raises(InputError, match="a loss's metrics must have names of their own, got loss, step"):
        trainer_of("taken", parts={"loss": named("step", "loss")}).train(display=None)
    trainer_of("many", parts={"loss": named(*(f"layer {i}" for i in range(5000)))}).train(display=None)
    assert len(read_metrics(tmp_path / "many" / "metrics.jsonl")[0]) > 5000
    nothing = lambda model, batch: Sums(focal(model, batch).sum() * 0, {}, weight=0)
    with pytest.raises(InputError, match="the loss counts nothing on the validation rows"):
        trainer_of("nothing", parts={"loss": nothing}).evaluate()
    assert trainer_of("something", parts={"loss": focal}).evaluate()["loss"] > 0
