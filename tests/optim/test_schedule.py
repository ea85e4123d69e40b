"""The learning rate: its landmarks, its shape, and equality with torch's own cosine where torch has one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fourbit.optim.groups import decay_groups
from fourbit.optim.schedule import learning_rate

SCHEDULES = st.sampled_from(["cosine", "linear", "constant"])


@given(SCHEDULES, st.integers(1, 500), st.data())
def test_rises_to_the_peak_and_never_above(schedule, total, data):
    warmup = data.draw(st.integers(0, total - 1))
    rates = [learning_rate(i, total=total, peak=0.5, warmup=warmup, schedule=schedule) for i in range(total)]
    assert max(rates) == rates[warmup] == 0.5
    assert all(0 < a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b > 0 for a, b in pairwise(rates[warmup:]))


@pytest.mark.parametrize("schedule, middle, end", [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)])
def test_landmarks(schedule, middle, end):
    rate = lambda step: learning_rate(step, total=110, peak=1.0, warmup=10, schedule=schedule)  # noqa: E731
    assert rate(0) == pytest.approx(1 / 11) and rate(10) == 1
    assert rate(60) == pytest.approx(middle) and rate(110) == pytest.approx(end)


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate(step, total=50, peak=3.0, warmup=0, schedule="cosine") == pytest.approx(
            optimizer.param_groups[0]["lr"]
        )
        optimizer.step()
        theirs.step()


def test_vectors_do_not_decay():
    layer = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    decayed, spared = decay_groups(layer.parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1 and [tuple(p.shape) for p in decayed["params"]] == [(3, 2)]
    assert spared["weight_decay"] == 0.0 and [tuple(p.shape) for p in spared["params"]] == [(3,), (3,), (3,)]
    assert len(decay_groups([nn.Parameter(torch.zeros(2, 2))], 0.1)) == 1
