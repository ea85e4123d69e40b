"""State on disk: torch.optim.AdamW's both ways, ours round; and what is refused."""

import copy
from typing import Any

import pytest
import torch
from optim_tools import AdamW8bit, Lion8bit, assert_equal, distance, give_gradients, parameters, snapshot

from fourbit.optim import AdamW, Lion

SHAPES = [(63,), (4097,), (3, 5), ()]


def steps(seeds: range, *pairs: Any) -> None:
    for i in seeds:
        give_gradients(*(ps for ps, _ in pairs), seed=i)
        for _, optimizer in pairs:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_goes_on_where_torch_left_off_and_back(dtype: torch.dtype) -> None:
    ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    oracle = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    steps(range(3), (theirs, oracle))
    optimizer = AdamW(ours)
    optimizer.load_state_dict(oracle.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    assert optimizer.param_groups[0]["lr"] == 1e-2 and "amsgrad" not in optimizer.param_groups[0]
    steps(range(3, 6), (ours, optimizer), (theirs, oracle))
    back = torch.optim.AdamW(theirs, lr=1.0)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else they would share it
    for p, q in zip(ours, theirs, strict=True):
        assert distance([back.state[q]["exp_avg"]], [optimizer.state[p]["exp_avg"]]) <= 2**-8
        assert back.state[q]["step"] == 6 and back.state[q]["exp_avg_sq"].dtype == dtype
    if dtype != torch.bfloat16:  # torch keeps bf16 moments, and so trains something else
        assert distance(ours, theirs) <= 1e-7
        steps(range(6, 8), (ours, optimizer), (theirs, back))
        assert distance(ours, theirs) <= 1e-7


@pytest.mark.parametrize("make", [AdamW, AdamW8bit, Lion, Lion8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(make: Any, dtype: torch.dtype) -> None:
    ours = parameters(SHAPES, dtype)
    optimizer = make(ours, lr=1e-2, max_grad_norm=1.0)
    steps(range(3), (ours, optimizer))
    other = copy.deepcopy(ours)
    resumed = make(other, max_grad_norm=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(range(3, 6), (ours, optimizer), (other, resumed))
    assert_equal(other, ours)
    assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_bits_are_never_changed_silently() -> None:
    ours = parameters([(5000,)])
    full, short = AdamW(ours), AdamW8bit(ours)
    steps(range(1), (ours, full), (ours, short))
    with pytest.raises(
        ValueError, match=r"parameter 0, \(5000,\), has 32 bits, but this optimizer keeps 8 for it; make"
    ):
        short.load_state_dict(full.state_dict())
    with pytest.raises(ValueError, match="has 8 bits, but this optimizer keeps 32"):
        full.load_state_dict(short.state_dict())
    with pytest.raises(ValueError, match="min_8bit_size"):
        AdamW8bit(ours, min_8bit_size=6000).load_state_dict(short.state_dict())


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"])
def test_every_tensor_must_be_of_its_kind(name: str) -> None:
    """Second moments in fp32 would be cut to codes, scales in integers to 0."""
    ours = parameters([(5000,)])
    for optimizer in (AdamW(ours), AdamW8bit(ours)):
        steps(range(1), (ours, optimizer))
        before = snapshot(optimizer, ours)
        saved = copy.deepcopy(optimizer.state_dict())
        if name in (state := saved["state"][0]):
            state[name] = state[name].float() if state[name].dtype == torch.uint8 else state[name].to(torch.uint8)
            with pytest.raises(ValueError, match=r"bits, but this optimizer keeps|has a exp_avg\w+ of torch"):
                optimizer.load_state_dict(saved)
            assert_equal(snapshot(optimizer, ours), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), r"groups of \[1\] parameters, this one of \[2\]"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize=True, which the optimizers here do not do"),
        (lambda s: s["param_groups"][0].update(decoupled_weight_decay=False), "weight decay into the gradient"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), "betas must be two numbers"),
        (lambda s: s["param_groups"][0].pop("betas"), "has no betas, so it is neither AdamW nor Lion"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(8)), r"exp_avg of shape \(8,\), not \(7,\)"),
        (lambda s: s["state"][1].pop("exp_avg_sq"), r"has \['exp_avg', 'step'\], but adamw keeps"),
        (lambda s: s["state"].update({9: s["state"][1]}), r"parameters \[9\] belongs to no saved group"),
    ],
)
def test_refusals_change_nothing(change: Any, words: str) -> None:
    ours = parameters([(5,), (7,)])
    optimizer = AdamW(ours)
    steps(range(2), (ours, optimizer))
    before = snapshot(optimizer, ours)
    change(state := copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    assert_equal(snapshot(optimizer, ours), before)
    with pytest.raises(ValueError, match="but lion keeps"):
        Lion(ours).load_state_dict(optimizer.state_dict())


def test_hooks_run() -> None:
    ours = parameters([(5,)])
    optimizer, seen = AdamW(ours), list[str]()
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    steps(range(1), (ours, optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", "loading", "loaded"]
