"""The key-value cache by itself: rows that end, join and wait for nobody; what lies in rooms and is nobody's."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.models.cache import KVCache, bucket


def test_rows_are_selected_one_layer_after_the_other(alive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, peaks, plain = KVCache(), list[int](), torch.Tensor.index_select
    part, rows = torch.zeros(4, 2, 2, 16), torch.arange(4)
    cache.begin(torch.zeros(4, 2, dtype=torch.int64), False)
    with alive() as made:
        for layer in range(8):
            cache.append(layer, part, part)
        held = made.bytes()
        cache.end()

        def watched(*args: Any) -> torch.Tensor:
            taken = plain(*args)
            peaks.append(made.bytes())
            return taken

        monkeypatch.setattr(torch.Tensor, "index_select", watched)
        cache.select(rows)
        assert made.bytes() <= held + 64 and max(peaks) <= held + held // 8 + 64  # and their lengths


def passed(cache: KVCache, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass that adds k, and twice that as values, in one layer."""
    cache.begin(torch.zeros(k.shape[:2], dtype=torch.int64), False)
    keys, values = cache.append(0, k, 2 * k)
    seen = cache.seen()
    cache.end()
    assert keys.isfinite().all() and values.isfinite().all()
    return seen, keys


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_what_they_are_alone(seed: int) -> None:
    """Random reads, tokens, leaves and joins against lists of numbers; rooms grow from 64 to 256."""
    torch.manual_seed(seed)
    count = 0

    def new(rows: int) -> tuple[KVCache, list[list[float]]]:
        lengths, other = torch.randint(1, 90, (rows,)).tolist(), KVCache()
        ends = [sum(lengths[:i]) for i in range(rows + 1)]
        k = torch.rand(1, ends[-1], 1, 1)
        other.begin(torch.zeros(k.shape[:2], dtype=torch.int64), spans=[*pairwise(ends)])
        assert other.append(0, k, k) == (k, k) and other.laid(k) is other.taken(k) is k and other.seen() is None
        other.end()
        return other, [part.tolist() for part in k.flatten().split(lengths)]

    cache, texts = new(4)
    cache.most = 200
    for _ in range(60):
        if len(texts) > 1 and torch.rand(()) < 0.3:
            row = int(torch.randint(len(texts), ()))
            cache.leave(row)
            texts[row] = texts[-1]
            texts.pop()
        if len(texts) < 5 and torch.rand(()) < 0.4:
            other, more = new(5 - len(texts))  # of which one row had no place at first
            cache.join(other)
            texts += more
        if torch.rand(()) < 0.1:  # some of them, in any order, a copy of which goes on
            rows = torch.randint(len(texts), (3,)).tolist()
            cache, before, held = cache.fork(rows), cache, [*texts]
            passed(cache, torch.full((3, 1, 1, 1), 7.0))
            assert cache.counts == [len(texts[row]) + 1 for row in rows]
            texts = [[*texts[row], 7.0] for row in rows]
            assert before.counts == list(map(len, held))
        token = torch.rand(len(texts), 1, 1, 1)
        seen, keys = passed(cache, token)
        for row, text in enumerate(texts):
            text.append(float(token[row]))
            assert keys[row, seen[row, 0, 0], 0, 0].tolist() == text
        count += len(texts)
        assert cache.counts == list(map(len, texts)) == cache.lengths[: len(texts)].tolist()
    room = cache._rooms[0]
    assert count > 60 and room is not None and room.shape[3] <= bucket(200)


def spanned(*lengths: int) -> KVCache:
    cache, tokens = KVCache(), torch.zeros(1, sum(lengths), dtype=torch.int64)
    cache.begin(tokens, spans=[*pairwise([0, *accumulate(lengths)])])
    cache.append(0, torch.zeros(1, sum(lengths), 1, 1), torch.zeros(1, sum(lengths), 1, 1))
    cache.end()
    return cache


def test_windows_count_from_each_rows_own_end() -> None:
    cache = spanned(5, 2)
    cache.begin(torch.zeros(2, 1, dtype=torch.int64), False)
    seen = cache.seen(3)
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen[:, 0, 0]] == [[3, 4, 5], [0, 1, 2]]


def test_spans_go_on_with_their_rows() -> None:
    """Row 0 of five tokens gets two more, row 1 of two gets three: queries in rows and back, keys behind their own."""
    cache, k = spanned(5, 2), torch.arange(1.0, 6).view(1, 5, 1, 1)
    cache.begin(torch.zeros(1, 5, dtype=torch.int64), spans=[(0, 2), (2, 5)])
    keys, _ = cache.append(0, k, k)
    assert cache.places.tolist() == [[5, 6, 2, 3, 4]] and torch.equal(cache.taken(cache.laid(k)), k)
    assert cache.laid(k)[..., 0, 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert keys[0, 5:7].flatten().tolist() == [1, 2] and keys[1, 2:5].flatten().tolist() == [3, 4, 5]
    seen = cache.seen()
    assert seen is not None and seen.sum(-1)[:, 0].tolist() == [[6, 7, 8], [3, 4, 5]]
    cache.end()
    assert cache.counts == [7, 5] == cache.lengths.tolist()


@given(length=st.integers(1, 1 << 20))
def test_buckets_are_few_and_near(length: int) -> None:
    found = bucket(length)
    assert length <= found <= max(length + 63, 1.25 * length) and bucket(found) == found
    assert len({bucket(i) for i in range(1, 4097)}) <= 32


def test_what_does_not_fit_a_caches_rows_is_refused() -> None:
    cache = spanned(3, 1)
    for rows, padded in ((2, True), (3, False)):
        with pytest.raises(ValueError, match=rf"tokens of {rows} rows for a cache of \[3, 1\] tokens"):
            cache.begin(torch.zeros(rows, 1, dtype=torch.int64), padded)
