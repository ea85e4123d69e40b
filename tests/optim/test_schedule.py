"""The learning rate: its landmarks, its shape, and equality with torch's and transformers' own where they have one."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from fourbit.optim import AdamW
from fourbit.optim.schedule import SCHEDULES, rate_factor, scheduler

PEAK = 3.0


def rates(schedule, total, warmup=0, peak=1.0, **options):
    factors = (rate_factor(i, total=total, warmup=warmup, schedule=schedule, **options) for i in range(total + 1))
    return [peak * factor for factor in factors]


def theirs(make, steps):
    """The learning rates that a torch scheduler sets, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.data())
def test_rises_to_the_peak_and_never_above(schedule, total, data):
    warmup = data.draw(st.integers(0, total - 1))
    decay = data.draw(st.none() | st.integers(0, 2 * total))
    every = rates(schedule, total, warmup, 0.5, decay=decay)[:total]
    assert max(every) == every[warmup] == 0.5
    assert all(0 < a < b for a, b in pairwise(every[: warmup + 1]))
    assert all(a >= b > 0 for a, b in pairwise(every[warmup:]))


@pytest.mark.parametrize(
    "schedule, middle, end",
    [
        ("cosine", 0.5, 0.0),
        ("linear", 0.5, 0.0),
        ("constant", 1, 1),
        ("inverse-sqrt", math.sqrt(10 / 60), math.sqrt(10 / 110)),
        ("wsd", 1, 0),
    ],
)
def test_landmarks(schedule, middle, end):
    every = rates(schedule, 110, 10)
    assert every[0] == pytest.approx(1 / 11) and every[10] == 1
    assert every[60] == pytest.approx(middle) and every[110] == pytest.approx(end, abs=1e-12)


def test_wsd_stays_then_falls_along_a_line():
    every = rates("wsd", 100, 10, decay=20)
    assert every[10:81] == [1.0] * 71
    assert every[80:] == pytest.approx([1 - i / 20 for i in range(21)])
    assert rates("wsd", 100) == rates("wsd", 100, decay=10), "a tenth of the run"
    assert rates("wsd", 4)[:4] == [1.0] * 4, "a tenth of 4 steps is none: the run ends on the plateau"
    assert rates("wsd", 20, 10, decay=15) == rates("linear", 20, 10), "never before warm-up ends"


def test_inverse_sqrt_quarters_by_sixteen():
    every = rates("inverse-sqrt", 1600, 100)
    assert every[100] == 1 and every[400] == pytest.approx(1 / 2) and every[1600] == pytest.approx(1 / 4)
    assert rates("inverse-sqrt", 15)[15] == pytest.approx(1 / 4)
    assert rates("inverse-sqrt", 50, 5) == rates("inverse-sqrt", 90, 5)[:51]


@pytest.mark.parametrize(
    "schedule, warmup, make",
    [
        ("cosine", 0, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50)),
        ("linear", 0, lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=50)),
        ("constant", 0, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ("constant", 10, lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 11, end_factor=1.0, total_iters=10)),
    ],
)
def test_is_torchs(schedule, warmup, make):
    assert rates(schedule, 50, warmup, PEAK)[:50] == pytest.approx(theirs(make, 50), rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse-sqrt", "wsd"])
def test_is_transformers_after_warmup(schedule):
    """Theirs starts warm-up at zero, ours one step up; from its end on they are one."""
    optimization = pytest.importorskip("transformers.optimization")
    make = {
        "cosine": lambda o: optimization.get_cosine_schedule_with_warmup(o, 7, 50),
        "linear": lambda o: optimization.get_linear_schedule_with_warmup(o, 7, 50),
        "inverse-sqrt": lambda o: optimization.get_inverse_sqrt_schedule(o, 7),
        "wsd": lambda o: optimization.get_wsd_schedule(
            o, 7, 15, num_training_steps=50, decay_type="linear", min_lr_ratio=0.0
        ),
    }[schedule]
    assert rates(schedule, 50, 7, PEAK, decay=15)[7:50] == pytest.approx(theirs(make, 50)[7:], rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_a_torch_scheduler(schedule):
    """Two groups keep their ratio, and a saved scheduler goes on where it stopped."""
    make = lambda: AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 16.0)])
    options = {"total": 40, "warmup": 5, "schedule": schedule, "decay": 8}
    optimizer = make()
    schedule_of_steps = scheduler(optimizer, **options)
    for step in range(40):
        wanted = rate_factor(step, **options)
        assert [group["lr"] for group in optimizer.param_groups] == [wanted, 16 * wanted]
        if step == 20:
            saved, old = schedule_of_steps.state_dict(), optimizer.state_dict()
            optimizer = make()
            schedule_of_steps = scheduler(optimizer, **options)
            schedule_of_steps.load_state_dict(saved)
            optimizer.load_state_dict(old)
        optimizer.step()
        schedule_of_steps.step()


@pytest.mark.parametrize(
    "wrong", [{"schedule": "cosin"}, {"warmup": 0.1}, {"warmup": -1}, {"decay": 0.5, "schedule": "wsd"}]
)
def test_what_is_no_schedule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"schedule is one of cosine, linear, .*whole numbers of steps, got "):
        rate_factor(0, **{"total": 10, "warmup": 2} | wrong)
    with pytest.raises(ValueError, match="whole numbers of steps"):
        scheduler(torch.optim.SGD([torch.zeros(1)]), **{"total": 10, "warmup": 2} | wrong)
