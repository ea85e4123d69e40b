"""Optimizers that share one budget, and parameters that steps leave alone: the same bits, never more memory."""

import pytest
import torch
from optim_tools import assert_equal, give_gradients
from simulated_device import SimulatedDevice
from torch import nn

from fourbit.optim import AdamW
from fourbit.optim.paging import IDLE, Pager
from fourbit.optim.state import CHUNK

PAGE = CHUNK * 8  # bytes of a page of one chunk: two fp32 moments
FEW = [(CHUNK,), (CHUNK + 3,)]  # of an adapter: three pages


def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in FEW]


def pager_of(pages, seed=0):
    return Pager(SimulatedDevice(seed=seed), pages * PAGE)


@pytest.mark.parametrize("pages", [1, 5, 40])
def test_optimizers_that_share_a_budget_step_as_with_one_of_their_own(pages):
    """Eight take turns, of which each step touches a few; state is saved, loaded and dropped on the way."""
    options = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0}
    pager = pager_of(pages)
    ours, theirs = [weights() for _ in range(8)], [weights() for _ in range(8)]
    paged = [AdamW(some, **options, budget=pager) for some in ours]
    plain = [AdamW(some, **options) for some in theirs]
    for step in range(12):
        for i in {step % 8, (3 * step) % 8, 7}:
            give_gradients(ours[i], theirs[i], seed=9 * step + i, missing=[1] if step % 4 == 2 else [])
            paged[i].step(), plain[i].step()
            assert pager.held <= pager.budget
        if step == 5:
            paged[7].load_state_dict(plain[7].state_dict())
            paged[0].load_state_dict(paged[0].state_dict())
        if step == 8:
            pager.evict_all()
    for i in range(8):
        assert_equal([p.data for p in ours[i]], [p.data for p in theirs[i]])
        assert_equal(paged[i].state_dict(), plain[i].state_dict())
    assert pager.counters.peak_bytes <= pages * PAGE
    assert {id(p.state) for p in pager.pages} == {id(state) for some in paged for state in some._states.values()}


def test_a_state_that_does_not_fit_leaves_the_others_pages_alone():
    pager = pager_of(4)
    some, other = (AdamW(weights(), budget=pager) for _ in range(2))
    for each in (some, other):
        give_gradients(each.param_groups[0]["params"], seed=1)
        each.step()
    before, pages = other.state_dict(), list(pager.pages)
    wrong = some.state_dict()
    wrong["state"][1]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError):
        some.load_state_dict(wrong)
    assert pager.pages == pages
    some.load_state_dict(some.state_dict())
    assert len(pager.pages) == len(pages)
    assert_equal(other.state_dict(), before)


def test_what_steps_leave_alone_makes_room_for_what_they_touch():
    """Of 8 adapters one optimizer trains two from some step on: their pages become resident, the others wait."""
    ours, theirs = ([p for _ in range(8) for p in weights()] for _ in range(2))
    paged, plain = AdamW(ours, lr=0.1, budget=9 * PAGE), AdamW(theirs, lr=0.1)
    paged.pager = pager = pager_of(9)
    few = {4, 5}  # the third adapter: pages in the middle of the table
    for step in range(3 + IDLE * 24):
        give_gradients(ours, theirs, seed=step, missing=[] if step < 3 else [i for i in range(16) if i not in few])
        paged.step(), plain.step()
        assert pager.held <= pager.budget
    assert_equal([p.data for p in ours], [p.data for p in theirs])
    assert all(page.resident for page in pager.pages if page.entries[0].number in few)
    misses = pager.counters.misses
    give_gradients(ours, theirs, seed=99, missing=[i for i in range(16) if i not in few])
    paged.step()
    assert pager.counters.misses == misses
