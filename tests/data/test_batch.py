"""Packed or padded, whole or in micro-batches: every answer's tokens, positions, predictions and last token once."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourbit.data.batch import WORTH, Batch, Encoded, Example, Numbered, micro_batches, pack, pad

PAD = 3  # also a token of the examples: padding must never be told by its id


def part(ids: Sequence[int], trained: Sequence[bool]) -> Encoded:
    return Encoded(list(ids), list(trained), "", "")


def chat(length: int, token: int = 1) -> Example:
    """A row to learn from of so many tokens."""
    return Example((part([token] * length, [True] * length),))


def apart(*lengths: int) -> list[Example]:
    """Rows that share nothing."""
    return [chat(length, token) for token, length in enumerate(lengths)]


def pair(chosen: Encoded, rejected: Encoded) -> Example:
    return Example((chosen, rejected))


TOKEN = st.tuples(st.integers(0, 4), st.booleans())
TOKENS = st.lists(TOKEN, min_size=1, max_size=6)


STARTS = st.sampled_from([[(0, False)], [(0, False)] * 4, [(0, False), (1, False), (2, True), (3, False), (0, True)]])


@st.composite
def encoded(draw: Any, start: Sequence[tuple[int, bool]] | None = None) -> Encoded:
    """A few tokens after `start`, of which at least one past the first is trained."""
    ids, trained = zip(*[*(draw(STARTS) if start is None else start), *draw(TOKENS)], strict=True)
    flags = list(trained)
    flags[draw(st.integers(1, len(flags) - 1))] = True
    return part(ids, flags)


@st.composite
def pairs(draw: Any) -> Example:
    start = draw(TOKENS)
    return pair(draw(encoded(start)), draw(encoded(start if draw(st.booleans()) else ((9, False),))))


LEARNED = st.builds(lambda text: Example((text,)), encoded())
JUDGED = st.builds(lambda answer, label: Example((answer,), label=label), encoded(), st.booleans())
EXAMPLES = st.one_of(st.lists(kind, min_size=1, max_size=6) for kind in (LEARNED, pairs(), JUDGED)).map(
    lambda examples: list(zip(range(7, 99), examples, strict=False))
)
PAIR = pair(
    part([5, 6, 7, 8, 1, 0], [False, False, True, True, True, False]), part([5, 6, 7, 9], [False, False, True, True])
)


def split(examples: Sequence[Example], packing: bool, budget: int, micro_batch: Any = "auto") -> list[Batch]:
    return micro_batches(
        list(enumerate(examples)), packing=packing, micro_batch=micro_batch, token_budget=budget, pad_id=PAD
    )


def text_before(batch: Batch, place: int) -> list[tuple[int, int]]:
    """The (token, position) that a hidden state at this flattened place has seen, from the definition of spans."""
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    if batch.spans is None:
        start = place - place % batch.input_ids.shape[1]
        seen = list(range(start, place + 1))
    else:
        start, _, *parent = next(span for span in batch.spans if span[0] <= place < span[1])
        seen = [*range(start, place + 1)]
        while parent:
            start, end, *parent = batch.spans[parent[0]]
            seen = [*range(start, end), *seen]
    return [(ids[i], positions[i]) for i in seen]


def holds(batch: Batch, examples: Sequence[Numbered]) -> None:
    """Assert that `batch` is exactly these examples: each prediction sees what its answer has before it."""
    given = dict(examples)
    assert sorted(batch.numbers) == sorted(given) and batch.examples == len(examples)
    answers, labels = len(examples[0][1].parts), [given[number].label for number in batch.numbers]
    used = Counter[int]()
    if answers == 1 and labels[0] is None:
        assert batch.weight == batch.trained
        assert batch.slots is batch.lengths is batch.last is None, "what nothing reads is not made"
        # So that one loop reads all kinds: its predictions stand in the order of the answers.
        counts = [sum(given[number].parts[0].trained[1:]) for number in batch.numbers]
        slots = torch.full((1, len(counts), max(counts)), batch.trained)
        for p, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
            slots[0, p, :count] = torch.arange(end - count, end)
        batch = replace(batch, slots=slots, lengths=torch.tensor([counts]))
    else:
        assert batch.weight == len(examples) and batch.last.shape == (answers, len(examples))
    assert batch.lengths.shape == (answers, len(examples))
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
            if batch.last is not None:
                whole = list(zip(answer.ids[: wanted[-1] + 1], range(wanted[-1] + 1), strict=True))
                assert text_before(batch, int(batch.last[a, p])) == whole
    assert set(used) == set(range(batch.trained)), "a prediction that no answer has"
    assert batch.rows.shape == batch.targets.shape == (batch.trained,)
    made = len(set(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)))
    assert made == batch.trained or (batch.last is None and batch.spans), "of rated answers each is made once"
    assert batch.labels is None if None in labels else batch.labels.tolist() == labels
    assert {t.dtype for t in vars(batch).values() if isinstance(t, Tensor) and t is not batch.labels} == {torch.int64}
    if batch.spans is not None:
        ends = [0, *(span[1] for span in batch.spans)]
        assert [span[0] for span in batch.spans] == ends[:-1] and ends[-1] == batch.tokens == batch.input_ids.numel()
        assert len(batch.owners) == len(batch.spans)
        for (_, end, *_), owner in zip(batch.spans, batch.owners, strict=True):
            told = [token for token, _ in text_before(batch, end - 1)]
            assert any(part.ids[: len(told)] == told for part in given[batch.numbers[owner]].parts)


def test_padded_rows_by_hand() -> None:
    examples = [Example((part([5, 6, 7], [False, False, True]),)), Example((part([1, 2], [True, True]),))]
    batch = pad([(4, examples[0]), (2, examples[1])], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7], [1, 2, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 2
    assert batch.rows.tolist() == [1, 3] and batch.targets.tolist() == [7, 2]
    assert (batch.spans, batch.labels, batch.numbers) == (None, None, (4, 2))
    assert (batch.tokens, batch.trained, batch.examples, batch.weight) == (5, 2, 2, 2)


def test_a_forked_pair_by_hand() -> None:
    """Prompt 5 6, answers 7 8 1 and 7 9: 7 is predicted once for both, the next token twice from one place."""
    batch = pack([(4, PAIR)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 0, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3]]
    assert batch.spans == ((0, 3), (3, 6, 0), (6, 7, 0)) and batch.owners == (0, 0, 0)
    assert batch.rows.tolist() == [1, 2, 3, 2] and batch.targets.tolist() == [7, 8, 1, 9]
    assert batch.slots.tolist() == [[[0, 1, 2]], [[0, 3, 4]]]
    assert batch.lengths.tolist() == [[3], [2]] and batch.last.tolist() == [[4], [6]]
    assert (batch.labels, batch.numbers, batch.tokens, batch.trained, batch.examples) == (None, (4,), 7, 4, 1)


def test_a_judged_batch_by_hand() -> None:
    good = Example((part([5, 6, 1], [False, True, True]),), label=True)
    examples = [(3, good), (0, Example((part([5, 1], [False, True]),), label=False))]
    batch = pack(examples)
    assert batch.input_ids.tolist() == [[5, 6, 1, 5, 1]] and batch.spans == ((0, 3), (3, 5))
    assert batch.rows.tolist() == [0, 1, 3] and batch.slots.tolist() == [[[0, 1], [2, 3]]]
    assert batch.labels is not None and batch.labels.tolist() == [True, False] and batch.last.tolist() == [[2, 4]]


def test_rows_that_begin_alike_by_hand() -> None:
    """A system prompt 5 5 5 that three rows have, two of them with 6 behind; a copy; and a row by itself."""
    texts = [[5, 5, 5, 7, 1], [9, 9, 1], [5, 5, 5, 6, 3, 1], [5, 5, 5, 6, 2], [9, 9, 1]]
    batch = pack([(i, Example((part(ids, [False] * 2 + [True] * (len(ids) - 2)),))) for i, ids in enumerate(texts)])
    assert batch.input_ids.tolist() == [[5, 5, 5, 6, 2, 3, 1, 7, 1, 9, 9, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5, 3, 4, 0, 1, 2]]
    assert batch.spans == ((0, 3), (3, 4, 0), (4, 5, 1), (5, 7, 1), (7, 9, 0), (9, 12))
    assert batch.owners == (3, 3, 3, 2, 0, 1)
    assert batch.rows.tolist() == [1, 2, 7, 10, 1, 2, 3, 5, 1, 2, 3, 10], "row by row, whatever each shares"
    assert batch.targets.tolist() == [5, 7, 1, 1, 5, 6, 3, 1, 5, 6, 2, 1] and batch.trained == batch.weight == 12
    assert pack([(0, chat(4)), (1, replace(chat(4), group=1))]).spans == ((0, 4), (4, 8)), "another adapter's"
    assert pack([*enumerate([chat(4), chat(6), chat(7)])], 4).spans == ((0, 4), (4, 10), (10, 17)), "long ones"


def test_padded_rows_stand_answer_by_answer() -> None:
    """All chosen first, then all rejected: row a * P + p."""
    one = pair(part([5, 1], [False, True]), part([5, 2], [False, True]))
    other = pair(part([6, 3], [False, True]), part([6, 4], [False, True]))
    batch = pad([(0, one), (1, other)], PAD)
    assert batch.input_ids.tolist() == [[5, 1], [6, 3], [5, 2], [6, 4]]
    assert batch.last.tolist() == [[1, 3], [5, 7]] and batch.slots.tolist() == [[[0], [2]], [[1], [3]]]


@given(EXAMPLES)
def test_both_layouts_hold_every_answer(examples: list[Numbered]) -> None:
    packed, padded = pack(examples), pad(examples, PAD)
    holds(packed, examples)
    holds(padded, examples)
    answers = [answer for row in zip(*(e.parts for _, e in examples), strict=True) for answer in row]
    assert padded.trained == sum(sum(answer.trained[1:]) for answer in answers) >= packed.trained
    beginnings = [tuple(answer.ids[:WORTH]) if len(answer.ids) >= WORTH else i for i, answer in enumerate(answers)]
    pieces = {(a, *b.ids[:k]) for a, b in zip(beginnings, answers, strict=True) for k in range(1, len(b.ids) + 1)}
    assert packed.tokens == len(pieces) <= sum(e.size(packing=True) for _, e in examples)
    assert padded.tokens == sum(len(answer.ids) for _, e in examples for answer in e.parts) >= packed.tokens
    assert padded.input_ids.numel() == len(examples) * max(e.size(packing=False) for _, e in examples)
    for row, answer in zip(padded.input_ids, answers, strict=True):
        assert (row[len(answer.ids) :] == PAD).all()


def restart_positions(batch: Batch) -> Batch:
    (start, fork), (_, end, _), *_ = batch.spans or ()
    positions = batch.position_ids.clone()
    positions[:, fork:end] -= fork - start
    return replace(batch, position_ids=positions)


FAULTS: dict[str, Callable[[Batch], Batch]] = {
    "targets shifted": lambda batch: replace(batch, targets=batch.targets.roll(1)),
    "rows shifted": lambda batch: replace(batch, rows=batch.rows + 1),
    "positions restart": restart_positions,
    "answers swapped": lambda batch: replace(batch, slots=batch.slots.flip(0)),
    "last of the row": lambda batch: replace(batch, last=batch.last + 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    examples = [(0, replace(PAIR, parts=(PAIR.parts[0], replace(PAIR.parts[0], ids=[5, 6, 7, 9, 1, 0]))))]
    holds(pack(examples), examples)
    with pytest.raises(AssertionError):
        holds(FAULTS[fault](pack(examples)), examples)


@given(EXAMPLES, st.booleans(), st.one_of(st.just("auto"), st.integers(1, 7)), st.integers(1, 60))
def test_micro_batches_hold_every_example_once(
    examples: list[Numbered], packing: bool, micro_batch: Any, budget: int
) -> None:
    batches = micro_batches(examples, packing=packing, micro_batch=micro_batch, token_budget=budget, pad_id=PAD)
    given = dict(examples)
    assert sorted(number for batch in batches for number in batch.numbers) == sorted(given)
    for batch in batches:
        holds(batch, [(number, given[number]) for number in batch.numbers])
        assert (batch.spans is not None) == packing
        if micro_batch == "auto":
            assert batch.input_ids.numel() <= budget or batch.examples == 1
            assert batch.trained <= budget or batch.examples == 1 or not packing
    if micro_batch != "auto":
        counts = [batch.examples for batch in batches]
        assert all(count == micro_batch for count in counts[:-1]) and counts[-1] <= micro_batch
    elif packing:
        least = sum(example.size(True) for _, example in examples)
        assert len(batches) <= max(1, 2 * least / budget + 1), "two of them at most are less than half full"


def test_auto_fills_passes_best_fit_first() -> None:
    lengths = lambda batches: [[b - a for a, b in batch.spans] for batch in batches]
    examples = apart(2, 7, 3, 5, 12, 3)
    assert lengths(split(examples, True, 10)) == [[12], [7, 3], [5, 3, 2]]
    snug = apart(2, 3, 4, 5, 6)  # a roomiest-first rule would need three
    assert lengths(split(snug, True, 10)) == [[6, 4], [5, 3, 2]]
    assert [tuple(batch.input_ids.shape) for batch in split(examples, False, 10)] == [(1, 12), (1, 7), (2, 5), (2, 3)]


def test_a_number_of_examples_sorts_by_length_to_save_padding() -> None:
    batches = split([chat(n) for n in (2, 9, 3, 8)], False, 1, micro_batch=2)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 9), (2, 3)]


def test_shared_prompts_fill_a_pass_that_padding_would_not() -> None:
    answers = [part([*[0] * 90, i, 1], [False] * 90 + [True, True]) for i in range(2, 10)]
    examples = [pair(*two) for two in list(pairwise(answers))[::2]]
    (packed,) = split(examples, True, 400)
    assert packed.tokens == 90 + 8 * 2
    assert [batch.examples for batch in split(examples, False, 400)] == [2, 2]


def test_rows_that_begin_alike_go_together() -> None:
    """Three prompts of 40 tokens behind a system prompt of 20, and four rows of ten more to each: a pass a prompt.
    Packing by length alone would run every prompt in every pass."""
    rows = [[7] * 20 + [prompt] * 40 + [10 * prompt + i] * (8 + i) for i in range(4) for prompt in (1, 2, 3)]
    examples = [Example((part(ids, [False] * 60 + [True] * (len(ids) - 60)),)) for ids in rows]
    batches = split(examples, True, 120)
    assert [batch.tokens for batch in batches] == [20 + 40 + 8 + 9 + 10 + 11] * 3
    assert [sorted(batch.numbers) for batch in batches] == [[k, k + 3, k + 6, k + 9] for k in range(3)]
    (whole,) = split(examples, True, 500)
    assert whole.tokens == 20 + 3 * (40 + 8 + 9 + 10 + 11)
    prompts = {tuple(n % 3 for n in batch.numbers) for batch in split(examples, True, 0, 4)}
    assert prompts == {(0,) * 4, (1,) * 4, (2,) * 4}
    copies = [chat(30)] * 10  # whose predictions are made anew
    assert [batch.examples for batch in split(copies, True, 100)] == [2] * 5


def tokens_sharing_a_prompt(i: int) -> Encoded:
    return part([0] * 60 + [i % 7 + 1] * (i % 40 + 1), [False] * 60 + [True] * (i % 40 + 1))


LARGE = {
    "rows": [chat(2 + i * 37 % 60, i % 999) for i in range(20_000)],
    "one system prompt": [Example((part([5] * 500 + [i], [False] * 500 + [True]),)) for i in range(3_000)],
    "one in another": [Example((part([5] * i, [False] + [True] * (i - 1)),)) for i in range(2, 1_500)],
    "pairs": [pair(tokens_sharing_a_prompt(i), tokens_sharing_a_prompt(i + 1)) for i in range(4_000)],
    "long rows": [chat(8_000)] * 40,
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("examples", LARGE.values(), ids=LARGE)
def test_a_large_evaluation_set_is_laid_out_in_seconds(examples: list[Example], packing: bool) -> None:
    start = time.process_time()
    batches = split(examples, packing, 2048)
    assert sum(batch.examples for batch in batches) == len(examples)
    assert time.process_time() - start < 5


def test_a_long_row_among_short_ones_costs_what_its_tokens_cost() -> None:
    examples = [chat(4_000), *(chat(2, 2 + i) for i in range(1_390))]
    start = time.process_time()
    (batch,) = split(examples, True, 8192)
    assert time.process_time() - start < 0.3
    sizes = [value.nbytes for value in vars(batch).values() if isinstance(value, Tensor)]
    assert len(sizes) == 4 and sum(sizes) <= 4 * 8 * batch.tokens, "ids, positions, rows, targets: 8 bytes a token each"


UNTRAINED = replace(PAIR, parts=(PAIR.parts[0], part([5, 6, 7, 9], [True, False, False, False])))
JUDGEMENT = Example((part([5, 1], [False, True]),), label=True)


@pytest.mark.parametrize(
    "examples, error",
    [
        ([], "at least one example, got none"),
        ([PAIR, UNTRAINED], "example 1 has an answer without a trained token after its first"),
        ([Example((part([], []),))], "example 0 has an answer without a trained token after its first"),
        ([PAIR, JUDGEMENT], "one kind of example: rows to learn from, pairs or judged answers"),
        ([chat(2), JUDGEMENT], "one kind of example: rows to learn from, pairs or judged answers"),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_misuse_is_refused(examples: list[Example], error: str, packing: bool) -> None:
    with pytest.raises(ValueError, match=error):
        split(examples, packing, budget=9)
    with pytest.raises(ValueError, match=error):  # whoever lays out one batch is told the same
        pack(list(enumerate(examples))) if packing else pad(list(enumerate(examples)), PAD)


def test_what_training_sees_of_rows_is_told() -> None:
    """Checkpoints hold a hash of it."""
    assert chat(2).content() == [[[1, 1], [1, 1]], None]
    assert JUDGEMENT.content() == [[[5, 1], [0, 1]], True]
    assert replace(PAIR, parts=(JUDGEMENT.parts[0],) * 2).content() == [[[5, 1], [0, 1]]] * 2 + [None]


def test_a_batch_moves_whole() -> None:
    batch = pack([(0, JUDGEMENT)])
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert (before.device.type, after.device.type) == ("cpu", "meta") and before.shape == after.shape
        else:
            assert before == after
