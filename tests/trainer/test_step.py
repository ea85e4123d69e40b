"""One optimizer step: the loss is per trained token of the whole step, and a bad step changes nothing."""

import copy
import weakref

import pytest
import torch
from torch import nn

from fourbit.errors import InputError
from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.loop import Run
from fourbit.trainer.step import Sums, make_optimizer


class Rows:
    """What the run reads of a batch: what its loss is a sum over; and here the rows themselves."""

    def __init__(self, rows):
        self.rows, self.weight = rows, len(rows)


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def run_for(layer, **options):
    config = TrainingConfig(out="unused", **{"weight_decay": 0.1, "max_grad_norm": 0.0} | options)
    parameters = dict(layer.named_parameters())
    return Run(
        layer,
        loss=lambda model, b: Sums(model(b.rows).pow(2).sum()),
        optimizer=make_optimizer(parameters, config),
        parameters=parameters,
    )


def step(run, batches, rate):
    run.forward_backward(*batches)
    return run.optim_step(rate)


def tensors_of(run):
    return {key: value.clone() for key, value in run.state()[0]["optimizer"].items()}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def test_equals_plain_adamw_on_the_mean(layer):
    theirs = copy.deepcopy(layer)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False, fused=False)
    run = run_for(layer)
    for _ in range(20):
        rows = torch.randn(7, 5, dtype=torch.float64)
        result = step(run, [Rows(rows)], 1e-2)
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
    step(run_for(plain), [Rows(rows)], 2e-2)
    result = step(run_for(scaled, lr_scale={"weight": 2.0, "bias": 0}), [Rows(rows)], 1e-2)
    assert torch.equal(scaled.weight, plain.weight)
    assert torch.equal(scaled.bias, layer.bias) and scaled.bias.grad is None
    layer(rows).pow(2).sum().div(7).backward()
    assert result.grad_norm.item() == pytest.approx(layer.weight.grad.norm().item(), rel=1e-6), "bias is not counted"


@pytest.mark.parametrize(
    "lr_scale, error", [({"wieght": 2.0}, "'wieght' matches no parameter"), ({"*": 0}, "leaves nothing to train")]
)
def test_patterns_that_cannot_be_meant_are_refused(layer, lr_scale, error):
    with pytest.raises(InputError, match=error):
        run_for(layer, lr_scale=lr_scale)


@pytest.mark.parametrize("sizes", [[4, 3], [1] * 7, [1, 6]])
def test_any_split_gives_the_same_step(layer, sizes):
    whole, split = copy.deepcopy(layer), copy.deepcopy(layer)
    rows = torch.randn(7, 5, dtype=torch.float64)
    a = step(run_for(whole, max_grad_norm=0.3), [Rows(rows)], 1e-2)
    b = step(run_for(split, max_grad_norm=0.3), [Rows(part) for part in rows.split(sizes)], 1e-2)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-13)
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-6)  # it is fp32
    torch.testing.assert_close(whole.weight, split.weight, rtol=1e-10, atol=1e-12)


def test_the_rest_of_a_loss_is_asked_for_when_the_first_graph_is_gone(layer):
    """And counts as if it were one loss: its mean is over what the first part weighs."""
    whole, split, seen = copy.deepcopy(layer), copy.deepcopy(layer), []

    def parts(model, batch):
        kept = weakref.WeakSet()

        def keep(tensor):
            kept.add(held := Held(tensor))
            return held

        def rest():
            seen.append((len(kept), model.weight.grad is not None))
            return Sums(model(batch.rows).exp().sum(), {"far": torch.tensor([6.0, 2.0])}, weight=1000)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
            square = model(batch.rows).pow(2).sum()
        assert kept
        return Sums(square, {"near": torch.tensor([4.0, 1.0])}, rest=rest)

    one, two = run_for(whole), run_for(split)
    one.loss = lambda model, b: Sums(model(b.rows).pow(2).sum() + model(b.rows).exp().sum())
    two.loss = parts
    batches = [Rows(torch.randn(n, 5, dtype=torch.float64)) for n in (4, 3)]
    a, b = step(one, batches, 1e-2), step(two, batches, 1e-2)
    assert seen == [(0, True)] * 2
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-13)
    assert b.read_metrics() == {"near": 4.0, "far": 3.0}
    torch.testing.assert_close(whole.weight, split.weight, rtol=1e-10, atol=1e-12)


def test_clips_to_the_global_norm(layer):
    """As torch's clipping and AdamW do; two norms, since a first step of AdamW does not depend on one."""
    theirs = copy.deepcopy(layer)
    run = run_for(layer, max_grad_norm=1.0, weight_decay=0.0)
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, lr=1e-2)
    norms = []
    for size in (1.0, 4.0, 0.01):
        rows = size * torch.randn(7, 5, dtype=torch.float64)
        result = step(run, [Rows(rows)], 1e-2)
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
    run = run_for(layer, max_grad_norm=1.0)
    step(run, [Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2)
    weights = {k: v.clone() for k, v in layer.state_dict().items()}
    state = tensors_of(run)
    rows = torch.randn(4, 5, dtype=torch.float64)
    rows[2, 1] = bad
    assert step(run, [Rows(rows)], 1e-2).skipped.item() == 1
    assert all(torch.equal(v, weights[k]) for k, v in layer.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in tensors_of(run).items())
    assert step(run, [Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2).skipped.item() == 0
    assert not torch.equal(layer.weight, weights["weight"])


def test_state_of_other_parameters_is_refused(layer):
    """Nothing is changed then."""
    run, other = run_for(layer), run_for(nn.Linear(5, 4).double())
    step(other, [Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2)
    tensors, plain = other.state()
    with pytest.raises(InputError, match=r"another model. 2 of another shape: bias must be \[3\], got \[4\]; weight"):
        run.restore(tensors, plain)
    with pytest.raises(InputError, match=r"does not fit this run: the saved state of parameter 0, \(3, 5\),"):
        run._load_optimizer(tensors["optimizer"], plain)
    with pytest.raises(InputError, match=r"of AdamW on groups of .1. parameters, and this AdamW on .1, 1. has others"):
        run._load_optimizer(tensors["optimizer"], plain | {"names": [["weight"]]})
    assert not run.state()[0]["optimizer"] and run.steps == 0


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
    first = run_for(wide, optimizer=name, max_grad_norm=1.0, **budget(name))
    batches = [[Rows(torch.randn(4, 300))] for _ in range(6)]
    losses = [step(first, batch, 1e-2).loss.item() for batch in batches[:3]]
    saved, plain = tensors_of(first), first.state()[1]
    assert losses[-1] < losses[0]
    losses = [step(first, batch, 1e-2).loss.item() for batch in batches[3:]]
    for twin, again in zip(twins[1:], names[1:], strict=True):
        torch.manual_seed(0)
        twin.load_state_dict(nn.Linear(300, 40).state_dict())
        run = run_for(twin, optimizer=name, max_grad_norm=1.0)
        for batch in batches[:3]:
            step(run, batch, 1e-2)
        run = run_for(twin, optimizer=again, max_grad_norm=1.0)
        run._load_optimizer(saved, plain)
        assert [step(run, batch, 1e-2).loss.item() for batch in batches[3:]] == losses
        assert torch.equal(twin.weight, wide.weight) and torch.equal(twin.bias, wide.bias)


def test_state_of_another_optimizer_is_refused(layer):
    run = run_for(layer)
    step(run, [Rows(torch.randn(4, 5, dtype=torch.float64))], 1e-2)
    with pytest.raises(InputError, match=r"the saved state is of AdamW on groups of .1, 1. parameters, and this Lion"):
        run_for(layer, optimizer="lion")._load_optimizer(tensors_of(run), run.state()[1])


@pytest.mark.parametrize("name, per_value", [*zip(KINDS, [8, 2 + 8 / 256, 4, 1 + 4 / 256], strict=True)])
def test_the_memory_of_state_is_told(name, per_value):
    layer = nn.Linear(256, 40, bias=False)
    result = step(run_for(layer, optimizer=name), [Rows(torch.randn(4, 256))], 1e-2)
    assert result.optimizer == {"optimizer_bytes": 256 * 40 * per_value + 4}


def test_paging_is_told_by_the_step():
    """A budget of half the state: what does not stay is copied in and out once a step."""
    layer = nn.Linear(4096, 64, bias=False)
    run = run_for(layer, optimizer="paged-adamw", optimizer_budget="1MiB")
    results = [step(run, [Rows(torch.randn(2, 4096))], 1e-3).optimizer for _ in range(3)]
    state = 8 * 4096 * 64
    for figures in results:
        assert figures["optimizer_bytes"] <= (1 << 20) + 4
        assert figures["page_hits"] + figures["page_misses"] > 1
    later = results[-1]
    assert later["optimizer_host_bytes"] >= state - (1 << 20)
    assert later["page_bytes_in"] == later["page_bytes_out"] >= state - (1 << 20)
    assert later["page_misses"] == later["page_evictions"] > 0
    assert results[1] == results[2], "counted by the step, not from the start"
