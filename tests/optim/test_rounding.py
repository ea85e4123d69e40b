"""Weights of 16 bits lose no update: over many steps they go where fp32 goes, for every optimizer and kind of state."""

import math
from typing import Any

import pytest
import torch
from optim_tools import AdamW8bit, Lion8bit, assert_equal, give_gradients, parameters
from torch import nn

from fourbit.optim import AdamW, Lion

SIZE = 2048


def drift(make: Any, dtype: torch.dtype, steps: int, *, lr: float, gradient: float, **settings: Any) -> float:
    """How far the mean of weights that begin at 1, like a norm's, is from that of their fp32 twins, in standard
    deviations of the sum of all roundings.

    A step by d of a weight whose neighbours are u apart is rounded with a variance of d (u - d) at most, so the mean
    over SIZE weights has at most sum(d) u / SIZE.
    """
    ours, twin = (nn.Parameter(torch.ones(SIZE, dtype=d)) for d in (dtype, torch.float32))
    optimizers = [make([p], lr=lr, **settings) for p in (ours, twin)]
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        g = (gradient * (1 + 0.5 * torch.randn(SIZE, generator=noise))).to(dtype)
        for p, optimizer in zip((ours, twin), optimizers, strict=True):
            p.grad = g.to(p.dtype)
            optimizer.step()
    way = 1 - twin.detach().double().mean().item()
    spacing = torch.finfo(dtype).eps / 2  # below 1
    off = ours.detach().double().mean().item() - (1 - way)
    assert 10 * lr < abs(way) < 0.5, "all of it between two powers of two"
    return abs(off) / math.sqrt(abs(way) * spacing / SIZE)


CASES = {
    "adamw": (AdamW, torch.bfloat16, {"lr": 1e-5, "gradient": 1.0, "weight_decay": 0.0}),
    "adamw in fp16": (AdamW, torch.float16, {"lr": 1e-5, "gradient": 1.0, "weight_decay": 0.0}),
    "lion": (Lion, torch.bfloat16, {"lr": 1e-6, "gradient": 1.0}),
    "adamw8bit": (AdamW8bit, torch.bfloat16, {"lr": 1e-5, "gradient": 1.0, "min_8bit_size": 0}),
    "lion8bit, paged": (Lion8bit, torch.bfloat16, {"lr": 1e-5, "gradient": 1.0, "min_8bit_size": 0, "budget": 1 << 16}),
    "weight decay alone": (AdamW, torch.bfloat16, {"lr": 1e-4, "gradient": 0.0, "weight_decay": 0.1}),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_steps_end_where_fp32_does(name: str) -> None:
    make, dtype, settings = CASES[name]
    assert drift(make, dtype, 10_000, **settings) <= 5


@pytest.mark.parametrize("name", CASES)
def test_some_steps_end_where_fp32_does(name: str) -> None:
    make, dtype, settings = CASES[name]
    assert drift(make, dtype, 100, **settings) <= 5


def test_to_nearest_it_goes_nowhere() -> None:
    """What the cases above would find: all of the way is missing."""
    p = nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-5, rounding="nearest")
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p == 1).all()


def test_draws_are_the_seeds() -> None:
    """Equal seeds give equal bits, others other ones; fp32 weights know nothing of either."""
    ends = []
    for seed, dtype in (
        (5, torch.bfloat16),
        (5, torch.bfloat16),
        (6, torch.bfloat16),
        (-1, torch.float32),
        (2**70, torch.float32),
    ):
        ps = parameters([(300,), (70, 80)], dtype)
        optimizer = AdamW(ps, lr=1e-5, seed=seed)
        for i in range(3):
            give_gradients(ps, seed=i)
            optimizer.step()
        ends.append(ps)
    assert_equal(ends[0], ends[1])
    assert_equal(ends[3], ends[4])
    for p, q in zip(ends[0], ends[2], strict=True):
        assert 0 < (p != q).float().mean() < 0.2
