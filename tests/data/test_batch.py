"""Padded or packed, whole or in micro-batches: the same (token, target, position) triples, each example once."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.data.batch import Batch, Encoded, micro_batches, pack_batch, pad_batch

PAD = 3  # also a token of the examples: padding must never be told by its id


def made(ids: Sequence[int], trained: Sequence[bool]) -> Encoded:
    return Encoded(list(ids), list(trained), "", "")


TOKEN = st.tuples(st.integers(0, 6), st.booleans())
EXAMPLE = st.lists(TOKEN, min_size=1, max_size=9).map(lambda pairs: made(*zip(*pairs, strict=True)))
EXAMPLES = st.lists(EXAMPLE, min_size=1, max_size=12)


def triples(examples: Sequence[Encoded]) -> Counter[tuple[tuple[int, int, int], ...]]:
    """What a model must see of each example: token, target and position, written down from the definition."""
    found = []
    for e in examples:
        targets = [e.ids[i + 1] if i + 1 < len(e.ids) and e.trained[i + 1] else -100 for i in range(len(e.ids))]
        found.append(tuple(zip(e.ids, targets, range(len(e.ids)), strict=True)))
    return Counter(found)


def seen(batch: Batch, lengths: Sequence[int] | None = None) -> list[tuple[tuple[int, int, int], ...]]:
    """The examples as they stand in a batch; `lengths` of the rows of a padded one."""
    flat = [getattr(batch, name).flatten().tolist() for name in ("input_ids", "targets", "position_ids")]
    width = batch.input_ids.shape[1]
    spans = batch.spans or [(i * width, i * width + length) for i, length in enumerate(lengths or [])]
    return [tuple(zip(*(column[start:end] for column in flat), strict=True)) for start, end in spans]


def test_a_padded_batch_by_hand() -> None:
    batch = pad_batch([made([5, 6, 7], [False, False, True]), made([8], [True]), made([1, 2], [True, True])], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, PAD, PAD], [1, 2, PAD]]
    assert batch.targets.tolist() == [[-100, 7, -100], [-100, -100, -100], [2, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 3
    assert (batch.spans, batch.tokens, batch.trained) == (None, 6, 2)
    assert {t.dtype for t in (batch.input_ids, batch.targets, batch.position_ids)} == {torch.int64}


def test_a_packed_batch_by_hand() -> None:
    batch = pack_batch([made([5, 6, 7], [False, False, True]), made([8], [True]), made([1, 2], [True, True])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2]]
    assert batch.targets.tolist() == [[-100, 7, -100, -100, 2, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert (batch.spans, batch.tokens, batch.trained) == (((0, 3), (3, 4), (4, 6)), 6, 2)
    assert {t.dtype for t in (batch.input_ids, batch.targets, batch.position_ids)} == {torch.int64}


@given(EXAMPLES)
def test_packed_and_padded_hold_the_same(examples: list[Encoded]) -> None:
    packed, padded = pack_batch(examples), pad_batch(examples, PAD)
    lengths = [len(e.ids) for e in examples]
    expected = triples(examples)
    assert Counter(seen(packed)) == expected == Counter(seen(padded, lengths))
    assert packed.tokens == padded.tokens == sum(lengths) == packed.input_ids.numel()
    assert packed.trained == padded.trained == sum(sum(e.trained[1:]) for e in examples)
    assert int((padded.targets != -100).sum()) == padded.trained
    assert padded.input_ids.shape == (len(examples), max(lengths))
    for i, length in enumerate(lengths):
        assert (padded.targets[i, length:] == -100).all() and (padded.input_ids[i, length:] == PAD).all()


@given(EXAMPLES)
def test_spans_follow_one_another_and_cover_the_row(examples: list[Encoded]) -> None:
    spans = pack_batch(examples).spans
    assert spans is not None
    assert [end - start for start, end in spans] == [len(e.ids) for e in examples]
    assert [start for start, _ in spans] == [0, *[end for _, end in spans[:-1]]]


@given(EXAMPLES, st.booleans(), st.one_of(st.just("auto"), st.integers(1, 13)), st.integers(1, 40))
def test_micro_batches_hold_every_example_once(
    examples: list[Encoded], packing: bool, micro_batch: int | str, budget: int
) -> None:
    batches = micro_batches(examples, packing=packing, micro_batch=micro_batch, token_budget=budget, pad_id=PAD)  # type: ignore[arg-type]
    if packing:
        assert sum((Counter(seen(batch)) for batch in batches), Counter()) == triples(examples)
    sizes = [len(batch.spans) if batch.spans is not None else len(batch.input_ids) for batch in batches]
    assert sum(sizes) == len(examples) and min(sizes) >= 1
    assert all((batch.spans is not None) == packing for batch in batches)
    assert sum(batch.tokens for batch in batches) == sum(len(e.ids) for e in examples)
    assert sum(batch.trained for batch in batches) == sum(sum(e.trained[1:]) for e in examples)
    if micro_batch == "auto":
        within = [batch.input_ids.numel() <= budget or size == 1 for batch, size in zip(batches, sizes, strict=True)]
        assert all(within)
    else:
        assert all(size == micro_batch for size in sizes[:-1]) and sizes[-1] <= int(micro_batch)


@given(EXAMPLES, st.integers(1, 40))
def test_padded_micro_batches_hold_every_example_once(examples: list[Encoded], budget: int) -> None:
    """The lengths of padded rows are read off by giving every example a length and ids of its own."""
    marked = [made([i + 10] * len(e.ids), e.trained) for i, e in enumerate(examples)]
    batches = micro_batches(marked, packing=False, micro_batch="auto", token_budget=budget, pad_id=0)
    found = Counter[tuple[tuple[int, int, int], ...]]()
    for batch in batches:
        found += Counter(seen(batch, (batch.input_ids != 0).sum(1).tolist()))
    assert found == triples(marked)


def lengths_of(batches: Sequence[Batch]) -> list[list[int]]:
    return [[end - start for start, end in batch.spans or ()] for batch in batches]


def test_auto_fills_passes_best_fit_first() -> None:
    examples = [made([1] * n, [True] * n) for n in (2, 7, 3, 5, 12, 3)]
    packed = micro_batches(examples, packing=True, micro_batch="auto", token_budget=10, pad_id=PAD)
    assert lengths_of(packed) == [[12], [7, 3], [5, 3, 2]]
    snug = [made([1] * n, [True] * n) for n in (2, 3, 4, 5, 6)]  # a roomiest-first rule would need three
    packed = micro_batches(snug, packing=True, micro_batch="auto", token_budget=10, pad_id=PAD)
    assert lengths_of(packed) == [[6, 4], [5, 3, 2]]
    padded = micro_batches(examples, packing=False, micro_batch="auto", token_budget=10, pad_id=PAD)
    assert [tuple(batch.input_ids.shape) for batch in padded] == [(1, 12), (1, 7), (2, 5), (2, 3)]


@given(EXAMPLES, st.integers(9, 40))
def test_no_two_packed_passes_would_fit_in_one(examples: list[Encoded], budget: int) -> None:
    """Best fit opens a pass only when an example fits nowhere, so passes are more than half full but for one."""
    batches = micro_batches(examples, packing=True, micro_batch="auto", token_budget=budget, pad_id=PAD)
    sizes = sorted(batch.tokens for batch in batches)
    assert len(sizes) == 1 or sizes[0] + sizes[1] > budget


def test_a_large_evaluation_set_is_split_in_no_time() -> None:
    import time

    examples = [made([1] * (1 + i * 37 % 60), [True] * (1 + i * 37 % 60)) for i in range(20_000)]
    for packing in (True, False):
        start = time.process_time()
        batches = micro_batches(examples, packing=packing, micro_batch="auto", token_budget=2048, pad_id=PAD)
        assert sum(batch.tokens for batch in batches) == sum(len(e.ids) for e in examples)
        assert time.process_time() - start < 5


def test_a_number_of_examples_sorts_by_length_to_save_padding() -> None:
    examples = [made([1] * n, [True] * n) for n in (1, 9, 2, 8)]
    batches = micro_batches(examples, packing=False, micro_batch=2, token_budget=1, pad_id=PAD)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 9), (2, 2)]


def test_misuse_is_refused() -> None:
    one = [made([1], [True])]
    with pytest.raises(ValueError, match="at least one example"):
        pad_batch([], PAD)
    with pytest.raises(ValueError, match="at least one example"):
        micro_batches([], packing=True, micro_batch=1, token_budget=1, pad_id=PAD)
    with pytest.raises(ValueError, match="without tokens"):
        pack_batch([made([], [])])
    with pytest.raises(ValueError, match='micro_batch must be "auto" or at least 1, not 0'):
        micro_batches(one, packing=True, micro_batch=0, token_budget=1, pad_id=PAD)
    with pytest.raises(ValueError, match="token_budget must be at least 1, not 0"):
        micro_batches(one, packing=True, micro_batch="auto", token_budget=0, pad_id=PAD)


def test_a_batch_moves_whole() -> None:
    batch = pack_batch([made([1, 2], [True, True])])
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.targets, moved.position_ids)} == {"meta"}
    assert (moved.spans, moved.tokens, moved.trained) == (batch.spans, batch.tokens, batch.trained)
    assert batch.input_ids.device.type == "cpu"
