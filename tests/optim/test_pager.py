"""The pager on a simulated device, whose copies only take effect when they are waited for, against flat tensors.

The update is a toy that depends on everything an update may depend on: element, step, and every tensor of the state.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import CopyError, SimulatedDevice
from torch import nn

from fourbit.errors import InputError
from fourbit.optim.paging import Pager, check_room, sizes
from fourbit.optim.state import CHUNK, Entry, FlatState, Moment, fields

MOMENTS = (Moment("mean", True), Moment("square", False))
PAGE = 8 * CHUNK  # bytes of a chunk of two fp32 moments
KINDS = [(torch.float32, 32), (torch.bfloat16, 8), (torch.float64, 32)]


def update(part, step):
    """In place, on those elements of a slice whose parameter has a gradient."""
    for entry, _, length, offset in part.state.segments(part.start, part.end):
        for number, (name, field) in enumerate(part.state.fields.items()) if entry.gradient is not None else ():
            first = (offset - part.start) // field.per
            values = part.tensors[name][first : first + -(-length // field.per)]
            index = torch.arange(len(values)) + offset // field.per
            values.copy_((values.double() * 3 + index + step * 7 + number).remainder(251))


class Twin:
    """One state paged and one kept whole, treated alike."""

    def __init__(self, pager, parts, dtype=torch.float32, bits=32):
        self.pager = pager
        self.paged, self.whole = (FlatState(0, dtype, bits, MOMENTS) for _ in range(2))
        self.join(parts)

    def join(self, parts):
        parameters = [nn.Parameter(torch.zeros(n, dtype=self.whole.dtype)) for n in parts]
        self.whole.tensors = self.whole.grown(parts, torch.device("cpu"))
        self.whole.join([Entry(p, 0, 0) for p in parameters], 0)
        self.pager.add(self.paged, self.paged.join([Entry(p, 0, 0) for p in parameters], 0))

    def want(self, places=None):
        for state in (self.paged, self.whole):
            for place, entry in enumerate(state.entries):
                entry.gradient = torch.zeros(1) if places is None or place in places else None

    def step(self, step, places=None):
        self.want(places)
        run(self.pager, [self], step)

    def check(self):
        found = {page_entry: page.state.empty(page_entry) for page in self.pager.pages for page_entry in page.entries}
        for part in self.pager.read():
            part.copy(found)
        for ours, theirs in zip(self.paged.entries, self.whole.entries, strict=True):
            for name, values in self.whole.views(theirs, torch.zeros(len(self.whole.entries))).items():
                assert name == "step" or torch.equal(found[ours][name], values), name


def run(pager, twins, step):
    for part in pager.visit():
        update(part, step)
    for twin in twins:
        update(twin.whole.unpaged(), step)


def ten(device, budget, pages=10):
    """A pager, and a twin of so many pages of one chunk each."""
    pager = Pager(device, budget)
    pager.page_bytes = PAGE
    return pager, Twin(pager, [CHUNK] * pages)


PARTS = st.lists(st.sampled_from([1, 255, 257, 3000, CHUNK, CHUNK + 1, 3 * CHUNK]), min_size=1, max_size=4)


@settings(max_examples=50)
@given(st.data())
def test_paged_equals_whole_under_every_budget(data):
    """Any page sizes, states, budgets from one page to everything, gradients present and missing, and disturbances."""
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    chunks = data.draw(st.integers(1, 3))
    largest = max(PAGE * chunks, *(sizes(fields(MOMENTS, b, d), CHUNK)[1] for d, b in kinds))
    device = SimulatedDevice(seed=data.draw(st.none() | st.integers(0, 99)))
    pager = Pager(device, 1)
    pager.page_bytes = PAGE * chunks
    pager.budget = data.draw(st.integers(largest, 30 * PAGE))
    twins = [Twin(pager, data.draw(PARTS), *kind) for kind in kinds]
    for step in range(data.draw(st.integers(1, 6))):
        for twin in twins:
            twin.want(data.draw(st.sets(st.integers(0, len(twin.paged.entries) - 1))))
        run(pager, twins, step)
        twin = data.draw(st.sampled_from(twins))
        match data.draw(st.sampled_from(["nothing", "read", "evict", "join"])):
            case "read":
                twin.check()
            case "evict":
                pager.evict_all()
                assert device.held == pager.held == 0
            case "join":
                twin.join(data.draw(PARTS))
    for twin in twins:
        twin.check()
    assert device.peak <= pager.budget
    assert pager.counters.peak_bytes == device.peak


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_counters_of_a_steady_step(seed):
    """Ten pages, room for two that stay and two in staging: eight stream in and out at every step."""
    device = SimulatedDevice(seed=seed)
    pager, twin = ten(device, 4 * PAGE)
    for step in range(3):
        twin.step(step)
    counters = pager.counters
    assert (counters.hits, counters.misses) == (6, 24)
    assert counters.bytes_out == 24 * PAGE
    assert counters.bytes_in == (24 + 2) * PAGE  # the first two of the next step are on their way
    assert counters.evictions == 26 - 2  # all but those in staging
    assert counters.peak_bytes == pager.held == 4 * PAGE
    assert counters.stall_seconds == device.stalled() == 24
    twin.check()


@pytest.mark.parametrize(
    ("budget", "pages"),
    [(PAGE, 1), (2 * PAGE - 1, 1), (2 * PAGE, 2), (4 * PAGE - 1, 3), (4 * PAGE, 4), (10 * PAGE - 1, 9)],
)
def test_a_byte_short_of_a_page_is_a_page_less(budget, pages):
    device = SimulatedDevice()
    _, twin = ten(device, budget)
    twin.step(0)
    assert device.held == device.peak == pages * PAGE


def test_everything_fits_and_nothing_is_copied():
    pager, twin = ten(SimulatedDevice(), "auto")
    for step in range(3):
        twin.step(step)
    c = pager.counters
    assert (c.bytes_in, c.bytes_out, c.misses, c.evictions, c.stall_seconds) == (0, 0, 0, 0, 0.0)
    assert c.hits == 3 * 10 and pager.held == sum(page.size for page in pager.pages)
    twin.check()


def test_pages_that_stay_keep_no_memory_of_the_host():
    """It would be out of date from their first update on."""
    device = SimulatedDevice(capacity=4 * PAGE)
    pager, twin = ten(device, "auto")
    twin.step(0)
    twin.step(1)
    assert pager.host_bytes() == 8 * PAGE
    device.capacity = 100 * PAGE
    for step in (2, 3):
        twin.step(step)
        assert pager.host_bytes() == 0
    twin.check()
    pager.evict_all()
    assert pager.host_bytes() == 10 * PAGE
    twin.check()


def test_budget_below_a_page_names_the_least():
    kept = fields(MOMENTS, 32, torch.float32)
    with pytest.raises(InputError, match=f"budget of {PAGE - 1} bytes is less than one page .* least is {PAGE}"):
        check_room(PAGE - 1, [(kept, 10), (kept, 2 * CHUNK)])
    check_room(PAGE, [(kept, 10), (kept, 2 * CHUNK)])
    check_room(96, [(kept, 10)])


class TestAuto:
    def test_keeps_what_fits_and_gives_pages_back(self):
        device = SimulatedDevice(capacity=12 * PAGE)
        pager, twin = ten(device, "auto")
        held = []
        for step, others in enumerate([0, 7, 4, 10, 2]):
            device.others = others * PAGE
            twin.step(step)
            held.append(pager.held // PAGE)
        assert held == [10, 5, 8, 2, 10]  # never less than two: it would be slower still
        twin.check()

    def test_takes_less_where_memory_is_not_to_be_had(self):
        device = SimulatedDevice(capacity=5 * PAGE)
        pager, twin = ten(device, "auto")
        device.room = lambda held: 100 * PAGE  # says there is much
        twin.step(0)
        assert pager.held <= 5 * PAGE
        twin.step(1)
        twin.check()

    def test_goes_down_to_one_frame_and_then_raises(self):
        device = SimulatedDevice(capacity=PAGE)
        pager, twin = ten(device, "auto")
        twin.step(0)
        assert pager.held == PAGE
        twin.check()
        pager.evict_all()
        device.capacity = PAGE - 1
        with pytest.raises(torch.OutOfMemoryError):
            twin.step(1)
        twin.check()

    def test_one_step_on_one_frame_does_not_bind_the_next(self):
        device = SimulatedDevice(capacity=PAGE)
        pager, twin = ten(device, "auto")
        for step, (room, held) in enumerate([(1, 1), (20, 10)]):
            device.capacity = room * PAGE
            twin.step(step)
            assert pager.held == held * PAGE
        twin.check()

    def test_takes_half_after_it_had_to_leave(self):
        pager, twin = ten(SimulatedDevice(capacity=12 * PAGE), "auto")
        for step, held in enumerate([10, 5, 2, 2]):
            twin.step(step)
            assert pager.held == held * PAGE
            assert pager.evict_all() == held * PAGE
            assert pager.held == 0
        twin.check()


class TestFailedCopies:
    @settings(max_examples=50)
    @given(st.data())
    def test_raises_and_loses_no_state(self, data):
        """Every page is as it was before the step or as it is after it, and steps go on when copies work again."""
        device = SimulatedDevice(seed=data.draw(st.none() | st.integers(0, 99)))
        pager, twin = ten(device, PAGE * data.draw(st.integers(1, 9)), pages=8)
        for step in range(2):
            twin.step(step)
        device.fail_copy(data.draw(st.integers(0, 20)))
        done = set()
        try:
            for part in pager.visit():
                update(part, 2)
                done.add(part.start // CHUNK)
            if data.draw(st.booleans()):
                pager.evict_all()
        except CopyError:
            pass
        device.fail_copy(10**9)
        twin.want(done)
        update(twin.whole.unpaged(), 2)
        if data.draw(st.booleans()):
            twin.check()  # else the next step is the first to look
        for step in range(3, 5):
            twin.step(step, data.draw(st.sets(st.integers(0, 7))))
        twin.check()
        assert device.peak <= pager.budget

    def test_every_copy_of_a_step_can_fail(self):
        """The message is the copy's own, whichever it was; a step that failed after its last page has been done."""
        for number in range(16):
            device = SimulatedDevice()
            pager, twin = ten(device, 2 * PAGE, pages=8)
            twin.step(0)
            device.fail_copy(number)
            with pytest.raises(CopyError, match="injected: copy"):
                for _part in pager.visit():
                    pass
            twin.check()

    def test_caller_that_stops_half_way(self):
        pager, twin = ten(SimulatedDevice(), 2 * PAGE, pages=8)
        twin.step(0)
        parts = pager.visit()
        for _ in range(3):
            next(parts)
        parts.close()
        twin.check()
        twin.step(1)
        twin.check()


class Forgetful(SimulatedDevice):
    """A device that does not carry out one kind of wait, as if the pager had forgotten to ask for it."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets = forgets

    def wait(self, event):
        if self.forgets != "compute waits for arrival":
            super().wait(event)

    def copy(self, direction, target, source, after):
        mark, *rest = after
        if self.forgets == "copy out waits for the update" and direction == "out":
            after = []
        if self.forgets == "copy in waits for who had the memory" and direction == "in" and not rest:
            after = []
        if self.forgets == "copy in waits for the copy out" and direction == "in":
            after = [mark]
        return super().copy(direction, target, source, after)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    "forgets",
    [
        "nothing",
        "compute waits for arrival",
        "copy out waits for the update",
        "copy in waits for who had the memory",
        "copy in waits for the copy out",
    ],
)
def test_each_wait_is_needed(forgets, frames):
    """Without it numbers are wrong: the simulation would show a pager that forgot one."""
    _, twin = ten(Forgetful(forgets), frames * PAGE, pages=5)
    for step in range(3):
        twin.step(step)
    if forgets == "nothing":
        twin.check()
    else:
        with pytest.raises(AssertionError):
            twin.check()


def test_misuse_is_refused():
    pager, twin = ten(SimulatedDevice(), 2 * PAGE)
    twin.want()
    parts = pager.visit()
    next(parts)
    with pytest.raises(RuntimeError, match="cannot be evicted while a step visits them"):
        pager.evict_all()
    with pytest.raises(RuntimeError, match="one step after the other"):
        next(pager.visit())
