"""One optimizer step: the loss is per trained token of the whole step, and a bad step changes nothing."""

import copy

import pytest
import torch
from torch import nn

from fourbit.errors import InputError
from fourbit.trainer.step import Stepper


class Rows:
    """What the stepper reads of a batch: the number of trained tokens; and here the rows themselves."""

    def __init__(self, rows):
        self.rows, self.trained = rows, len(rows)


def stepper_for(layer, **options):
    options = {"weight_decay": 0.1, "max_grad_norm": 0.0} | options
    return Stepper(dict(layer.named_parameters()), lambda b: layer(b.rows).pow(2).sum(), **options)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def test_equals_plain_adamw_on_the_mean(layer):
    theirs = copy.deepcopy(layer)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False, fused=False)
    stepper = stepper_for(layer)
    for _ in range(20):
        rows = torch.randn(7, 5, dtype=torch.float64)
        result = stepper.step([Rows(rows)], 1e-2)
        loss = theirs(rows).pow(2).sum() / 7
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, mine in layer.named_parameters():
        torch.testing.assert_close(mine, dict(theirs.named_parameters())[name], rtol=1e-10, atol=1e-12)


def test_a_factor_scales_the_learning_rate_and_zero_leaves_alone(layer):
    plain, scaled = copy.deepcopy(layer), copy.deepcopy(layer)
    rows = torch.randn(7, 5, dtype=torch.float64)
    stepper_for(plain).step([Rows(rows)], 2e-2)
    result = stepper_for(scaled, lr_scale={"weight": 2.0, "bias": 0}).step([Rows(rows)], 1e-2)
    assert torch.equal(scaled.weight, plain.weight)
    assert torch.equal(scaled.bias, layer.bias) and scaled.bias.grad is None
    layer(rows).pow(2).sum().div(7).backward()
    assert result.grad_norm.item() == pytest.approx(layer.weight.grad.norm().item(), rel=1e-6), "bias is not counted"


@pytest.mark.parametrize(
    "lr_scale, error", [({"wieght": 2.0}, "'wieght' matches no parameter"), ({"*": 0}, "leaves nothing to train")]
)
def test_patterns_that_cannot_be_meant_are_refused(layer, lr_scale, error):
    with pytest.raises(InputError, match=error):
        stepper_for(layer, lr_scale=lr_scale)


@pytest.mark.parametrize("sizes", [[4, 3], [1] * 7, [1, 6]])
def test_any_split_gives_the_same_step(layer, sizes):
    whole, split = copy.deepcopy(layer), copy.deepcopy(layer)
    rows = torch.randn(7, 5, dtype=torch.float64)
    a = stepper_for(whole, max_grad_norm=0.3).step([Rows(rows)], 1e-2)
    b = stepper_for(split, max_grad_norm=0.3).step([Rows(part) for part in rows.split(sizes)], 1e-2)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-13)
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-12)
    torch.testing.assert_close(whole.weight, split.weight, rtol=1e-10, atol=1e-12)


def test_clips_to_the_global_norm(layer):
    moved = copy.deepcopy(layer)
    gradients = {}
    hook = lambda name: lambda p: gradients.__setitem__(name, p.grad.clone())  # noqa: E731
    for name, p in moved.named_parameters():
        p.register_post_accumulate_grad_hook(hook(name))
    stepper = stepper_for(moved, max_grad_norm=0.5)
    seen = []
    stepper.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in moved.parameters()))
    result = stepper.step([Rows(torch.randn(7, 5, dtype=torch.float64))], 1e-2)
    unclipped = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert result.grad_norm.item() == pytest.approx(unclipped.item()) and unclipped > 0.5
    assert torch.stack([g.norm() for g in seen]).norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(layer, bad):
    stepper = stepper_for(layer, max_grad_norm=1.0)
    stepper.step([Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2)
    weights = {k: v.clone() for k, v in layer.state_dict().items()}
    state = {k: v.clone() for k, v in stepper.state().items()}
    rows = torch.randn(4, 5, dtype=torch.float64)
    rows[2, 1] = bad
    assert stepper.step([Rows(rows)], 1e-2).skipped.item() == 1
    assert all(torch.equal(v, weights[k]) for k, v in layer.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in stepper.state().items())
    assert stepper.step([Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2).skipped.item() == 0
    assert not torch.equal(layer.weight, weights["weight"])


def test_state_round_trip_is_exact(layer):
    twin = copy.deepcopy(layer)
    a, b = stepper_for(layer), stepper_for(twin)
    batches = [[Rows(torch.randn(4, 5, dtype=torch.float64))] for _ in range(6)]
    for batch in batches[:3]:
        a.step(batch, 1e-2)
    twin.load_state_dict(layer.state_dict())
    b.load_state({k: v.clone() for k, v in a.state().items()})
    for batch in batches[3:]:
        a.step(batch, 1e-2)
        b.step(batch, 1e-2)
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.bias, twin.bias)


def test_state_of_other_parameters_is_refused(layer):
    stepper = stepper_for(layer)
    with pytest.raises(InputError, match=r"'other.exp_avg' \(3, 5\)"):
        stepper.load_state({"other.exp_avg": torch.zeros(3, 5)})
    with pytest.raises(InputError, match=r"'weight.exp_avg' \(5, 3\)"):
        stepper.load_state({"weight.exp_avg": torch.zeros(5, 3)})
