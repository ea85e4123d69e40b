"""Forked or padded, whole or in micro-batches: every answer's tokens, positions, predictions and last token once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourbit.data import batch as answer_batch
from fourbit.data.batch import (
    AnswerBatch,
    Encoded,
    Preference,
    answer_batches,
    pack_answers,
    packed_size,
    pad_answers,
    padded_size,
)
from fourbit.data.encode import shared_tokens

PAD = 3  # also a token of the examples: padding must never be told by its id
Example = Preference


def part(ids: Sequence[int], trained: Sequence[bool]) -> Encoded:
    return Encoded(list(ids), list(trained), "", "")


def pair(chosen: Encoded, rejected: Encoded) -> Preference:
    return Preference((chosen, rejected), shared_tokens(chosen.ids, rejected.ids))


TOKEN = st.tuples(st.integers(0, 4), st.booleans())
TOKENS = st.lists(TOKEN, min_size=1, max_size=6)


@st.composite
def encoded(draw: Any, start: Sequence[tuple[int, bool]] = ((0, False),)) -> Encoded:
    """A few tokens after `start`, of which at least one past the first is trained."""
    ids, trained = zip(*[*start, *draw(TOKENS)], strict=True)
    flags = list(trained)
    flags[draw(st.integers(1, len(flags) - 1))] = True
    return part(ids, flags)


@st.composite
def pairs(draw: Any) -> Preference:
    start = draw(TOKENS)
    return pair(draw(encoded(start)), draw(encoded(start if draw(st.booleans()) else ((9, False),))))


JUDGED = st.builds(lambda answer, label: Preference((answer,), label=label), encoded(), st.booleans())
EXAMPLES = st.one_of(st.lists(pairs(), min_size=1, max_size=6), st.lists(JUDGED, min_size=1, max_size=6)).map(
    lambda examples: list(zip(range(7, 99), examples, strict=False))
)


def text_before(batch: AnswerBatch, place: int) -> list[tuple[int, int]]:
    """The (token, position) that a hidden state at this flattened place has seen, from the definition of spans."""
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    if batch.spans is None:
        start = place - place % batch.input_ids.shape[1]
        seen = list(range(start, place + 1))
    else:
        span = next(span for span in batch.spans if span[0] <= place < span[-1])
        begin = max((a for a in span[1:-1] if a <= place), default=span[0])
        trunk = range(span[0], span[1]) if begin != span[0] else range(0)
        seen = [*trunk, *range(begin, place + 1)]
    return [(ids[i], positions[i]) for i in seen]


def holds(batch: AnswerBatch, examples: Sequence[tuple[int, Example]]) -> None:
    """Assert that `batch` is exactly these examples: each prediction sees what its answer has before it."""
    given = dict(examples)
    assert sorted(batch.numbers) == sorted(given) and batch.examples == len(examples) == batch.weight
    answers = len(examples[0][1].parts)
    used = Counter[int]()
    assert batch.lengths.shape == batch.last.shape == (answers, len(examples))
    longest = int(batch.lengths.max())
    assert batch.slots.shape == (answers, len(examples), longest)
    for p, number in enumerate(batch.numbers):
        for a, answer in enumerate(given[number].parts):
            wanted = [i for i in range(1, len(answer.ids)) if answer.trained[i]]
            assert batch.lengths[a, p] == len(wanted)
            slots = batch.slots[a, p].tolist()
            assert slots[len(wanted) :] == [batch.trained] * (longest - len(wanted))
            used.update(slots[: len(wanted)])
            for i, slot in zip(wanted, slots, strict=False):
                assert batch.targets[slot] == answer.ids[i]
                assert text_before(batch, int(batch.rows[slot])) == list(zip(answer.ids[:i], range(i), strict=True))
            last = max(i for i, trained in enumerate(answer.trained) if trained)
            whole = list(zip(answer.ids[: last + 1], range(last + 1), strict=True))
            assert text_before(batch, int(batch.last[a, p])) == whole
    assert set(used) == set(range(batch.trained)), "a prediction that no answer has"
    assert batch.rows.shape == batch.targets.shape == (batch.trained,)
    assert len(set(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))) == batch.trained
    labels = [example.label for _, example in sorted(examples) if example.label is not None]
    if labels:
        assert batch.labels is not None and batch.labels.dtype == torch.bool
        order = sorted(range(len(labels)), key=batch.numbers.__getitem__)
        assert batch.labels[order].tolist() == labels
    else:
        assert batch.labels is None


def test_a_forked_pair_by_hand() -> None:
    """Prompt 5 6, answers 7 8 1 and 7 9: 7 is predicted once for both, the next token twice from one place."""
    chosen = part([5, 6, 7, 8, 1], [False, False, True, True, True])
    rejected = part([5, 6, 7, 9], [False, False, True, True])
    batch = pack_answers([(4, pair(chosen, rejected))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.spans == ((0, 3, 5, 6),)
    assert batch.rows.tolist() == [1, 2, 3, 2] and batch.targets.tolist() == [7, 8, 1, 9]
    assert batch.slots.tolist() == [[[0, 1, 2]], [[0, 3, 4]]]
    assert batch.lengths.tolist() == [[3], [2]] and batch.last.tolist() == [[4], [5]]
    assert (batch.labels, batch.numbers, batch.tokens, batch.trained, batch.examples) == (None, (4,), 6, 4, 1)


def test_a_padded_pair_by_hand() -> None:
    chosen = part([5, 6, 7, 8, 1], [False, False, True, True, True])
    rejected = part([5, 6, 7, 9], [False, False, True, True])
    batch = pad_answers([(4, pair(chosen, rejected))], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 6, 7, 9, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2 and batch.spans is None
    assert batch.rows.tolist() == [1, 2, 3, 6, 7] and batch.targets.tolist() == [7, 8, 1, 7, 9]
    assert batch.slots.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert batch.lengths.tolist() == [[3], [2]] and batch.last.tolist() == [[4], [8]]
    assert (batch.labels, batch.numbers, batch.tokens, batch.trained, batch.examples) == (None, (4,), 9, 5, 1)


def test_a_judged_batch_by_hand() -> None:
    good = Preference((part([5, 6, 1], [False, True, True]),), label=True)
    examples = [(3, good), (0, Preference((part([5, 1], [False, True]),), label=False))]
    batch = pack_answers(examples)
    assert batch.input_ids.tolist() == [[5, 6, 1, 5, 1]] and batch.spans == ((0, 3), (3, 5))
    assert batch.rows.tolist() == [0, 1, 3] and batch.slots.tolist() == [[[0, 1], [2, 3]]]
    assert batch.labels is not None and batch.labels.tolist() == [True, False] and batch.last.tolist() == [[2, 4]]
    assert pad_answers(examples, PAD).input_ids.tolist() == [[5, 6, 1], [5, 1, PAD]]


def test_padded_rows_stand_answer_by_answer() -> None:
    """All chosen first, then all rejected: row a * P + p."""
    one = pair(part([5, 1], [False, True]), part([5, 2], [False, True]))
    other = pair(part([6, 3], [False, True]), part([6, 4], [False, True]))
    batch = pad_answers([(0, one), (1, other)], PAD)
    assert batch.input_ids.tolist() == [[5, 1], [6, 3], [5, 2], [6, 4]]
    assert batch.last.tolist() == [[1, 3], [5, 7]] and batch.slots.tolist() == [[[0], [2]], [[1], [3]]]


@given(EXAMPLES)
def test_both_layouts_hold_every_answer(examples: list[tuple[int, Example]]) -> None:
    packed, padded = pack_answers(examples), pad_answers(examples, PAD)
    holds(packed, examples)
    holds(padded, examples)
    assert torch.equal(packed.lengths, padded.lengths)
    assert padded.trained == int(padded.lengths.sum()) >= packed.trained
    assert packed.tokens == packed.input_ids.numel() == sum(packed_size(e) for _, e in examples)
    assert padded.tokens == sum(len(answer.ids) for _, e in examples for answer in e.parts) >= packed.tokens
    assert padded.input_ids.numel() == len(examples) * max(padded_size(e) for _, e in examples)


def shift_targets(batch: AnswerBatch) -> AnswerBatch:
    return replace(batch, targets=batch.targets.roll(1))


def shift_rows(batch: AnswerBatch) -> AnswerBatch:
    return replace(batch, rows=batch.rows + 1)


def restart_positions(batch: AnswerBatch) -> AnswerBatch:
    start, fork, end, _ = (batch.spans or ())[0]
    positions = batch.position_ids.clone()
    positions[:, fork:end] -= fork - start
    return replace(batch, position_ids=positions)


def swap_answers(batch: AnswerBatch) -> AnswerBatch:
    return replace(batch, slots=batch.slots.flip(0))


def last_of_the_row(batch: AnswerBatch) -> AnswerBatch:
    return replace(batch, last=batch.last + 1)


@pytest.mark.parametrize("fault", [shift_targets, shift_rows, restart_positions, swap_answers, last_of_the_row])
def test_planted_faults_are_caught(fault: Callable[[AnswerBatch], AnswerBatch]) -> None:
    chosen = part([5, 6, 7, 8, 1, 0], [False, False, True, True, True, False])
    rejected = part([5, 6, 7, 9, 1, 0], [False, False, True, True, True, False])
    examples = [(0, pair(chosen, rejected))]
    holds(pack_answers(examples), examples)
    with pytest.raises(AssertionError):
        holds(fault(pack_answers(examples)), examples)


def test_a_shared_count_that_is_one_too_many_is_refused() -> None:
    good = pair(part([5, 6, 7], [False, False, True]), part([5, 6, 8], [False, False, True]))
    for shared in (3, 4, -1):
        with pytest.raises(ValueError, match=f"example 8 says that its answers share {shared} tokens, which they do"):
            pack_answers([(8, replace(good, shared=shared))])
    holds(pack_answers([(0, replace(good, shared=1))]), [(0, good)])
    holds(pack_answers([(0, replace(good, shared=0))]), [(0, good)])


@given(EXAMPLES, st.booleans(), st.one_of(st.just("auto"), st.integers(1, 7)), st.integers(1, 60))
def test_micro_batches_hold_every_example_once(
    examples: list[tuple[int, Example]], packing: bool, micro_batch: Any, budget: int
) -> None:
    batches = answer_batches(examples, packing=packing, micro_batch=micro_batch, token_budget=budget, pad_id=PAD)
    given = dict(examples)
    assert sorted(number for batch in batches for number in batch.numbers) == sorted(given)
    for batch in batches:
        holds(batch, [(number, given[number]) for number in batch.numbers])
        assert (batch.spans is not None) == packing
        if micro_batch == "auto":
            assert batch.input_ids.numel() <= budget or batch.examples == 1
    if micro_batch != "auto":
        counts = [batch.examples for batch in batches]
        assert all(count == micro_batch for count in counts[:-1]) and counts[-1] <= micro_batch


def test_shared_prompts_fill_a_pass_that_padding_would_not() -> None:
    prompt = [0] * 90
    answers = [part([*prompt, i, 1], [False] * 90 + [True, True]) for i in range(2, 10)]
    examples = [(i, pair(*answers[2 * i : 2 * i + 2])) for i in range(4)]
    sizes: dict[str, int | str] = {"micro_batch": "auto", "token_budget": 400, "pad_id": PAD}
    (packed,) = answer_batches(examples, packing=True, **sizes)  # type: ignore[arg-type]
    assert packed.tokens == 4 * 94
    assert [b.examples for b in answer_batches(examples, packing=False, **sizes)] == [2, 2]  # type: ignore[arg-type]


def test_misuse_is_refused() -> None:
    good = pair(part([5, 1], [False, True]), part([5, 2], [False, True]))
    untrained = pair(part([5, 1], [False, True]), part([5, 2], [True, False]))
    with pytest.raises(ValueError, match="at least one example, got none"):
        answer_batches([], packing=True, micro_batch=1, token_budget=1, pad_id=PAD)
    for layout in (pack_answers, lambda examples: pad_answers(examples, PAD)):
        with pytest.raises(ValueError, match="at least one example, got none"):
            layout([])
        with pytest.raises(ValueError, match="example 5 has an answer without a trained token after its first"):
            layout([(4, good), (5, untrained)])
        with pytest.raises(ValueError, match="pairs or judged answers, not both"):
            layout([(0, good), (1, Preference((part([5, 1], [False, True]),), label=True))])
    with pytest.raises(ValueError, match='micro_batch must be "auto" or at least 1, not 0'):
        answer_batches([(0, good)], packing=True, micro_batch=0, token_budget=1, pad_id=PAD)


def test_a_batch_moves_whole() -> None:
    batch = pack_answers([(0, Preference((part([5, 1], [False, True]),), label=True))])
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert (before.device.type, after.device.type) == ("cpu", "meta") and before.shape == after.shape
        else:
            assert before == after


def test_a_large_evaluation_set_is_laid_out_in_seconds() -> None:
    import time

    answers = [part([0] * 60 + [i % 7 + 1] * (i % 40 + 1), [False] * 60 + [True] * (i % 40 + 1)) for i in range(4001)]
    examples = [(i, pair(answers[i], answers[i + 1])) for i in range(4000)]
    start = time.process_time()
    batches = answer_batches(examples, packing=True, micro_batch="auto", token_budget=2048, pad_id=PAD)
    assert sum(batch.examples for batch in batches) == 4000
    assert time.process_time() - start < 5
    assert answer_batch.packed_size(examples[0][1]) == 60 + 1 + 2
