"""Spans and chunks: everything is covered once, nothing is shared, and pages cut between chunks."""

from hypothesis import given
from hypothesis import strategies as st

from fourbit.optim.layout import BLOCK, CHUNK, Layout

SIZES = st.lists(st.one_of(st.integers(0, 600), st.integers(4000, 20000)), max_size=12)


def made_of(sizes: list[int]) -> Layout:
    layout = Layout()
    for i, size in enumerate(sizes):
        assert layout.add(size) == i
    return layout


@given(SIZES)
def test_chunks_cover_every_element_once(sizes: list[int]) -> None:
    layout = made_of(sizes)
    seen: dict[int, int] = dict.fromkeys(range(len(sizes)), 0)
    last = 0
    for index, start, length, offset in layout.chunks().tolist():
        assert start == seen[index] and 0 < length <= CHUNK
        assert offset == layout.starts[index] + start >= last
        assert offset // CHUNK == (offset + length - 1) // CHUNK  # in one window, so no page cuts it
        assert start % BLOCK == offset % BLOCK == 0
        seen[index] += length
        last = offset + length
    assert list(seen.values()) == sizes


@given(SIZES)
def test_spans_are_whole_blocks_and_disjoint(sizes: list[int]) -> None:
    layout = made_of(sizes)
    end = 0
    for i, size in enumerate(sizes):
        start, stop = layout.span(i)
        assert start == end and start % BLOCK == 0 and 0 <= stop - start - size < BLOCK
        end = stop
    assert end == layout.total


@given(SIZES, st.data())
def test_segments_of_pages_add_up(sizes: list[int], data: st.DataObject) -> None:
    layout, page = made_of(sizes), data.draw(st.integers(1, 4)) * CHUNK
    seen = [0] * len(sizes)
    for first in range(0, layout.total, page):
        for index, start, length, offset in layout.segments(first, min(first + page, layout.total)):
            assert start == seen[index] and first <= offset and offset + length <= first + page
            assert offset == layout.starts[index] + start
            seen[index] += length
    assert seen == sizes


@given(SIZES, SIZES)
def test_joining_moves_nothing(sizes: list[int], more: list[int]) -> None:
    layout = made_of(sizes)
    before = list(layout.starts)
    for size in more:
        layout.add(size)
    assert layout.starts[: len(before)] == before
