"""AdamW and Lion under every budget: the same weights, the same state dict, bit for bit, and never more memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_tools import assert_equal, give_gradients
from simulated_device import CopyError, SimulatedDevice
from torch import nn

from fourbit.errors import InputError
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.page_device import CudaDevice
from fourbit.optim import AdamW, Lion, optimizer
from fourbit.optim.paging import IDLE, Pager
from fourbit.optim.state import CHUNK

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 63, 255, 256, 257, 4095, 4096, 4097, 9000]


def device_for(seed):
    return CudaDevice(DEVICE) if DEVICE.type == "cuda" else SimulatedDevice(seed=seed)


@pytest.fixture
def devices(monkeypatch):
    """The devices made for pagers, the last one last."""
    made = []
    monkeypatch.setattr(optimizer, "make_device", lambda *_: made.append(device_for(len(made))) or made[-1])
    return made


def peak(some):
    return some.pager.counters.peak_bytes


def weights_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape, dtype in shapes]


@pytest.mark.parametrize("kind", [AdamW, Lion])
@pytest.mark.parametrize("bits", [32, 8])
@settings(max_examples=25)
@given(data=st.data())
def test_paged_equals_unpaged(kind, bits, data):
    """Over page sizes, budgets from the least to everything, shapes, dtypes, gradients present and missing, steps that
    are skipped, and a group that comes in mid-run."""
    shapes = data.draw(
        st.lists(st.tuples(st.sampled_from(SIZES).map(lambda n: (n,)), st.sampled_from(DTYPES)), max_size=6)
    )
    shapes.append(((3 * CHUNK + 5,), torch.bfloat16))
    twins = [weights_of(shapes), weights_of(shapes)]
    options = {"lr": 0.1, "weight_decay": 0.1, "bits": bits, "max_grad_norm": data.draw(st.sampled_from([None, 1.0]))}
    options["rounding"] = data.draw(st.sampled_from(["stochastic", "nearest"]))
    whole = kind(twins[0], **options)
    everything = sum((p.numel() + CHUNK) * 16 for p in twins[0])
    least = CHUNK * (8 if bits == 32 else 9) * (2 if any(d == torch.float64 for _, d in shapes) else 1)
    budget = data.draw(st.integers(least, everything) | st.sampled_from([least, everything]))
    paged = kind(twins[1], **options, budget=budget)
    paged.pager = Pager(device_for(data.draw(st.none() | st.integers(0, 99))), budget)
    if budget > 4 * least:
        paged.pager.page_bytes *= data.draw(st.integers(1, 3))
    late = data.draw(st.integers(1, 4))
    missing = lambda _: data.draw(st.sets(st.integers(0, len(shapes) - 1)))
    for step in range(data.draw(st.integers(1, 4))):
        if step == late:
            for weights, some in zip(twins, (whole, paged), strict=True):
                weights += weights_of(shapes[-1:], seed=1)
                some.add_param_group({"params": weights[-1:], "lr": 0.01})
        give_gradients(*twins, seed=step, missing=missing(step))
        whole.found_inf = paged.found_inf = data.draw(st.sampled_from([None, torch.zeros(()), torch.ones(())]))
        whole.step()
        paged.step()
        if data.draw(st.booleans()):
            paged.evict_all()
        assert_equal([p.detach() for p in twins[1]], [p.detach() for p in twins[0]])
    assert_equal(paged.state_dict(), whole.state_dict())
    assert peak(paged) <= budget


SHAPES = [((33, 400), torch.float32), ((100, 90), torch.bfloat16), ((7,), torch.float32), ((64, 128), torch.float32)]
BUDGETS = [None, "auto", 8 * CHUNK, 20 * CHUNK, 45 * CHUNK]


@pytest.mark.parametrize("kind", [AdamW, Lion])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("before", BUDGETS)
@pytest.mark.parametrize("after", BUDGETS)
def test_resume_is_exact_with_any_budget_on_either_side(devices, kind, bits, before, after):
    twins = [weights_of(SHAPES), weights_of(SHAPES)]
    straight, first = kind(twins[0], 0.1, bits=bits), kind(twins[1], 0.1, bits=bits, budget=before)
    for step in range(2):
        give_gradients(*twins, seed=step, missing={step})
        straight.step()
        first.step()
    saved = copy.deepcopy(first.state_dict())
    assert_equal(saved, straight.state_dict())
    second = kind(twins[1], 0.7, bits=bits, budget=after)
    second.load_state_dict(saved)
    assert_equal(second.state_dict(), saved)
    for step in range(2, 4):
        give_gradients(*twins, seed=step, missing={step})
        straight.step()
        second.step()
    assert_equal([p.detach() for p in twins[1]], [p.detach() for p in twins[0]])
    assert_equal(second.state_dict(), straight.state_dict())
    assert len(devices) == sum(budget is not None for budget in (before, after))
    assert all(peak(some) <= some.budget for some in (first, second) if isinstance(some.budget, int))


@pytest.mark.parametrize("kind", [AdamW, Lion])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("path", ["triton", "reference"])
def test_paged_kernels_equal_unpaged_ones(devices, kind, bits, path):
    """A launch for each page against one launch, with clipping, missing gradients and stochastic rounding."""
    shapes = [((3, 5), torch.float32), ((2 * CHUNK + 300,), torch.bfloat16), ((CHUNK, 2), torch.float32)]
    twins = [weights_of(shapes), weights_of(shapes)]
    options = {"bits": bits, "min_8bit_size": 0, "max_grad_norm": 1.0}
    page = (CHUNK * 4 if bits == 32 else CHUNK + CHUNK // 64) * (2 if kind is AdamW else 1)
    whole, paged = kind(twins[0], 0.1, **options), kind(twins[1], 0.1, **options, budget=3 * page)
    if path == "triton":
        pytest.importorskip("triton")
    with force_path(path):
        for step in range(3):
            give_gradients(*twins, seed=step, missing={step})
            whole.step()
            paged.step()
    assert_equal([p.detach() for p in twins[1]], [p.detach() for p in twins[0]])
    assert_equal(paged.state_dict(), whole.state_dict())
    assert paged.pager.counters.misses >= 3
    assert peak(paged) <= 3 * page


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the simulated device tells what is queued")
def test_no_copy_is_under_way_into_memory_that_is_given_back(devices):
    """A pager that is dropped waits for its copies, since its memory may be another's at once."""
    weights = weights_of(SHAPES)
    paged = AdamW(weights, budget=20 * CHUNK)
    for step in range(2):
        give_gradients(weights, seed=step)
        paged.step()
    pager = paged.pager
    assert pager.device.queued() > 0 and pager.held > 0
    paged.load_state_dict(paged.state_dict())
    assert pager.device.queued() == pager.device.held == pager.held == 0
    assert paged.pager is not pager
    give_gradients(weights, seed=2)
    paged.step()
    assert paged.pager.held > 0


def test_only_parameters_without_elements(devices):
    weight = nn.Parameter(torch.zeros(0, 3, device=DEVICE))
    weight.grad = torch.zeros_like(weight)
    paged = AdamW([weight], budget="auto")
    paged.step()
    paged.step()
    assert paged.state_dict()["state"][0]["exp_avg"].shape == (0, 3) and paged.evict_all() == 0


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the simulated device fails when it is told to")
def test_a_failed_copy_raises_and_weights_and_moments_stay_together(devices):
    """Each element has taken the step, weight and moments, or has not; another step goes on from there."""
    for number in range(12):
        weights, done, undone = weights_of(SHAPES[:1]), weights_of(SHAPES[:1]), weights_of(SHAPES[:1])
        paged = AdamW(weights, 0.1, budget=16 * CHUNK)
        twins = [AdamW(done, 0.1), AdamW(undone, 0.1)]
        give_gradients(weights, done, undone, seed=0)
        for some in (paged, *twins):
            some.step()
        give_gradients(weights, done, seed=1)
        twins[0].step()
        devices[-1].fail_copy(number)
        with pytest.raises(CopyError):
            for _ in range(12):
                paged.step()
                done = None  # it failed after this step
        if done is None:
            continue
        state = paged.state_dict()["state"][0]
        after, before = (twin.state_dict()["state"][0] for twin in twins)
        moved = weights[0].detach() == done[0].detach()
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], torch.where(moved, after[name], before[name]))
        assert torch.equal(weights[0].detach(), torch.where(moved, done[0].detach(), undone[0].detach()))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_auto_keeps_all_while_there_is_room(devices, kind, bits):
    """All state on the device then; none once it is evicted."""
    weights = weights_of(SHAPES)
    some = kind(weights, 0.1, bits=bits, budget="auto")
    give_gradients(weights, seed=0)
    some.step()
    pager = some.pager
    assert pager.counters.misses == 0
    assert some.evict_all() == pager.counters.peak_bytes > 0
    assert pager.held == 0
    some.step()
    assert pager.counters.misses > 0


def test_budgets_that_cannot_be():
    for budget in (0, -3, "most", 2.5):
        with pytest.raises(InputError, match='"auto" or a positive number of bytes'):
            AdamW(weights_of(SHAPES), budget=budget)
    weights = weights_of(SHAPES)
    give_gradients(weights, seed=0)
    with pytest.raises(InputError, match=f"less than one page of state; the least is {8 * CHUNK}"):
        AdamW(weights, budget=8 * CHUNK - 1).step()


def test_what_steps_leave_alone_makes_room_for_what_they_touch():
    """Of 8 adapters one optimizer trains two from some step on: their pages become resident, the others wait."""
    budget = 9 * CHUNK * 8  # nine pages of twenty-four
    ours, theirs = (weights_of([((CHUNK,), torch.float32), ((CHUNK + 3,), torch.float32)] * 8) for _ in range(2))
    paged, plain = AdamW(ours, lr=0.1, budget=budget), AdamW(theirs, lr=0.1)
    paged.pager = pager = Pager(device_for(0), budget)
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
