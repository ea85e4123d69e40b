"""AdamW and Lion against torch.optim.AdamW, against their definitions in float64, and against bitsandbytes."""

import copy
import math
from typing import Any

import pytest
import torch
from optim_tools import PATHS, AdamW8bit, Lion8bit, assert_equal, distance, give_gradients, parameters, snapshot, step
from torch import nn

from fourbit.optim import AdamW, Lion

SHAPES = [(1,), (63,), (4097,), (3, 70, 5), ()]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-7), (torch.float64, 1e-12)])
@pytest.mark.parametrize("path", PATHS)
def test_thousand_steps_of_torchs_adamw(dtype: torch.dtype, bound: float, path: str) -> None:
    """With weight decay, odd sizes, and saved and loaded in mid-run. Kernels, in the interpreter, take 40 steps."""
    shapes, steps = ([(1,), (63,), (300,)], 40) if path == "triton" else ([(1,), (63,), (4097,)], 1000)
    ours, theirs = parameters(shapes, dtype, path), parameters(shapes, dtype)
    start = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}
    optimizer, oracle = AdamW(ours, **settings), torch.optim.AdamW(theirs, foreach=False, **settings)
    for i in range(steps):
        if i == steps // 2 - 3:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = AdamW(ours)  # other settings, which loading replaces
            optimizer.load_state_dict(saved)
        give_gradients(ours, theirs, seed=i)
        step(optimizer, path)
        oracle.step()
    assert distance(ours, theirs) <= bound
    assert distance(ours, start) > 5e-5 * steps  # they did move


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_lion_in_float64(path: str) -> None:
    """Against the algorithm as printed (arXiv 2302.06675, algorithm 2), 300 steps."""
    ours, lr, decay, beta1, beta2 = parameters(SHAPES, torch.float64), 1e-3, 0.1, 0.9, 0.99
    weights = [p.detach().clone() for p in ours]
    means = [torch.zeros_like(w) for w in weights]
    optimizer = Lion(ours, lr=lr, weight_decay=decay)
    for i in range(300):
        give_gradients(ours, seed=i)
        step(optimizer, path)
        for w, m, p in zip(weights, means, ours, strict=True):
            w -= lr * (torch.sign(beta1 * m + (1 - beta1) * p.grad) + decay * w)
            m.copy_(beta2 * m + (1 - beta2) * p.grad)
    assert distance(ours, weights) <= 1e-12


@pytest.mark.parametrize("make", [AdamW, Lion, AdamW8bit, Lion8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_quick_form_is_the_reference(make: Any, dtype: torch.dtype) -> None:
    """Batches and pieces change nothing: many small tensors, pieces of large ones, differing step counts, clipping."""
    shapes = [*SHAPES, *[(40, 7)] * 30, (300, 257), (0,), (70001,)]
    ours, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 200.0, "min_8bit_size": 200}
    quick, reference = make(ours, **settings), make(theirs, **settings)
    for i in range(4):
        give_gradients(ours, theirs, seed=i, missing=[7, 8, 35] if i in (0, 2) else [9])
        step(quick, "cpu")
        step(reference, "reference")
    unit = torch.finfo(dtype).eps
    # One rounding may fall the other way; 8-bit codes may then be neighbours, which moves a step by at most 2 percent.
    assert distance(ours, theirs) <= (unit if dtype != torch.float32 else 1e-3 if quick.bits == 8 else 1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_clipping_is_torchs(path: str) -> None:
    """Over all groups; and the gradients themselves stay what they were."""
    ours, theirs = parameters(SHAPES, path=path), parameters(SHAPES)
    groups = lambda ps: [{"params": ps[:2], "lr": 1e-2}, {"params": ps[2:]}]
    optimizer, oracle = AdamW(groups(ours), max_grad_norm=0.5), torch.optim.AdamW(groups(theirs), foreach=False)
    for i in range(5):
        give_gradients(ours, theirs, seed=i)
        before = [p.grad.clone() for p in ours]
        step(optimizer, path)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        oracle.step()
        assert optimizer.grad_norm is not None and optimizer.grad_norm.shape == ()
        torch.testing.assert_close(optimizer.grad_norm.cpu(), norm, rtol=1e-6, atol=0)
        assert_equal([p.grad for p in ours], before)
    assert distance(ours, theirs) <= 1e-7


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [AdamW, AdamW8bit, Lion, Lion8bit])
@pytest.mark.parametrize("how", ["found_inf", "nan", "inf"])
def test_skipped_steps_change_no_byte(path: str, make: Any, how: str) -> None:
    ours = parameters([(63,), (5000,)], path=path)
    optimizer = make(ours, max_grad_norm=None if how == "found_inf" else math.inf)
    for i in (0, 1, 2):  # also at the very first step
        give_gradients(ours, seed=i)
        before = snapshot(optimizer, ours)
        if how == "found_inf":
            optimizer.found_inf = torch.tensor(float(i != 1), device=ours[0].device)
        elif i != 1:
            ours[1].grad[4999] = float(how)
        step(optimizer, path)
        assert optimizer.skipped.item() == float(i != 1)
        now = snapshot(optimizer, ours)
        if i == 2:
            assert_equal(now, before)
        else:
            assert [torch.equal(p, old) for p, old in zip(now[0], before[0], strict=True)] == [i == 0] * 2
        steps = [float(entry["step"]) for entry in now[1]["state"].values()]
        assert steps == [float(i > 0)] * 2


def test_end_loss_of_8bit_is_bitsandbytes() -> None:
    """Within one percent, after a 500-step fit of a small network."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 64, generator=generator)
    y = torch.tanh(x @ torch.randn(64, 8, generator=generator)) + 0.3 * torch.randn(1024, 8, generator=generator)

    def end_loss(make: Any) -> float:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
        optimizer = make(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
        for _ in range(500):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    ours, theirs = end_loss(AdamW8bit), end_loss(bitsandbytes.optim.AdamW8bit)
    assert abs(ours - theirs) <= 0.01 * theirs
    assert ours < 0.02  # from 0.5: it did learn


@pytest.mark.parametrize(("make", "peer"), [(AdamW8bit, "AdamW8bit"), (Lion8bit, "Lion8bit")])
@pytest.mark.parametrize("size", [4096, 5001, 70000])
def test_one_8bit_step_beside_bitsandbytes(make: Any, peer: str, size: int) -> None:
    """From identical state and gradients. Our codes are the nearest; theirs may be a little farther off.

    The bound on theirs, 2^-15 of the block's scale beyond ours, is what their CPU quantiser needs (FORMATS.md).
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from fourbit.kernels.codes import dynamic_code

    (ours,), (theirs,) = parameters([(size,)]), parameters([(size,)])
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    oracle = getattr(bitsandbytes.optim, peer)([theirs], **settings)
    for i in range(3):
        give_gradients([theirs], seed=i)
        oracle.step()
    optimizer = make([ours], **settings)
    saved = copy.deepcopy(oracle.state_dict())
    entry = saved["state"][0] | saved["state"][0].pop("__bnb_optimizer_quant_state__", {})
    saved["state"][0] = {"step": entry["step"]}
    for i, moment in enumerate(optimizer.rule.moments, 1):
        saved["state"][0] |= {moment.name: entry[f"state{i}"], f"{moment.name}_absmax": entry[f"absmax{i}"]}
    optimizer.load_state_dict(saved)
    ours.data.copy_(theirs.data)
    before = {k: v.clone() for k, v in optimizer.state[ours].items()}
    give_gradients([ours], [theirs], seed=9)
    optimizer.step()
    oracle.step()
    assert distance([ours], [theirs]) <= 1e-6
    state, other = optimizer.state[ours], oracle.state[theirs]
    for i, moment in enumerate(optimizer.rule.moments, 1):
        code, name = dynamic_code(moment.signed).double(), moment.name
        expand = lambda absmax: absmax.double().repeat_interleave(256)[:size]
        old = code[before[name].long()] * expand(before[f"{name}_absmax"])
        g, beta = (
            ours.grad.double(),
            optimizer.param_groups[0]["betas"][i - 1 if len(optimizer.rule.moments) > 1 else 1],
        )
        exact = beta * old + (1 - beta) * (g if moment.signed else g * g)
        scale = expand(state[f"{name}_absmax"])
        torch.testing.assert_close(state[f"{name}_absmax"], other[f"absmax{i}"], rtol=1e-6, atol=0)
        error = (code[state[name].long()] * scale - exact).abs()
        best = (code[:, None] * scale - exact).abs().amin(dim=0)
        assert (error <= best + 2**-21 * scale).all()  # the moment itself is rounded to fp32, twice
        theirs_off = (code[other[f"state{i}"].long()] * expand(other[f"absmax{i}"]) - exact).abs()
        assert (theirs_off <= error + 2**-15 * scale).all()
