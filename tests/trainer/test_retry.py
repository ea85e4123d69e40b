"""A micro-batch that runs out of memory is run again, and nothing shows that it was."""

import copy
import weakref

import pytest
import torch
from torch import nn

from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.loop import Run
from fourbit.trainer.step import Sums, backward_or_retry, make_optimizer

OOM = torch.OutOfMemoryError


class Fault(torch.autograd.Function):
    """The identity, which runs `when` in its forward or backward."""

    @staticmethod
    def forward(ctx, x, where, when):
        ctx.where, ctx.when = where, when
        if where == "forward":
            when()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.where == "backward":
            ctx.when()
        return gradient, None, None


class Net(nn.Module):
    """Dropout on both sides of the fault, a weight used twice, and one that some inputs leave without a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.rare, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.where, self.when = None, lambda: None

    def forward(self, x):
        x = nn.functional.dropout(self.second(self.first(x)).tanh(), 0.3)
        x = Fault.apply(x, self.where, self.when)
        x = x + self.rare(x) if x.shape[0] % 2 else x
        return nn.functional.dropout(self.second(self.last(x)), 0.3).pow(2).sum()


class Faults:
    """Raises at the calls that are numbered, counted from 0; and counts how often room was made."""

    def __init__(self, *numbers, error=OOM):
        self.numbers, self.calls, self.error, self.rooms = numbers, 0, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls - 1 in self.numbers:
            torch.rand(7)  # the failed attempt may have drawn more
            raise self.error("injected")

    def make_room(self):
        self.rooms += 1


@pytest.fixture
def nets():
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net)


def batches_of(sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


def backward(loss):
    loss.backward()
    return Sums(loss.detach(), {})


def plainly(net, batches):
    losses = []
    for batch in batches:
        losses.append(net(batch))
        losses[-1].backward()
    return [loss.detach() for loss in losses]


def gradients(net):
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_same(ours, theirs):
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("sizes", [[3], [4], [4, 3, 2], [3, 4, 4]])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("failing", [(), (0,), (1,), (2,), (0, 2), (0, 2, 4)])
def test_bit_identical(nets, sizes, where, failing):
    """Whichever attempts fail, in forward or with half of the gradients there, one after the other or not."""
    ours, theirs = nets
    torch.manual_seed(5)
    wanted = plainly(theirs, batches_of(sizes))
    faults = Faults(*failing)
    ours.where, ours.when = where, faults
    torch.manual_seed(5)
    got = [
        backward_or_retry(list(ours.parameters()), lambda b=b: backward(ours(b)), faults.make_room)
        for b in batches_of(sizes)
    ]
    assert all(torch.equal(a, b) for a, b in zip((sums.loss for sums in got), wanted, strict=True))
    assert_same(gradients(ours), gradients(theirs))
    after = torch.rand(3)
    torch.manual_seed(5)
    plainly(theirs, batches_of(sizes))
    assert torch.equal(after, torch.rand(3))
    assert faults.rooms == sum(number < faults.calls for number in failing)


def test_half_a_backward_does_leave_gradients(nets):
    """So the test above would see them, were they added."""
    net, _ = nets
    net.where, net.when = "backward", Faults(0)
    with pytest.raises(OOM):
        net(batches_of([3])[0]).backward()
    assert net.last.weight.grad is not None and net.first.weight.grad is None


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("numbers", "error"), [((1, 2), OOM), ((1,), ValueError), ((1,), KeyboardInterrupt)])
def test_what_is_raised_leaves_the_gradients_of_before(nets, where, numbers, error):
    """A second failure of one micro-batch, or another error, is the caller's; earlier micro-batches still count."""
    net, _ = nets
    faults = Faults(*numbers, error=error)
    net.where, net.when = where, faults
    first, second = batches_of([3, 3])
    backward_or_retry(list(net.parameters()), lambda: backward(net(first)), faults.make_room)
    before, kept = gradients(net), [p.grad for p in net.parameters()]
    with pytest.raises(error, match="injected"):
        backward_or_retry(list(net.parameters()), lambda: backward(net(second)), faults.make_room)
    assert_same(gradients(net), before)
    assert all(p.grad is g for p, g in zip(net.parameters(), kept, strict=True))
    assert faults.rooms == (error is OOM)


def test_room_is_made_when_the_failed_attempt_is_gone(nets):
    """Its activations would still take the memory that the retry is to have."""
    net, _ = nets
    alive = []

    def forward():
        x = torch.randn(3, 6)
        hidden = net.first(x)
        alive.append(weakref.ref(hidden))
        return net(hidden)

    faults = Faults(0)
    net.where, net.when = "backward", faults
    backward_or_retry(list(net.parameters()), lambda: backward(forward()), lambda: alive.append(alive[0]()))
    assert alive[1] is None and faults.calls == 2


def test_one_micro_batch_is_not_copied(nets):
    """Its gradients are the tensors that autograd made."""
    net, _ = nets
    made = {}
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: made.__setitem__(name, p.grad))
    backward_or_retry(list(net.parameters()), lambda: backward(net(batches_of([3])[0])), lambda: None)
    assert made and all(p.grad is made[name] for name, p in net.named_parameters())


class Rows:
    """What the run reads of a batch: what its loss is a sum over; and here the rows themselves."""

    def __init__(self, rows):
        self.rows, self.weight = rows, len(rows)


def run_for(net, **options):
    config = TrainingConfig(out="unused", weight_decay=0.1, **options)
    parameters = dict(net.named_parameters())
    return Run(
        net,
        loss=lambda model, b: Sums(model(b.rows)),
        optimizer=make_optimizer(parameters, config),
        parameters=parameters,
    )


def step(run, batches, rate):
    run.forward_backward(*batches)
    return run.optim_step(rate)


@pytest.mark.parametrize("budget", ["auto", "32KiB"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_ran_out_of_memory_ends_with_the_same_bits(nets, where, budget):
    """Weights and optimizer state after three steps, pages taken off the device twice on the way."""
    ours, theirs = nets
    results = {}
    for name, net, failing in (("ours", ours, (4, 9)), ("theirs", theirs, ())):
        run = run_for(net, optimizer="paged-adamw", optimizer_budget=budget)
        faults = Faults(*failing)
        net.where, net.when = where, faults
        torch.manual_seed(5)
        steps = [step(run, [Rows(b) for b in batches_of([3, 4, 2])], 1e-2) for _ in range(3)]
        results[name] = [result.loss for result in steps], run.state()[0]["optimizer"], dict(net.named_parameters())
        assert [result.optimizer["page_retries"] for result in steps] == ([0, 1, 1] if failing else [0, 0, 0])
        counters = run.optimizer.pager.counters
        assert run.retries == len(failing) and (counters.evictions > 0) == bool(failing)
    for a, b in zip(results["ours"][0], results["theirs"][0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results["ours"][1:], results["theirs"][1:], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_without_pages_memory_that_runs_out_is_an_error(nets):
    net, _ = nets
    net.where, net.when = "forward", Faults(0)
    with pytest.raises(OOM, match="injected"):
        step(run_for(net), [Rows(batches_of([3])[0])], 1e-2)
    assert net.when.calls == 1
