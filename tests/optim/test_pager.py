"""The pager on a simulated device, whose copies only take effect when they are waited for, against flat tensors.

The update is a toy that depends on everything an update may depend on: element, step, and every tensor of the state.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.errors import InputError
from fourbit.optim.pager import Pager
from fourbit.optim.pages import Page
from fourbit.optim.simulated_device import CopyError, SimulatedDevice
from fourbit.optim.states import Field, Resident

FULL = {"mean": Field(torch.float32, 1), "square": Field(torch.float32, 1)}
EIGHT = {
    "mean": Field(torch.uint8, 1),
    "mean_absmax": Field(torch.float32, 256),
    "square": Field(torch.uint8, 1),
    "square_absmax": Field(torch.float32, 256),
}
DOUBLE = {"mean": Field(torch.float64, 1)}
KINDS = {"full": FULL, "eight": EIGHT, "double": DOUBLE}


def update(part, wanted, fields, step):
    """In place, on those elements of a slice that are wanted."""
    for start, end in wanted:
        low, high = max(start, part.start), min(end, part.end)
        if low >= high:
            continue
        for number, (name, field) in enumerate(fields.items()):
            cut = slice((low - part.start) // field.per, (high - part.start) // field.per)
            index = torch.arange(low // field.per, high // field.per)
            values = part.tensors[name][cut]
            values.copy_((values.double() * 3 + index + step * 7 + number).remainder(251))


class Twin:
    """One state paged and one kept whole, treated alike."""

    def __init__(self, pager, fields, page_elements, total):
        self.fields = fields
        self.paged, self.whole = pager.state(fields, page_elements), Resident(fields, torch.device("cpu"))
        self.grow(total)

    def grow(self, total):
        self.total = total
        self.whole.grow(total)
        self.paged.grow(total)

    def step(self, wanted, step):
        for storage in (self.whole, self.paged):
            for part in storage.slices(wanted):
                update(part, wanted, self.fields, step)

    def write(self, start, end, seed):
        for name, field in self.fields.items():
            values = torch.randint(251, ((end - start) // field.per,), generator=torch.Generator().manual_seed(seed))
            for storage in (self.whole, self.paged):
                storage.write(start, {name: values.to(field.dtype)})

    def check(self, start=0, end=None):
        theirs, ours = (s.read([(start, self.total if end is None else end)])[0] for s in (self.whole, self.paged))
        for name in self.fields:
            assert torch.equal(ours[name], theirs[name]), name


@st.composite
def spans(draw, total):
    """Ascending spans of whole blocks, with gaps: parameters without gradients."""
    cuts = sorted(draw(st.sets(st.integers(0, total // 256), max_size=6)))
    return [(256 * a, 256 * b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]


@given(st.data())
def test_paged_equals_whole_under_every_budget(data):
    """Any page sizes, states, budgets from one page to everything, gradients present and missing, and disturbances."""
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3))
    totals = [256 * data.draw(st.integers(1, 24)) for _ in kinds]
    pages = [256 * data.draw(st.integers(1, 6)) for _ in kinds]
    page_sizes = [Page(0, elements, KINDS[kind]).size for kind, elements in zip(kinds, pages, strict=True)]
    everything = sum(Page(0, total, KINDS[kind]).size for kind, total in zip(kinds, totals, strict=True))
    budget = data.draw(st.integers(max(page_sizes), max(page_sizes) + everything))
    device = SimulatedDevice(seed=data.draw(st.none() | st.integers(0, 99)))
    pager = Pager(device, budget)
    twins = [Twin(pager, KINDS[k], p, t) for k, p, t in zip(kinds, pages, totals, strict=True)]
    for step in range(data.draw(st.integers(1, 6))):
        for twin in twins:
            twin.step(data.draw(spans(twin.total)), step)
        twin = data.draw(st.sampled_from(twins))
        match data.draw(st.sampled_from(["nothing", "read", "evict", "write", "grow"])):
            case "read":
                start, end = sorted(data.draw(st.tuples(*2 * [st.integers(0, twin.total // 256)])))
                twin.check(256 * start, 256 * end)
            case "evict":
                pager.evict_all()
                assert device.held == pager.held == 0
            case "write":
                start = data.draw(st.integers(0, twin.total // 256 - 1))
                twin.write(256 * start, 256 * data.draw(st.integers(start + 1, twin.total // 256)), step)
            case "grow":
                twin.grow(twin.total + 256 * data.draw(st.integers(0, 5)))
    for twin in twins:
        twin.check()
    assert device.peak <= budget
    assert pager.counters.peak_bytes == device.peak


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_counters_of_a_steady_step(seed):
    """Ten pages, room for two that stay and two in staging: eight stream in and out at every step."""
    device = SimulatedDevice(seed=seed)
    pager = Pager(device, 4 * 2048)
    twin = Twin(pager, FULL, 256, 2560)
    for step in range(3):
        twin.step([(0, 2560)], step)
    counters = pager.counters
    assert (counters.hits, counters.misses) == (6, 24)
    assert counters.bytes_out == 24 * 2048
    assert counters.bytes_in == (24 + 2) * 2048  # the first two of the next step are on their way
    assert counters.evictions == 26 - 2  # all but those in staging
    assert counters.peak_bytes == pager.held == 4 * 2048
    assert counters.stall_seconds == device.stalled() > 0
    twin.check()


def test_learns_the_order_of_states():
    """From the second step on nothing is fetched that the step does not want next."""
    pager = Pager(SimulatedDevice(), 3 * 2048)
    twins = [Twin(pager, FULL, 256, 1024) for _ in range(3)]
    moved = []
    for step in range(5):
        before = pager.counters.bytes_in
        for i in (2, 1, 0):
            twins[i].step([(0, 1024)], step)
        moved.append((pager.counters.bytes_in - before) // 2048)
    assert moved[2:] == 3 * [12 - 1]
    for twin in twins:
        twin.check()


@pytest.mark.parametrize(("budget", "pages"), [(2048, 1), (4095, 1), (4096, 2), (8191, 3), (8192, 4), (20479, 9)])
def test_a_byte_short_of_a_page_is_a_page_less(budget, pages):
    device = SimulatedDevice()
    twin = Twin(Pager(device, budget), FULL, 256, 2560)
    twin.step([(0, 2560)], 0)
    assert device.held == device.peak == pages * 2048


def test_everything_fits_and_nothing_is_copied():
    pager = Pager(SimulatedDevice(), "auto")
    twin = Twin(pager, EIGHT, 512, 2304)
    for step in range(3):
        twin.step([(0, 2304)], step)
    c = pager.counters
    assert (c.bytes_in, c.bytes_out, c.misses, c.evictions, c.stall_seconds) == (0, 0, 0, 0, 0.0)
    assert c.hits == 3 * 5 and pager.held == sum(page.size for page in pager.pages)
    twin.check()


def test_next_pages_are_fetched_before_the_next_step():
    """So the first pages of a step arrive during forward and backward, and it stalls less than with one slot."""
    stalls = {}
    for slots in (1, 2):
        device = SimulatedDevice(bandwidth=2048.0)  # a page takes a second
        twin = Twin(Pager(device, slots * 2048), FULL, 256, 2048)
        for step in range(4):
            device.work(30.0)  # forward and backward
            before = device.stalled()
            twin.step([(0, 2048)], step)
        stalls[slots] = device.stalled() - before
    assert stalls == {1: 14.0, 2: 7.0}  # for seven pages out and in, or for six out beside in


def test_reading_many_spans_brings_each_page_once():
    """Not a page for every parameter in it; and the copies are the bytes that were asked for."""
    pager = Pager(SimulatedDevice(), 4 * 2048)
    twin = Twin(pager, EIGHT, 1024, 256 * 40)
    twin.step([(0, twin.total)], 0)
    read = []
    whole = pager.read
    pager.read = lambda page: read.append(page.number) or whole(page)
    spans = [(256 * i, 256 * (i + 1 + i % 2)) for i in (0, 1, 3, 4, 5, 7, 8, 14, 15, 17, 30)]
    spans.insert(3, (1024, 1024))
    found, expected = twin.paged.read(spans), twin.whole.read(spans)
    assert read == [0, 1, 2, 3, 4, 7]
    for ours, theirs in zip(found, expected, strict=True):
        for name in EIGHT:
            assert torch.equal(ours[name], theirs[name])
            assert ours[name].untyped_storage().nbytes() == ours[name].nbytes


@given(st.data())
def test_pages_that_a_step_needs(data):
    """Those that a span overlaps; also when the spans change from step to step, or the state grows."""
    pager = Pager(SimulatedDevice(), "auto")
    state = pager.state(FULL, 256 * data.draw(st.integers(1, 4)))
    total = 0
    for _ in range(4):
        total += 256 * data.draw(st.integers(0, 12))
        state.grow(total)
        wanted = data.draw(spans(total))
        for _ in range(2):
            seen = [(part.start, part.end) for part in state.slices(list(wanted))]
            pages = [(page.start, page.end) for page in state.pages]
            assert seen == [(a, b) for a, b in pages if any(start < b and a < end for start, end in wanted)]


def test_pages_that_stay_keep_no_memory_of_the_host():
    """It would be out of date from their first update on."""
    device = SimulatedDevice(capacity=2048 * 4)
    pager = Pager(device, "auto")
    twin = Twin(pager, FULL, 256, 2560)
    hosts = lambda: sum(page.host is not None for page in pager.pages)  # noqa: E731
    twin.step([(0, 2560)], 0)
    twin.step([(0, 2560)], 1)
    assert hosts() == 8
    device.capacity = 2048 * 100
    for step in (2, 3):
        twin.step([(0, 2560)], step)
        assert hosts() == 0
    twin.check()
    pager.evict_all()
    assert hosts() == 10
    twin.check()


def test_a_copy_that_fails_while_a_state_grows_loses_nothing():
    """The last page, short so far, is made anew: it must not be forgotten before it has been read."""
    device = SimulatedDevice()
    pager = Pager(device, 8192)
    twin = Twin(pager, FULL, 1024, 256 * 5)
    device.fail_copy(3, late=True)  # page 0 in and out, page 1 in and out
    twin.step([(0, twin.total)], 0)
    with pytest.raises(CopyError):
        twin.paged.grow(256 * 7)
    twin.check()
    twin.grow(256 * 7)
    twin.check()


def test_a_pager_that_is_closed_has_nothing_under_way():
    device = SimulatedDevice()
    twin = Twin(pager := Pager(device, 3 * 2048), FULL, 256, 2560)
    twin.step([(0, 2560)], 0)
    assert device.queued() > 0
    counters = pager.counters
    other = pager.renewed()
    pager.close()
    assert device.queued() == device.held == pager.held == 0
    assert other.counters is counters and other.device is device and other.budget == pager.budget and not other.pages


def test_budget_below_a_page_names_the_least():
    pager = Pager(SimulatedDevice(), 2047)
    with pytest.raises(InputError, match="budget of 2047 bytes is less than one page of state; the least is 2048"):
        pager.state(FULL, 256).grow(512)
    for budget in (0, -1, 1.5, "half", None):
        with pytest.raises(InputError, match='"auto" or a positive number of bytes'):
            Pager(SimulatedDevice(), budget)


class TestAuto:
    def pager(self, capacity):
        device = SimulatedDevice(capacity=capacity)
        pager = Pager(device, "auto")
        return device, pager, Twin(pager, FULL, 256, 2560)

    def test_keeps_what_fits_and_gives_pages_back(self):
        device, pager, twin = self.pager(capacity=2048 * 12)
        held = []
        for step, others in enumerate([0, 7, 4, 12, 2]):
            device.others = min(others, 12) * 2048 if others < 12 else 2048 * 10
            twin.step([(0, 2560)], step)
            held.append(pager.held // 2048)
        assert held == [10, 5, 8, 2, 10]  # never less than two: it would be slower still
        twin.check()

    def test_takes_less_where_memory_is_not_to_be_had(self):
        device, pager, twin = self.pager(capacity=2048 * 5)
        device.room = lambda held: 2048 * 100  # says there is much
        twin.step([(0, 2560)], 0)
        assert pager.held <= 2048 * 5
        twin.step([(0, 2560)], 1)
        twin.check()

    def test_goes_down_to_one_slot_and_then_raises(self):
        device, pager, twin = self.pager(capacity=2048)
        twin.step([(0, 2560)], 0)
        assert pager.held == 2048
        twin.check()
        pager.evict_all()
        device.capacity = 2000
        with pytest.raises(torch.OutOfMemoryError):
            list(twin.paged.slices([(0, 2560)]))
        twin.check()

    def test_takes_half_after_it_had_to_leave(self):
        _device, pager, twin = self.pager(capacity=2048 * 12)
        for step, held in enumerate([10, 5, 2, 2]):
            twin.step([(0, 2560)], step)
            assert pager.held == held * 2048
            assert pager.evict_all() == held * 2048
            assert pager.held == 0
        twin.check()


class TestFailedCopies:
    @given(st.data())
    def test_raises_and_loses_no_state(self, data):
        """Every page is as it was before the step or as it is after it, and steps go on when copies work again."""
        device = SimulatedDevice(seed=data.draw(st.none() | st.integers(0, 99)))
        pager = Pager(device, 2048 * data.draw(st.integers(1, 9)))
        twin = Twin(pager, FULL, 256, 256 * 8)
        whole = [(0, twin.total)]
        for step in range(2):
            twin.step(whole, step)
        device.fail_copy(data.draw(st.integers(0, 20)), late=data.draw(st.booleans()))
        done = []
        try:
            for part in twin.paged.slices(whole):
                update(part, whole, FULL, 2)
                done.append((part.start, part.end))
            if data.draw(st.booleans()):
                pager.evict_all()
            else:
                twin.paged.read([(0, twin.total)])
        except CopyError:
            pass
        device.fail_copy(10**9)
        for part in twin.whole.slices(whole):
            update(part, done, FULL, 2)
        if data.draw(st.booleans()):
            twin.check()  # else the next step is the first to look
        for step in range(3, 5):
            twin.step(data.draw(spans(twin.total)), step)
        twin.check()
        assert device.peak <= pager.budget

    def test_every_copy_of_a_step_can_fail(self):
        """The message is the copy's own, whichever it was; late failures show by the next step at the latest."""
        for late in (False, True):
            for number in range(16):
                device = SimulatedDevice()
                twin = Twin(Pager(device, 2 * 2048), FULL, 256, 256 * 8)
                twin.step([(0, twin.total)], 0)
                device.fail_copy(number, late)
                with pytest.raises(CopyError, match="injected: copy"):
                    for _ in range(2):
                        for _part in twin.paged.slices([(0, twin.total)]):
                            pass
                twin.check()

    def test_a_page_that_was_fetched_in_vain(self):
        """Its failure shows when the page is looked at, once."""
        for number in (15, 17):  # the copies that bring pages 0 and 1 for the next step
            device = SimulatedDevice()
            twin = Twin(Pager(device, 2 * 2048), FULL, 256, 256 * 8)
            device.fail_copy(number, late=True)
            twin.step([(0, twin.total)], 0)
            twin.step([(256 * 4, 256 * 8)], 1)  # other pages take their places
            with pytest.raises(CopyError):
                twin.paged.read([(0, twin.total)])
            twin.check()
            twin.step([(0, twin.total)], 2)
            twin.check()

    def test_caller_that_stops_half_way(self):
        twin = Twin(Pager(SimulatedDevice(), 2 * 2048), FULL, 256, 256 * 8)
        twin.step([(0, twin.total)], 0)
        parts = twin.paged.slices([(0, twin.total)])
        for _ in range(3):
            next(parts)
        parts.close()
        twin.check()
        twin.step([(0, twin.total)], 1)
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


@pytest.mark.parametrize("slots", [1, 2])
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
def test_each_wait_is_needed(forgets, slots):
    """Without it numbers are wrong: the simulation would show a pager that forgot one."""
    twin = Twin(Pager(Forgetful(forgets), slots * 2048), FULL, 256, 256 * 5)
    for step in range(3):
        twin.step([(0, twin.total)], step)
    if forgets == "nothing":
        twin.check()
    else:
        with pytest.raises(AssertionError):
            twin.check()


def test_misuse_is_refused():
    pager = Pager(SimulatedDevice(), 4096)
    twin = Twin(pager, FULL, 256, 1024)
    parts = twin.paged.slices([(0, 1024)])
    next(parts)
    with pytest.raises(RuntimeError, match="cannot be evicted while a step visits them"):
        pager.evict_all()
    with pytest.raises(RuntimeError, match="one state after the other"):
        next(twin.paged.slices([(0, 1024)]))
