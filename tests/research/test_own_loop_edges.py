"""What a run must not do in silence: take up another state, count what does not count, lose a module's own state."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, MultiStepLR, SequentialLR, StepLR

from fourbit.errors import InputError
from fourbit.models.protocol import evaluating
from fourbit.optim import AdamW
from fourbit.trainer.callbacks import Callback, told
from fourbit.trainer.loop import Run, ready
from fourbit.trainer.step import set_rng_states

ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def run_of(*, model=None, groups=None, optimizer=sgd, scheduler=None):
    model = model or nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    if groups is not None:
        every, made = [*model.parameters()], []
        for size in groups:
            made.append({"params": every[:size], "lr": 0.1 * len(made)})
            every = every[size:]
        optimizer = torch.optim.SGD(made)
    return Run(model, loss=lambda m, rows: m(rows).pow(2).sum(1), optimizer=optimizer, scheduler=scheduler)


def decayed(optimizer):
    return ExponentialLR(optimizer, 0.5)


def stepped(optimizer):
    return StepLR(optimizer, 1)


@pytest.mark.parametrize(
    "then, now, said",
    [
        ({"scheduler": decayed}, {}, "SGD and ExponentialLR on groups of .4. parameters, and this SGD on .4."),
        ({"scheduler": decayed}, {"scheduler": stepped}, "ExponentialLR on groups .* SGD and StepLR"),
        ({}, {"scheduler": stepped}, "SGD on groups of .4. parameters, and this SGD and StepLR"),
        ({"groups": (2, 2)}, {"groups": (1, 3)}, r"\[2, 2\] parameters, and this SGD on \[1, 3\]"),
        ({"groups": (2, 2)}, {}, r"\[2, 2\] parameters, and this SGD on \[4\]"),
        ({}, {"optimizer": torch.optim.Adam}, "state is of SGD on .* and this Adam"),
    ],
)
def test_a_state_goes_to_its_own_optimizer_groups_and_scheduler(tmp_path, then, now, said):
    """Else a schedule would be lost, or rates go to other parameters, in silence. What is refused changes nothing."""
    run, other = run_of(**then), run_of(**now)
    run.forward_backward(ROWS)
    run.optim_step()
    saved, before = run.save_state(tmp_path), {n: t.clone() for n, t in other.weights().items()}
    with pytest.raises(InputError, match=said):
        other.load_state(saved)
    assert other.steps == 0 and all(torch.equal(t, before[n]) for n, t in other.weights().items())


def test_every_lasting_buffer_is_saved_and_no_other(tmp_path):
    """Spectral norm's vectors go on; a mask with infinities that no state_dict has is no part of the state."""

    def model(seed):
        torch.manual_seed(seed)
        made = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
        made.register_buffer("mask", torch.full((3,), -torch.inf), persistent=False)
        return made

    run, again = run_of(model=model(1)), run_of(model=model(2))
    run.forward_backward(ROWS)
    run.optim_step()
    again.load_state(run.save_state(tmp_path))
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_state_that_belongs_to_no_parameter_is_kept(tmp_path):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state["calls"] = self.state.get("calls", 0) + 1

    run, again = (run_of(optimizer=lambda parameters: Counting(parameters, lr=0.1)) for _ in range(2))
    run.forward_backward(ROWS)
    run.optim_step()
    again.load_state(run.save_state(tmp_path))
    assert again.optimizer.state["calls"] == 1


def test_a_frozen_norm_stays_frozen():
    """`evaluating` gives each module its own mode back, not the model's to all."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model.training and model[0].training and not model[1].training


def test_batches_and_losses_that_cannot_be_meant():
    ids = torch.ones(2, 3, dtype=torch.long)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "labels": ids[:1]}, {"input_ids": ids[0], "labels": ids[0]}):
        with pytest.raises(InputError, match=r"input_ids and labels, \[B, T\] each"):
            ready(batch)
    with pytest.raises(InputError, match="must have something to learn from"):
        ready({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    with pytest.raises(InputError, match=r"\(\[N\]\), or Sums with a weight, got the shape \[5, 3\]"):
        run_of().forward_backward(ROWS, loss=lambda model, rows: model(rows).pow(2))
    with pytest.raises(InputError, match="needs a causal language model, got Linear: give a loss"):
        Run(nn.Linear(2, 2)).forward_backward({"input_ids": ids, "labels": ids})
    with pytest.raises(InputError, match="give a function of it, or a class"):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Run(model, optimizer=optimizer, scheduler=StepLR(optimizer, 1))


def test_only_damaged_states_say_what_is_wrong_with_them(tmp_path):
    saved = run_of().save_state(tmp_path)
    (saved / "weights.safetensors").write_bytes((saved / "weights.safetensors").read_bytes()[:-3])
    with pytest.raises(InputError, match="torn or changed"):
        run_of().load_state(tmp_path)


def test_two_callbacks_may_not_give_one_metric():
    class Same(Callback):
        def on_step(self, run, record):
            return {"bits": 1.0}

    with pytest.raises(InputError, match="names of their own, got bits"):
        told([Same(), Same()], "on_step", run_of(), {"loss": 1.0})


def test_a_state_that_is_taken_up_leaves_the_step_that_was_begun(tmp_path):
    run = run_of()
    saved = run.save_state(tmp_path)
    run.forward_backward(ROWS)
    run.load_state(saved)
    run.forward_backward(ROWS)
    other = run_of(model=run.model)
    norm = run.optim_step().grad_norm
    other.load_state(saved)
    other.forward_backward(ROWS)
    assert other.optim_step().grad_norm == norm


def test_milestones_are_there_after_a_resume(tmp_path):
    """torch counts them in a `Counter`, which a plain dict does not stand for."""

    def scheduler(optimizer):
        several = [ExponentialLR(optimizer, 0.9), MultiStepLR(optimizer, [1, 1, 2], 0.5)]
        return SequentialLR(optimizer, several, milestones=[2])

    def steps(run, count):
        for _ in range(count):
            run.forward_backward(ROWS)
            run.optim_step()
        return [group["lr"] for group in run.optimizer.param_groups]

    run, other = (run_of(scheduler=scheduler) for _ in range(2))
    steps(run, 1)
    other.load_state(run.save_state(tmp_path))
    assert steps(run, 4) == steps(other, 4)


def test_parameters_of_one_storage_are_saved(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
            self.a, self.b = nn.Parameter(both[0]), nn.Parameter(both[1])

        def forward(self, x):
            return x @ self.a @ self.b

    run, other = run_of(model=Shared()), run_of(model=Shared())
    run.forward_backward(ROWS)
    run.optim_step()
    other.load_state(run.save_state(tmp_path))
    assert torch.equal(other.model.b, run.model.b) and not torch.equal(run.model.b, Shared().b)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_rates_and_norms_that_train_uphill_are_refused(bad):
    """Before anything is changed: the step can be made with another one."""
    with pytest.raises(InputError, match=f"max_grad_norm must be 0, which never clips, or more, got {bad}"):
        Run(nn.Linear(4, 3), loss=lambda m, rows: m(rows).sum(1), max_grad_norm=bad)
    run = run_of()
    run.forward_backward(ROWS)
    for lr in (bad, math.inf):
        with pytest.raises(InputError, match=f"lr must be 0 or more and finite, got {lr}"):
            run.optim_step(lr)
    assert run.optim_step(0.1).skipped == 0 and run.steps == 1


def test_an_optimizer_whose_parameters_get_no_gradient_steps():
    """As torch's does: the norm of nothing is 0, and nothing moves."""
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    for kind in (AdamW, torch.optim.AdamW):
        run = Run(model, loss=lambda m, rows: m[0](rows).sum(1), optimizer=kind(model[1].parameters()))
        run.forward_backward(ROWS)
        result = run.optim_step()
        assert (result.grad_norm, result.skipped) == (0, 0) and run.steps == 1


def test_generators_of_a_gpu_are_left_out_on_a_cpu():
    """A checkpoint of a GPU's run goes on where there is none."""
    set_rng_states({"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"))


def test_the_advice_of_a_run_works(tmp_path):
    """Of each refusal: what it says to do is done, and trains."""
    model = nn.Linear(4, 3).requires_grad_(False)
    with pytest.raises(InputError, match=r"or call model.requires_grad_\(\)"):
        run_of(model=model)
    model.requires_grad_()
    with pytest.raises(InputError, match=r"make it after the adapter is attached, .* or give a function of their list"):
        run_of(model=model, optimizer=sgd(nn.Linear(4, 3).parameters()))
    with pytest.raises(InputError, match="give a function of it, or a class"):
        run_of(model=model, scheduler=stepped(sgd(model.parameters())))
    run = run_of(model=model, scheduler=stepped)
    with pytest.raises(InputError, match="call forward_backward before optim_step"):
        run.optim_step()
    with pytest.raises(InputError, match="give a loss"):
        Run(model).forward_backward({"input_ids": torch.ones(2, 3)})
    run.forward_backward(ROWS)
    run.optim_step()
    saved = run.save_state(tmp_path)
    with pytest.raises(InputError, match="make both as for the run that saved the state"):
        run_of(model=model).load_state(saved)
    run_of(model=model, scheduler=stepped).load_state(saved)
