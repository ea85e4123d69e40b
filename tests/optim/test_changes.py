"""What users do to parameters, groups and state between steps: followed as in torch.optim, or refused."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fourbit.errors import InputError
from fourbit.kernels.dispatch import force_path
from fourbit.optim import AdamW, AdamW8bit, Lion, Lion8bit, bank, states

PATHS = ["cpu", "reference", "triton"]
BUDGETS = [None, 40_000]


def stepped(tools: SimpleNamespace, optimizer: Any, *lists: Any, seed: int = 0) -> None:
    tools.give_gradients(*lists, seed=seed)
    optimizer.step()


def snapshot(optimizer: Any, ps: list[nn.Parameter]) -> list[torch.Tensor]:
    entries = optimizer.state_dict()["state"].values()
    return [t.clone() for t in [*(p.detach() for p in ps), *(t for entry in entries for t in entry.values())]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["dtype", "smaller", "larger", "reshaped", "gradient"])
def test_parameters_that_changed_are_refused(tools: SimpleNamespace, path: str, how: str) -> None:
    """Kernels go by address: after model.bfloat16() one would write twice as much as there is."""
    ps = tools.parameters([(9,), (20000,)])
    optimizer = AdamW(ps)
    with force_path(path):
        stepped(tools, optimizer, ps)
        kept = snapshot(optimizer, ps[:1])
        tools.give_gradients(ps, seed=1)
        changed = {
            "dtype": lambda t: t.bfloat16(),
            "smaller": lambda t: t[:10000].clone(),
            "larger": lambda t: torch.cat([t, t]),
            "reshaped": lambda t: t.view(200, 100),
            "gradient": lambda t: t,
        }[how](ps[1].detach())
        around = torch.full((60000,), 7.0, dtype=changed.dtype)
        inner = around[20000 : 20000 + changed.numel()].view(changed.shape)
        ps[1].grad = None
        ps[1].data = inner.copy_(changed)
        ps[1].grad = torch.ones_like(ps[1])
        if how == "gradient":
            ps[1].grad.data = torch.ones(4)
        words = (
            "gradients must be dense" if how == "gradient" else r"parameter 1 was torch.float32 \[20000\] on cpu when"
        )
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert torch.equal(inner, changed)
    assert (around == 7).sum() >= 60000 - changed.numel()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer, ps[:1]), kept, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("path", PATHS)
def test_another_dtype_is_taken_over_as_the_message_says(tools: SimpleNamespace, path: str, budget: int | None) -> None:
    ps, twins = tools.parameters([(9,), (3, 5000)]), tools.parameters([(9,), (3, 5000)])
    optimizer, straight = AdamW(ps, lr=0.1, budget=budget), AdamW(twins, lr=0.1)
    with force_path(path):
        for some, its in ((optimizer, ps), (straight, twins)):
            stepped(tools, some, its)
            for p in its:
                p.grad = None
                p.data = p.data.bfloat16()
        optimizer.load_state_dict(optimizer.state_dict())
        fresh = AdamW(twins, lr=0.1)
        fresh.load_state_dict(straight.state_dict())
        tools.give_gradients(ps, twins, seed=1)
        optimizer.step()
        fresh.step()
    assert all(torch.equal(p, q) and p.dtype == torch.bfloat16 for p, q in zip(ps, twins, strict=True))
    assert optimizer.state[ps[0]]["step"] == 2


def groups_of(ps: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": lr} for p, lr in zip(ps, (1e-3, 1e-2, 1.0), strict=True)]


CHANGES = {
    "reversed": lambda o, ps: o.param_groups.reverse(),
    "group taken out": lambda o, ps: o.param_groups.pop(0),
    "parameter taken out": lambda o, ps: o.param_groups[1].update(params=[]),
    "parameter moved": lambda o, ps: o.param_groups[0]["params"].append(o.param_groups[2]["params"].pop()),
    "group replaced": lambda o, ps: o.param_groups.__setitem__(1, {**o.param_groups[1], "lr": 0.5}),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", CHANGES)
def test_param_groups_may_be_changed_as_in_torch(
    tools: SimpleNamespace, path: str, what: str, budget: int | None
) -> None:
    shapes = [(5, 3), (9000,), (70,)]
    ours, theirs = tools.parameters(shapes), tools.parameters(shapes)
    optimizer, oracle = AdamW(groups_of(ours), budget=budget), torch.optim.AdamW(groups_of(theirs), foreach=False)
    with force_path(path):
        for i in range(4):
            tools.give_gradients(ours, theirs, seed=i, missing=[0] if i == 0 else [])
            optimizer.step()
            oracle.step()
            if i == 1:
                for o, ps in ((optimizer, ours), (oracle, theirs)):
                    CHANGES[what](o, ps)
                before = [pager.counters.misses for pager in optimizer.pagers.values()]
    for p, q in zip(ours, theirs, strict=True):
        assert tools.distance([p], [q]) <= 2**-20  # four steps of 1 at most, each with some four roundings in fp32
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p, q in zip(ours, theirs, strict=True):
        assert (p in optimizer.state) == (id(p) in kept)
        if id(p) in kept:
            assert optimizer.state[p]["step"] == oracle.state[q]["step"]
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {n for group in saved["param_groups"] for n in group["params"]}
    assert [pager.counters.misses for pager in optimizer.pagers.values()] >= before  # they count on


def test_stochastic_rounding_goes_by_the_numbers_that_are_saved(tools: SimpleNamespace) -> None:
    """So a run whose groups were changed still resumes to the bit."""
    ps = tools.parameters([(40,), (5000,)], torch.bfloat16)
    optimizer = Lion([{"params": [p]} for p in ps], lr=2**-6, stochastic_rounding=True)
    stepped(tools, optimizer, ps)
    optimizer.param_groups.reverse()
    twins = [nn.Parameter(p.detach().clone()) for p in ps]
    resumed = Lion([{"params": [p]} for p in reversed(twins)], stochastic_rounding=True)
    resumed.load_state_dict(optimizer.state_dict())
    tools.give_gradients(ps, twins, seed=1)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, twins, strict=True))


CLEARINGS = {
    "all": lambda o, p: o.state.clear(),
    "one": lambda o, p: o.state.pop(p),
    "emptied": lambda o, p: o.state[p].clear(),
    "empty in its place": lambda o, p: o.state.__setitem__(p, {}),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("how", CLEARINGS)
@pytest.mark.parametrize("path", PATHS)
def test_state_that_is_cleared_starts_anew_as_in_torch(
    tools: SimpleNamespace, path: str, how: str, budget: int | None
) -> None:
    ours, theirs = tools.parameters([(9000,), (70,)]), tools.parameters([(9000,), (70,)])
    optimizer, oracle = AdamW(ours, lr=0.1, budget=budget), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    with force_path(path):
        for i in range(3):
            tools.give_gradients(ours, theirs, seed=i)
            optimizer.step()
            oracle.step()
            if i == 1:
                CLEARINGS[how](optimizer, ours[0])
                CLEARINGS[how](oracle, theirs[0])
                assert 0 not in optimizer.state_dict()["state"]
    assert tools.distance(ours, theirs) <= 1e-7
    assert [float(optimizer.state[p]["step"]) for p in ours] == [1.0, 1.0 if how == "all" else 3.0]


def test_state_dict_writes_what_the_step_uses(tools: SimpleNamespace) -> None:
    """A tensor put into optimizer.state is not taken; one that is changed in place is."""
    ps = tools.parameters([(70,)])
    optimizer = AdamW(ps)
    stepped(tools, optimizer, ps)
    kept = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    optimizer.state[ps[0]]["exp_avg"] = torch.zeros(70)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], kept)
    optimizer.state[ps[0]]["exp_avg_sq"].fill_(4.0)
    assert (optimizer.state_dict()["state"][0]["exp_avg_sq"] == 4).all()
    before = ps[0].detach().clone()
    optimizer.param_groups[0].update(lr=1.0, weight_decay=0.0, eps=0.0)
    optimizer.step()  # root of the second moment: 2 * 0.999 and more, over the root of 1 - 0.999^2
    assert (ps[0] - before).abs().max() < 0.25


def test_reading_state_of_a_stranger_costs_nothing(tools: SimpleNamespace) -> None:
    """torch.optim's state is a defaultdict: a look makes an entry."""
    ps = tools.parameters([(70,), (3,)])
    optimizer = AdamW(ps)
    tools.give_gradients(ps, seed=0, missing=[1])
    optimizer.step()
    assert optimizer.state[ps[1]] == {}
    tools.give_gradients(ps, seed=1)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in ps] == [2.0, 1.0]


def test_memory_that_runs_out_while_parameters_join_changes_nothing(
    tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps = tools.parameters([(300,), (5000,), (70,)])
    optimizer = AdamW(ps)
    tools.give_gradients(ps, seed=0, missing=[1, 2])
    optimizer.step()

    def fails(self: Any, total: int) -> None:
        raise torch.OutOfMemoryError("injected")

    tools.give_gradients(ps, seed=1)
    before = snapshot(optimizer, ps)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(states.Resident, "grow", fails)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer, ps), before, strict=True))
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in ps] == [2.0, 1.0, 1.0]
    assert [p.numel() for p in ps] == [m.parameter.numel() for pool in optimizer._pools.values() for m in pool.members]


def test_a_step_holds_no_gradient_afterwards(tools: SimpleNamespace) -> None:
    ps = tools.parameters([(300,)])
    optimizer = AdamW(ps)
    stepped(tools, optimizer, ps)
    (member,) = (m for pool in optimizer._pools.values() for m in pool.members)
    assert member.gradient is None
    with pytest.raises(ValueError, match="dense"):
        ps[0].grad.data = torch.ones(4)
        optimizer.step()
    assert member.gradient is None


def test_no_views_are_made_to_read_addresses(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost most of a step over hundreds of small tensors."""
    pytest.importorskip("triton")
    ps = tools.parameters([(300,), (16, 40), (0,), ()])
    optimizer = AdamW8bit(ps, min_8bit_size=0, max_grad_norm=1.0)
    with force_path("triton"):
        stepped(tools, optimizer, ps)
        monkeypatch.setattr(bank.Member, "flat", None)
        stepped(tools, optimizer, ps, seed=1)
    assert optimizer.state[ps[1]]["step"] == 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [Lion, Lion8bit, AdamW, AdamW8bit])
def test_nan_shows_on_every_path(path: str, make: Any) -> None:
    """The sign of NaN is 0: Lion would rest where it is, with 8 bits a whole block for good."""
    for size in (300, 8192, 70_000):
        p = nn.Parameter(torch.ones(size))
        optimizer = make([p], lr=0.125, weight_decay=0.0, min_8bit_size=0)
        with force_path(path):
            p.grad = torch.ones(size)
            p.grad[7] = torch.nan
            optimizer.step()
            assert p.isnan().nonzero().flatten().tolist() == [7]
            p.grad = torch.ones(size)
            optimizer.step()
        assert p.isnan().nonzero().flatten().tolist() == (list(range(256)) if "8bit" in make.__name__ else [7])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("path", PATHS)
def test_infinity_has_a_sign(path: str) -> None:
    p = nn.Parameter(torch.ones(300))
    optimizer = Lion([p], lr=0.125, weight_decay=0.0)
    p.grad = torch.zeros(300)
    p.grad[3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    with force_path(path):
        optimizer.step()
    torch.testing.assert_close(
        p[2:6].detach(), torch.tensor([1, 0.875, 1.125, torch.nan]), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    "lr", [float("nan"), -1.0, torch.tensor(-1.0), torch.tensor(float("nan")), torch.tensor([0.1, 0.1])]
)
def test_learning_rates_that_cannot_be(tools: SimpleNamespace, lr: Any) -> None:
    with pytest.raises(ValueError, match="lr must be >= 0"):
        AdamW(tools.parameters([(3,)]), lr=lr)


def test_loading_checks_groups_too(tools: SimpleNamespace) -> None:
    ps = tools.parameters([(3,)])
    optimizer = AdamW(ps)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match="betas must be two numbers"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="has no betas, so it is neither AdamW nor Lion"):
        optimizer.load_state_dict(torch.optim.SGD(ps, weight_decay=0.1).state_dict())
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999) and "momentum" not in optimizer.param_groups[0]


def test_a_budget_below_a_page_is_refused_before_anything_is_changed(tools: SimpleNamespace) -> None:
    ps = tools.parameters([(300,), (9000,)])
    with pytest.raises(InputError, match="budget of 4000 bytes is less than one page of state; the least is 32768"):
        AdamW(ps, budget=4000)
    ps[1].requires_grad_(False)  # not known to be trained, so not counted before it is
    optimizer = AdamW(ps, budget=4096)
    tools.give_gradients(ps, seed=0, missing=[1])
    optimizer.step()
    ps[1].requires_grad_(True)
    for _ in range(2):
        tools.give_gradients(ps, seed=1)
        before = snapshot(optimizer, ps)
        with pytest.raises(InputError, match="the least is 32768"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer, ps), before, strict=True))
    with pytest.raises(InputError, match="the least is 32768"):
        optimizer.add_param_group({"params": tools.parameters([(9000,)])})
    assert len(optimizer.param_groups) == 1
    tools.give_gradients(ps, seed=2, missing=[1])
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == 2 and ps[1] not in optimizer.state


def test_paged_state_of_one_parameter_is_saved_alone(tools: SimpleNamespace) -> None:
    ps = tools.parameters([(300,)] * 50)
    optimizer = AdamW(ps, budget="auto")
    stepped(tools, optimizer, ps)
    file = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0], file)
    assert file.tell() < 2 * 512 * 4 + 4096
