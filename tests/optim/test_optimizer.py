"""What a torch.optim.Optimizer must bear: groups, missing gradients, odd tensors, schedulers, copies, bad settings."""

import copy
import math
import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from optim_tools import PATHS, AdamW8bit, Lion8bit, assert_equal, distance, give_gradients, parameters, step
from torch import nn

from fourbit.optim import AdamW, Lion


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_missing_gradients_and_groups_as_in_torch(path: str) -> None:
    """Parameters rest whole steps, join late, freeze for good; groups have settings of their own."""
    shapes = [(5, 3), (), (0, 4), (300,), (9000,), (2, 2), (4, 4)]
    ours, theirs = parameters(shapes), parameters(shapes)

    def groups(ps: list[nn.Parameter]) -> list[dict[str, Any]]:
        ps[5].requires_grad_(False)
        return [{"params": ps[:3], "lr": 1e-2}, {"params": ps[3:6], "weight_decay": 0.3, "betas": (0.8, 0.95)}]

    optimizer, oracle = AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), foreach=False)
    for i, missing in enumerate([[0, 4, 5], [5], [1, 3, 5], [5, 0], [5], [5, 4]]):
        if i == 3:
            for o, ps in ((optimizer, ours), (oracle, theirs)):
                o.add_param_group({"params": [ps[6]], "lr": 1e-1, "eps": 1e-3})
        give_gradients(ours, theirs, seed=i, missing=[*missing, *([6] if i < 3 else [])])
        step(optimizer, path)
        oracle.step()
    assert distance(ours, theirs) <= 1e-7
    state, expected = optimizer.state_dict(), oracle.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    for number, entry in expected["state"].items():
        assert {k: v.shape for k, v in entry.items()} == {k: v.shape for k, v in state["state"][number].items()}
        assert float(entry["step"]) == float(state["state"][number]["step"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [AdamW, AdamW8bit, Lion8bit])
def test_strides_change_nothing(path: str, make: Any) -> None:
    """Transposed, channels-last and sliced parameters, and gradients laid out in another way than their parameter."""
    plain = parameters([(40, 30), (2, 3, 20, 20), (25, 30), (32, 24)], path=path)
    storage = plain[2].detach().repeat_interleave(2, dim=1)
    between = storage[:, 1::2].clone()
    odd = [
        nn.Parameter(plain[0].detach().t().contiguous().t()),
        nn.Parameter(plain[1].detach().contiguous(memory_format=torch.channels_last)),
        nn.Parameter(storage[:, ::2]),
        nn.Parameter(plain[3].detach().clone()),
    ]
    a, b = (make(ps, lr=1e-2, min_8bit_size=0) for ps in (plain, odd))
    assert [p.is_contiguous() for p in odd] == [False, False, False, True]
    for i in range(3):
        give_gradients(plain, odd, seed=i)
        odd[3].grad = odd[3].grad.t().contiguous().t()
        odd[0].grad = odd[0].grad.contiguous() if i == 1 else odd[0].grad.t().contiguous().t()
        step(a, path)
        step(b, path)
    assert_equal(storage[:, 1::2], between)
    assert_equal([*odd, b.state_dict()], [*plain, a.state_dict()])


def test_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    (p,) = parameters([(3,)])
    optimizer = AdamW([p])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure) == (before * before).sum()
    assert not torch.equal(p, before)


def test_zero_grad_leaves_nothing_to_do() -> None:
    (p,) = parameters([(300,)])
    optimizer = AdamW([p], max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state
    give_gradients([p], seed=0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1
    assert optimizer.grad_norm == 0


@pytest.mark.parametrize("path", PATHS)
def test_learning_rate_in_a_tensor(path: str) -> None:
    ours, same = parameters([(70,)], path=path), parameters([(70,)], path=path)
    give_gradients(ours, same, seed=0)
    step(AdamW(ours, lr=torch.tensor(1e-2)), path)
    step(AdamW(same, lr=float(torch.tensor(1e-2))), path)
    assert_equal(ours, same)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
@pytest.mark.parametrize("make", [AdamW, Lion8bit])
def test_copies_go_on_alone(make: Any, copier: Any) -> None:
    ours = parameters([(70,), (5000,)])
    optimizer = make(ours, lr=1e-2)
    give_gradients(ours, seed=0)
    optimizer.step()
    other, twin = copier((ours, optimizer))
    for i in (1, 2):
        give_gradients(ours, other, seed=i)
        optimizer.step()
        twin.step()
    assert_equal([*other, twin.state_dict()], [*ours, optimizer.state_dict()])


def test_small_and_fp64_parameters_keep_full_moments() -> None:
    ps = [nn.Parameter(torch.ones(n, dtype=d)) for n, d in ((4095, torch.float32), (4096, torch.bfloat16))]
    ps.append(nn.Parameter(torch.ones(5000, dtype=torch.float64)))
    optimizer = AdamW8bit(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in ps] == [torch.float32, torch.uint8, torch.float64]
    assert optimizer.state[ps[1]]["exp_avg_absmax"].shape == (16,)


@pytest.mark.parametrize("make", [AdamW, Lion, AdamW8bit, Lion8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_change_nothing(make: Any, dtype: torch.dtype) -> None:
    """Small parameters are gathered and large ones cut: every bit is as if each had an optimizer of its own."""
    shapes = [(4, 1280), (256, 17), (5000,), (8192,), (4097,), (64, 80), (512, 600), (65536,), (3, 2048), (7,)]
    together, alone = (parameters(shapes, dtype) for _ in range(2))
    make = partial(make, rounding="nearest")  # the draws belong to a parameter's number
    one, many = make(together), [make([p]) for p in alone]
    for i in range(4):  # the second step nearly cancels the first, so that what lies behind a parameter would matter
        give_gradients(together, alone, seed=max(i, 1), missing=[(), (), (3, 5), (0,)][i])
        if i == 1:
            for p in (*together, *alone):
                p.grad *= -0.9
            loaded = copy.deepcopy(one.state_dict())
            one = make(together)
            one.load_state_dict(loaded)
        for optimizer in (one, *many):
            optimizer.step()
    assert_equal(together, alone)
    for p, q, other in zip(together, alone, many, strict=True):
        assert_equal(one.state[p], other.state[q])


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_stochastic_rounding_keeps_small_updates(path: str) -> None:
    """bf16 weights of 1 and steps of 1e-4, a fortieth of their spacing: rounded to nearest they would never move."""
    moved = []
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = Lion([p], lr=1e-4, rounding=rounding)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            step(optimizer, path)
        moved.append(1 - float(p.detach().double().mean()))
    assert moved[0] == 0
    # 200,000 draws of probability 1e-4 * 256 (below 1, bf16 has steps of 2^-8), each worth 2^-8
    assert abs(moved[1] - 1e-3) <= 5 * (10 * 0.0256 / 20000) ** 0.5 * 2**-8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(
            ({"lr": lr}, "lr must be a number >= 0, got ")
            for lr in (
                -1.0,
                math.nan,
                torch.tensor(-1.0),
                torch.tensor(math.nan),
                torch.tensor([0.1, 0.1]),
                None,
                "1e-3",
            )
        ),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps must be a number >= 0"),
        ({"weight_decay": -1}, "weight_decay must be a number >= 0"),
        ({"betas": 0.9}, "betas must be two numbers .*, got 0.9"),
        ({"betas": ("0.9", 0.9)}, "betas must be two numbers"),
        ({"eps": None}, "eps must be a number >= 0, got None"),
        ({"weight_decay": None}, "weight_decay must be a number >= 0, got None"),
        ({"min_8bit_size": None}, "min_8bit_size must be a number, got None"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be positive, or None not to clip, got '1'"),
        ({"seed": 1.5}, "seed must be a whole number, or None to draw one, got 1.5"),
        ({"bits": 4}, "bits must be 8 or 32, got 4"),
        ({"rounding": "up"}, "rounding must be one of stochastic, nearest, got 'up'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, or None not to clip, got 0.0"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamW([nn.Parameter(torch.ones(3))], **settings)


def test_refuses_what_it_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"must be dense fp32, bf16, fp16 or fp64, got torch.complex64"):
        AdamW([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    optimizer = AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1})
    with pytest.raises(ValueError, match="bits is of the whole optimizer: give AdamW bits=8, not a group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "bits": 8})
    assert AdamW([{"params": [nn.Parameter(torch.ones(2))]}], bits=8).bits == 8
    with pytest.raises(ValueError, match="betas must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": 0.9})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "bits": 32, "lr_scale": 2.0})
    assert len(optimizer.param_groups) == 2
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"):
        AdamW(embedding.parameters()).step()


def test_no_optimizer_imports_torchs_compiler() -> None:
    """Which takes a second and more, and some 60 MB, of every training."""
    code = """
import sys, torch
from fourbit.optim import AdamW
weight = torch.nn.Parameter(torch.ones(8))
weight.grad = torch.ones(8)
optimizer = AdamW([weight])
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [AdamW, AdamW8bit])
def test_torchs_default_dtype_and_device_change_nothing(path: str, make: Any) -> None:
    """Steps are counted in fp32, where 16 bits would stop at 256, and what is made lies where the parameters are."""
    ends = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        ps = parameters([(300,)], torch.bfloat16, path)
        give_gradients(ps, seed=0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                optimizer = make(ps, lr=1e-2, max_grad_norm=1.0, min_8bit_size=0)
                step(optimizer, path)
                optimizer._steps += 300
                step(optimizer, path)
        finally:
            torch.set_default_dtype(torch.float32)
        assert optimizer.state[ps[0]]["step"] == 302
        ends.append(ps)
    assert_equal(ends[1:], ends[:1] * 2)
