"""The picture of paging shows what the pager did: as many copies as it counted, in an order that streams can have."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import paging
from fourbit.optim import AdamW
from fourbit.optim.paging import Pager
from fourbit.optim.state import CHUNK

BUDGET = 8 * 8 * CHUNK  # eight pages of a chunk


@pytest.fixture(scope="module")
def recorded():
    pager, recorder, others = paging.run(BUDGET, elements=16 * CHUNK)
    return pager, recorder, others, paging.page_spans(pager, recorder)


def test_every_copy_and_update_is_there(recorded):
    pager, _recorder, _others, spans = recorded
    count = {what: sum(span[0] == what for span in spans) for what in ("in", "out", "update")}
    assert count["in"] * 8 * CHUNK == pager.counters.bytes_in
    assert count["out"] * 8 * CHUNK == pager.counters.bytes_out
    assert count["update"] == pager.counters.hits + pager.counters.misses == 3 * 16


def test_a_page_comes_in_is_updated_and_goes_out(recorded):
    pager, _recorder, _others, spans = recorded
    for number, page in enumerate(pager.pages):
        mine = [span for span in spans if span[1] == number]
        turns = ["update"] if page.resident else ["in", "update", "out"]
        assert [span[0] for span in mine][: 3 * len(turns)] == turns * 3
        assert all(earlier[3] <= later[2] for earlier, later in pairwise(mine))


def test_no_more_pages_on_the_device_than_the_budget_has(recorded):
    pager, _recorder, _others, spans = recorded
    stays = paging.stays(pager, spans)
    for _page, begin, _end in stays:
        assert sum(first <= begin < last for _, first, last in stays) <= 8


def test_is_drawn(recorded, tmp_path: Path):
    pager, recorder, others, _spans = recorded
    paging.draw(pager, recorder, others, tmp_path / "paging.svg")
    text = (tmp_path / "paging.svg").read_text()
    assert text.startswith("<?xml") and f"{pager.counters.misses} misses" in paging.headline(pager, recorder, 3)


def test_next_pages_are_fetched_before_the_next_step():
    """So the first pages of a step arrive during forward and backward, and it stalls less than with one frame."""
    stalls = {}
    for frames in (1, 2):
        device = paging.ModelDevice(bandwidth=8 * CHUNK)  # a page takes a second
        optimizer = AdamW([weight := nn.Parameter(torch.zeros(8 * CHUNK))], budget=frames * 8 * CHUNK)
        optimizer.pager = Pager(device, optimizer.budget)
        for _ in range(4):
            device.work(30.0)  # forward and backward
            before, weight.grad = device.stalled(), torch.zeros_like(weight)
            optimizer.step()
        stalls[frames] = device.stalled() - before
    assert stalls == {1: 14.0, 2: 7.0}  # for seven pages out and in, or for six out beside in
