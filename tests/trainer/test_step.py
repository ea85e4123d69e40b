"""One optimizer step: the loss is per trained token of the whole step, and a bad step changes nothing."""

import copy

import pytest
import torch
from torch import nn

from fourbit.errors import InputError
from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.step import Stepper, Sums


class Rows:
    """What the stepper reads of a batch: what its loss is a sum over; and here the rows themselves."""

    def __init__(self, rows):
        self.rows, self.weight = rows, len(rows)


def stepper_for(layer, **options):
    config = TrainingConfig(out="unused", **{"weight_decay": 0.1, "max_grad_norm": 0.0} | options)
    return Stepper(dict(layer.named_parameters()), lambda b: Sums(layer(b.rows).pow(2).sum(), {}), config)


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
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-6)  # it is fp32
    torch.testing.assert_close(whole.weight, split.weight, rtol=1e-10, atol=1e-12)


def test_clips_to_the_global_norm(layer):
    """As torch's clipping and AdamW do; two norms, since a first step of AdamW does not depend on one."""
    theirs = copy.deepcopy(layer)
    stepper = stepper_for(layer, max_grad_norm=1.0, weight_decay=0.0)
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, lr=1e-2)
    norms = []
    for size in (1.0, 4.0, 0.01):
        rows = size * torch.randn(7, 5, dtype=torch.float64)
        result = stepper.step([Rows(rows)], 1e-2)
        theirs(rows).pow(2).sum().div(7).backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        assert result.grad_norm.item() == pytest.approx(norms[-1], rel=1e-6)
    assert max(norms) > 1.0 > min(norms)
    for name, mine in layer.named_parameters():
        torch.testing.assert_close(mine, dict(theirs.named_parameters())[name], rtol=1e-9, atol=1e-11)


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


def test_state_of_other_parameters_is_refused(layer):
    stepper = stepper_for(layer)
    with pytest.raises(InputError, match=r"'other.exp_avg' \(3, 5\)"):
        stepper.load_state({"other.exp_avg": torch.zeros(3, 5)})
    with pytest.raises(InputError, match=r"does not fit this run: the saved state of parameter 0, \(3, 5\),"):
        stepper.load_state({"weight.exp_avg": torch.zeros(5, 3)})


KINDS = ["adamw", "adamw8bit", "lion", "lion8bit"]
OPTIMIZERS = KINDS + [f"paged-{kind}" for kind in KINDS]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_goes_on_where_it_stopped(name):
    """Also with another budget, and paged for unpaged: to the bit."""
    torch.manual_seed(0)
    wide = nn.Linear(300, 40)
    twins = [wide, copy.deepcopy(wide), copy.deepcopy(wide)]
    other = name.removeprefix("paged-") if name.startswith("paged-") else f"paged-{name}"
    names = [name, name, other]
    budget = lambda name: {"optimizer_budget": "80KiB"} if name.startswith("paged-") else {}
    first = stepper_for(wide, optimizer=name, max_grad_norm=1.0, **budget(name))
    batches = [[Rows(torch.randn(4, 300))] for _ in range(6)]
    losses = [first.step(batch, 1e-2).loss.item() for batch in batches[:3]]
    saved = {key: value.clone() for key, value in first.state().items()}
    assert losses[-1] < losses[0]
    losses = [first.step(batch, 1e-2).loss.item() for batch in batches[3:]]
    for twin, again in zip(twins[1:], names[1:], strict=True):
        torch.manual_seed(0)
        twin.load_state_dict(nn.Linear(300, 40).state_dict())
        stepper = stepper_for(twin, optimizer=name, max_grad_norm=1.0)
        for batch in batches[:3]:
            stepper.step(batch, 1e-2)
        stepper = stepper_for(twin, optimizer=again, max_grad_norm=1.0)
        stepper.load_state(saved)
        assert [stepper.step(batch, 1e-2).loss.item() for batch in batches[3:]] == losses
        assert torch.equal(twin.weight, wide.weight) and torch.equal(twin.bias, wide.bias)


def test_a_run_made_with_torchs_adamw_goes_on(layer):
    """What checkpoints held before: its own state, under the same names."""
    theirs = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    batches = [torch.randn(7, 5, dtype=torch.float64) for _ in range(6)]

    def step(rows):
        optimizer.zero_grad()
        theirs(rows).pow(2).sum().div(7).backward()
        optimizer.step()

    for rows in batches[:3]:
        step(rows)
    layer.load_state_dict(theirs.state_dict())
    stepper = stepper_for(layer, weight_decay=0.0)
    named = theirs.named_parameters()
    stepper.load_state({f"{n}.{slot}": v.clone() for n, p in named for slot, v in optimizer.state[p].items()})
    for rows in batches[3:]:
        step(rows)
        stepper.step([Rows(rows)], 1e-2)
    for name, mine in layer.named_parameters():
        torch.testing.assert_close(mine, dict(theirs.named_parameters())[name], rtol=1e-12, atol=1e-14)


def test_state_of_another_optimizer_is_refused(layer):
    stepper = stepper_for(layer)
    stepper.step([Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2)
    with pytest.raises(InputError, match=r"does not fit this run: .* 'exp_avg_sq', 'step'\], but lion keeps"):
        stepper_for(layer, optimizer="lion").load_state(stepper.state())


@pytest.mark.parametrize("name, per_value", [*zip(KINDS, [8, 2 + 8 / 256, 4, 1 + 4 / 256], strict=True)])
def test_the_memory_of_state_is_told(name, per_value):
    layer = nn.Linear(256, 40, bias=False)
    result = stepper_for(layer, optimizer=name).step([Rows(torch.randn(4, 256))], 1e-2)
    assert result.optimizer == {"optimizer_bytes": 256 * 40 * per_value + 4}


def test_paging_is_told_by_the_step():
    """A budget of half the state: what does not stay is copied in and out once a step."""
    layer = nn.Linear(4096, 64, bias=False)
    stepper = stepper_for(layer, optimizer="paged-adamw", optimizer_budget="1MiB")
    results = [stepper.step([Rows(torch.randn(2, 4096))], 1e-3).optimizer for _ in range(3)]
    state = 8 * 4096 * 64
    for figures in results:
        assert figures["optimizer_bytes"] <= (1 << 20) + 4
        assert figures["page_hits"] + figures["page_misses"] > 1
    later = results[-1]
    assert later["optimizer_host_bytes"] >= state - (1 << 20)
    assert later["page_bytes_in"] == later["page_bytes_out"] >= state - (1 << 20)
    assert later["page_misses"] == later["page_evictions"] > 0
    assert results[1] == results[2], "counted by the step, not from the start"
