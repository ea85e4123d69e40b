"""What users do to parameters, groups and state between steps: followed as in torch.optim, or refused."""

import io
from typing import Any

import pytest
import torch
from optim_tools import PATHS, AdamW8bit, Lion8bit, assert_equal, give_gradients, parameters, snapshot
from torch import nn

from fourbit.errors import InputError
from fourbit.kernels.dispatch import force_path
from fourbit.optim import AdamW, Lion, state

BUDGETS = [None, 40_000]


def stepped(optimizer: Any, *lists: Any, seed: int = 0) -> None:
    give_gradients(*lists, seed=seed)
    optimizer.step()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["dtype", "smaller", "larger", "reshaped", "gradient"])
def test_parameters_that_changed_are_refused(path: str, how: str) -> None:
    """Kernels go by address: after model.bfloat16() one would write twice as much as there is."""
    ps = parameters([(9,), (20000,)], path=path)
    optimizer = AdamW(ps)
    with force_path(path):
        stepped(optimizer, ps)
        kept = snapshot(optimizer, ps[:1])
        give_gradients(ps, seed=1)
        changed = {
            "dtype": lambda t: t.bfloat16(),
            "smaller": lambda t: t[:10000].clone(),
            "larger": lambda t: torch.cat([t, t]),
            "reshaped": lambda t: t.view(200, 100),
            "gradient": lambda t: t,
        }[how](ps[1].detach())
        around = torch.full((60000,), 7.0, dtype=changed.dtype, device=changed.device)
        inner = around[20000 : 20000 + changed.numel()].view(changed.shape)
        ps[1].grad = None
        ps[1].data = inner.copy_(changed)
        ps[1].grad = torch.ones_like(ps[1])
        words = rf"parameter 1 was torch.float32 \[20000\] on {changed.device} when"
        if how == "gradient":
            ps[1].grad.data, words = changed.new_ones(4), "gradients must be dense"
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert torch.equal(inner, changed)
    assert (around == 7).sum() >= 60000 - changed.numel()
    assert_equal(snapshot(optimizer, ps[:1]), kept)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("path", PATHS)
def test_another_dtype_is_taken_over_as_the_message_says(path: str, budget: int | None) -> None:
    ps, twins = (parameters([(9,), (3, 5000)], path=path) for _ in range(2))
    optimizer, straight = AdamW(ps, lr=0.1, budget=budget), AdamW(twins, lr=0.1)
    with force_path(path):
        for some, its in ((optimizer, ps), (straight, twins)):
            stepped(some, its)
            for p in its:
                p.grad = None
                p.data = p.data.bfloat16()
        optimizer.load_state_dict(optimizer.state_dict())
        fresh = AdamW(twins, lr=0.1)
        fresh.load_state_dict(straight.state_dict())
        give_gradients(ps, twins, seed=1)
        optimizer.step()
        fresh.step()
    assert all(torch.equal(p, q) and p.dtype == torch.bfloat16 for p, q in zip(ps, twins, strict=True))
    assert optimizer.state[ps[0]]["step"] == 2


CHANGES = {
    "reversed": lambda o, p: o.param_groups.reverse(),
    "group taken out": lambda o, p: o.param_groups.pop(0),
    "parameter taken out": lambda o, p: o.param_groups[1].update(params=[]),
    "parameter moved": lambda o, p: o.param_groups[0]["params"].append(o.param_groups[1]["params"].pop()),
    "all state": lambda o, p: o.state.clear(),
    "state of one": lambda o, p: o.state.pop(p),
    "state emptied": lambda o, p: o.state[p].clear(),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("what", CHANGES)
def test_groups_and_state_may_not_be_changed_behind_its_back(what: str, budget: int | None) -> None:
    ps = parameters([(9000,), (70,)])
    optimizer = AdamW([{"params": [p]} for p in ps], budget=budget)
    stepped(optimizer, ps)
    before = [p.detach().clone() for p in ps]
    CHANGES[what](optimizer, ps[0])
    words = "state of a parameter was removed" if "state" in what else "were moved between param_groups or taken out"
    with pytest.raises(ValueError, match=f"{words}.*make a new optimizer"):
        stepped(optimizer, ps, seed=1)
    assert_equal(ps, before)


def test_a_new_group_does_not_hide_what_was_moved() -> None:
    """The step would go on with the old group's rate."""
    ps = parameters([(9,), (70,), (3,)])
    optimizer = AdamW([{"params": [p], "lr": lr} for p, lr in zip(ps[:2], (0.1, 0.5), strict=True)])
    stepped(optimizer, ps[:2])
    CHANGES["parameter moved"](optimizer, ps[0])
    with pytest.raises(ValueError, match="were moved between param_groups or taken out"):
        optimizer.add_param_group({"params": ps[2:]})
    assert len(optimizer.param_groups) == 2


def test_groups_may_be_replaced_by_others_with_the_same_parameters() -> None:
    ps = parameters([(3,)])
    optimizer = AdamW(ps)
    stepped(optimizer, ps)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0, "weight_decay": 0.0}
    before = ps[0].detach().clone()
    stepped(optimizer, ps, seed=1)
    assert torch.equal(ps[0], before) and optimizer.state[ps[0]]["step"] == 2


def test_parameters_on_two_devices_are_refused() -> None:
    ps = [*parameters([(3,)]), nn.Parameter(torch.ones(3, device="meta"))]
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"works on one device, but has parameters on \['cpu', 'meta'\]"):
        AdamW(ps).step()


def test_state_dict_writes_what_the_step_uses() -> None:
    """A tensor put into optimizer.state is not taken; one that is changed in place is."""
    ps = parameters([(70,)])
    optimizer = AdamW(ps)
    stepped(optimizer, ps)
    kept = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    optimizer.state[ps[0]]["exp_avg"] = torch.zeros(70)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], kept)
    optimizer.state[ps[0]]["exp_avg_sq"].fill_(4.0)
    assert (optimizer.state_dict()["state"][0]["exp_avg_sq"] == 4).all()
    before = ps[0].detach().clone()
    optimizer.param_groups[0].update(lr=1.0, weight_decay=0.0, eps=0.0)
    optimizer.step()  # root of the second moment: 2 * 0.999 and more, over the root of 1 - 0.999^2
    assert (ps[0] - before).abs().max() < 0.25


def test_reading_state_of_a_stranger_costs_nothing() -> None:
    """torch.optim's state is a defaultdict: a look makes an entry."""
    ps = parameters([(70,), (3,)])
    optimizer = AdamW(ps)
    give_gradients(ps, seed=0, missing=[1])
    optimizer.step()
    assert optimizer.state[ps[1]] == {}
    give_gradients(ps, seed=1)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in ps] == [2.0, 1.0]


def test_memory_that_runs_out_while_parameters_join_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = parameters([(300,), (5000,), (70,)])
    optimizer = AdamW(ps)
    give_gradients(ps, seed=0, missing=[1, 2])
    optimizer.step()

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    give_gradients(ps, seed=1)
    before = snapshot(optimizer, ps)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(state.FlatState, "grown", fails)
        optimizer.step()
    assert_equal(snapshot(optimizer, ps), before)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in ps] == [2.0, 1.0, 1.0]
    assert [entry.size for entry in optimizer._entries] == [p.numel() for p in ps]


def test_a_step_holds_no_gradient_afterwards() -> None:
    ps = parameters([(300,)])
    optimizer = AdamW(ps)
    stepped(optimizer, ps)
    (entry,) = optimizer._entries
    assert entry.gradient is entry.weights is None
    with pytest.raises(ValueError, match="dense"):
        ps[0].grad.data = torch.ones(4)
        optimizer.step()
    assert entry.gradient is entry.weights is None


def test_no_views_are_made_to_read_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost most of a step over hundreds of small tensors."""
    pytest.importorskip("triton")
    ps = parameters([(300,), (16, 40), (0,), ()], path="triton")
    optimizer = AdamW8bit(ps, min_8bit_size=0, max_grad_norm=1.0)
    with force_path("triton"):
        stepped(optimizer, ps)
        seen: list[str] = []
        for name in ("view", "reshape", "flatten", "as_strided", "contiguous", "detach"):
            method = getattr(torch.Tensor, name)
            patched = lambda *a, name=name, method=method: (seen.append(name), method(*a))[1]
            monkeypatch.setattr(torch.Tensor, name, patched)
        stepped(optimizer, ps, seed=1)
    assert optimizer.state[ps[1]]["step"] == 2 and len(seen) < len(ps), seen  # one, of the table itself


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [Lion, Lion8bit, AdamW, AdamW8bit])
def test_nan_shows_on_every_path(path: str, make: Any) -> None:
    """The sign of NaN is 0: Lion would rest where it is, with 8 bits a whole block for good."""
    for size in (300, 8192, 70_000):
        (p,) = parameters([(size,)], path=path)
        optimizer = make([p], lr=0.125, weight_decay=0.0, min_8bit_size=0)
        with force_path(path):
            p.grad = torch.ones_like(p)
            p.grad[7] = torch.nan
            optimizer.step()
            assert p.isnan().nonzero().flatten().tolist() == [7]
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert p.isnan().nonzero().flatten().tolist() == (list(range(256)) if optimizer.bits == 8 else [7])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("path", PATHS)
def test_infinity_has_a_sign(path: str) -> None:
    (p,) = parameters([(300,)], path=path)
    p.data.fill_(1.0)
    optimizer = Lion([p], lr=0.125, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    p.grad[3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    with force_path(path):
        optimizer.step()
    torch.testing.assert_close(
        p[2:6].detach().cpu(), torch.tensor([1, 0.875, 1.125, torch.nan]), rtol=0, atol=0, equal_nan=True
    )


def test_a_budget_below_a_page_is_refused_before_anything_is_changed() -> None:
    ps = parameters([(300,), (9000,)])
    with pytest.raises(InputError, match="budget of 4000 bytes is less than one page of state; the least is 32768"):
        AdamW(ps, budget=4000)
    ps[1].requires_grad_(False)  # not known to be trained, so not counted before it is
    optimizer = AdamW(ps, budget=4096)
    give_gradients(ps, seed=0, missing=[1])
    optimizer.step()
    ps[1].requires_grad_(True)
    for _ in range(2):
        give_gradients(ps, seed=1)
        before = snapshot(optimizer, ps)
        with pytest.raises(InputError, match="the least is 32768"):
            optimizer.step()
        assert_equal(snapshot(optimizer, ps), before)
    with pytest.raises(InputError, match="the least is 32768"):
        optimizer.add_param_group({"params": parameters([(9000,)])})
    assert len(optimizer.param_groups) == 1
    give_gradients(ps, seed=2, missing=[1])
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == 2 and ps[1] not in optimizer.state


@pytest.mark.parametrize("budget", [2048, 4096, 20000])
def test_small_state_needs_only_its_own_bytes(budget: int) -> None:
    ps = parameters([(64,)])
    optimizer = AdamW(ps, budget=budget)
    stepped(optimizer, ps)
    assert optimizer.pager and optimizer.pager.counters.peak_bytes == 2048


def test_paged_state_of_one_parameter_is_saved_alone() -> None:
    ps = parameters([(300,)] * 50)
    optimizer = AdamW(ps, budget="auto")
    stepped(optimizer, ps)
    file = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0], file)
    assert file.tell() < 2 * 512 * 4 + 4096


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("path", PATHS)
def test_a_step_counts_as_a_change_of_each_parameter(path: str, budget: int | None) -> None:
    """As torch's in-place operations do: what is kept of a parameter's values (DoRA's norms) goes by its version."""
    ps = [*parameters([(9,), (3, 5000)], path=path), *parameters([(50, 6)], path=path)]
    ps[2].data = ps[2].data.t()  # not contiguous: written through a copy
    before = [p._version for p in ps]
    with force_path(path):
        stepped(AdamW(ps, budget=budget), ps)
    assert all(p._version > old for p, old in zip(ps, before, strict=True))
