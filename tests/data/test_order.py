"""The order of examples: each once an epoch, and any step known without the steps before it."""

import os
import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.data.order import _epoch_order, step_indices, steps_per_epoch

SIZES = st.integers(1, 60)
BATCHES = st.integers(1, 17)
SEEDS = st.integers(-(2**70), 2**70)


@given(SIZES, BATCHES, SEEDS, st.integers(0, 3))
def test_every_example_comes_once_an_epoch(n: int, batch: int, seed: int, epoch: int) -> None:
    per = steps_per_epoch(n, batch)
    steps = [step_indices(n, batch, epoch * per + k, seed) for k in range(per)]
    assert sorted(i for step in steps for i in step) == list(range(n))
    assert all(len(step) == batch for step in steps[:-1])
    assert len(steps[-1]) == n - batch * (per - 1)


@given(SIZES, BATCHES, SEEDS, st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_step_depends_on_its_number_alone(n: int, batch: int, seed: int, steps: list[int]) -> None:
    """Asked in any order, with others in between: a resumed run gets what the first run got."""
    alone = {step: step_indices(n, batch, step, seed) for step in sorted(steps)}
    for step in steps:
        torch.rand(1)
        step_indices(n + 1, batch, step, seed)
        assert step_indices(n, batch, step, seed) == alone[step]


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    step_indices(50, 8, 3, 1)
    assert torch.equal(torch.rand(1), expected)


def test_torchs_default_device_changes_nothing() -> None:
    _epoch_order.cache_clear()
    with torch.device("meta"):
        order = step_indices(37, 37, 0, 11)
    _epoch_order.cache_clear()
    assert order == step_indices(37, 37, 0, 11)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(step_indices(50, 50, epoch, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25 and tuple(range(50)) not in orders


def test_the_batch_size_does_not_change_an_epochs_order() -> None:
    whole = step_indices(10, 10, 1, 7)
    assert [i for k in range(4, 8) for i in step_indices(10, 3, k, 7)] == whole


def test_another_process_gives_the_same_order() -> None:
    code = "from fourbit.data.order import _epoch_order, step_indices; print(step_indices(1000, 7, 300, 5))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.strip() == str(step_indices(1000, 7, 300, 5))


def test_a_shuffle_is_fair() -> None:
    """Over 2,000 seeds each of 4 examples leads an epoch 500 times, give or take 5 deviations of 19.4."""
    first = [step_indices(4, 1, 0, seed)[0] for seed in range(2000)]
    assert all(abs(first.count(i) - 500) < 97 for i in range(4))


def test_steps_per_epoch() -> None:
    assert [steps_per_epoch(n, 4) for n in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]
