"""Answers that share a prompt: a forked row = packed rows of their own = padded rows, in states and every gradient."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fourbit.data.batch import Batch, Encoded, Example, pack, pad
from fourbit.kernels import spans as spans_module
from fourbit.kernels.spans import Packed, span_positions
from fourbit.models.decoder import Decoder

VOCABULARY = 97
Fault, Build = Callable[[pytest.MonkeyPatch], None], Callable[..., Decoder]


def pair(trunk: int, answers: Sequence[int], seed: int = 0) -> Example:
    """Two answers of these lengths after a common beginning of `trunk` tokens; all answer tokens are trained."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, VOCABULARY - 2, (n,), generator=generator).tolist()
    start = draw(trunk)
    texts = [[*start, VOCABULARY - 2 + i, *draw(length - 1)] for i, length in enumerate(answers)]
    parts = [Encoded(ids, [False] * trunk + [True] * (len(ids) - trunk), "", "") for ids in texts]
    return Example(tuple(parts))


PAIRS = [(0, pair(17, (5, 9), 1)), (1, pair(1, (1, 1), 2)), (2, pair(30, (1, 12), 3)), (3, pair(8, (20, 3), 4))]


KINDS: dict[str, dict[str, Any]] = {
    "as many heads": {"kv_heads": 4},
    "grouped heads": {},
    "one key head": {"kv_heads": 1},
    "lora on nf4": {"dropout": 0.0},  # another dropout would be drawn for other rows
}


@pytest.fixture(scope="session")
def build(random_decoder: Callable[..., Decoder]) -> Build:
    """`build("one key head", torch.float64)`."""
    return lambda kind, dtype=torch.float64: random_decoder(intermediate=96, layers=3, **KINDS[kind]).to(dtype)


def logps(model: Decoder, batch: Batch) -> Tensor:
    """Log-probabilities of every answer's trained tokens from full logits, [A, P, L]; 0 where an answer is shorter."""
    hidden = model.hidden(batch.input_ids, batch.position_ids, batch.spans).flatten(0, 1)[batch.rows]
    scores = model.lm_head(hidden).log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    return torch.cat([scores, scores.new_zeros(1)])[batch.slots]


def loss(model: Decoder, batch: Batch) -> Tensor:
    """A DPO-like loss, so that both answers' gradients matter and differ."""
    chosen, rejected = logps(model, batch).sum(2)
    return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()


def gradients(model: Decoder, batches: Sequence[Batch]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def separate(number: int, example: Example) -> Batch:
    """Both answers whole in one row, each with its own copy of the prompt: two plain spans, by definition."""
    ids, rows, targets, slots = list[int](), list[int](), list[int](), list[list[int]]()
    for part in example.parts:
        predicted = [i for i in range(1, len(part.ids)) if part.trained[i]]
        slots.append([len(rows) + k for k in range(len(predicted))])
        rows += [len(ids) + i - 1 for i in predicted]
        targets += [part.ids[i] for i in predicted]
        ids += part.ids
    cut = len(example.parts[0].ids)
    longest = max(map(len, slots))
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(
        torch.tensor([ids]),
        torch.tensor([[*range(cut), *range(len(ids) - cut)]]),
        ((0, cut), (cut, len(ids))),
        (0, 0),
        torch.tensor(rows),
        torch.tensor(targets),
        torch.tensor([[slot + [len(rows)] * (longest - len(slot))] for slot in slots]),
        *(empty, empty, None, (number,), len(ids), len(rows), 1),
    )


def distance(got: dict[str, Tensor], want: dict[str, Tensor], floor: float = 0.0) -> float:
    """The largest distance of two gradients, in norms of the wanted one or, if that is more, of `floor` x all of it.

    The floor is for texts of one or two tokens: softmax over one key has the gradient 0, which rounding makes 1e-17.
    """
    assert got.keys() == want.keys() and len(want) > 0
    least = floor * float(torch.stack([gradient.norm() for gradient in want.values()]).norm())
    return max(float((got[name] - want[name]).norm()) / max(float(want[name].norm()), least) for name in want)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_forked_separate_and_padded_are_one(
    build: Build, kind: str, dtype: torch.dtype, bound: float, checkpointing: bool
) -> None:
    model = build(kind, dtype)
    model.checkpointing = checkpointing
    forked, padded, apart = pack(PAIRS), pad(PAIRS, pad_id=0), list(itertools.starmap(separate, PAIRS))
    assert forked.tokens == 17 + 14 + 2 * 2 + 30 + 13 + 8 + 23 < padded.tokens
    with torch.no_grad():
        scores = [logps(model, batch) for batch in (forked, padded)]
        states = [model.hidden(forked.input_ids, places, forked.spans) for places in (forked.position_ids, None)]
        assert torch.equal(*states)  # positions may be left to the model
        assert (scores[0] - scores[1]).abs().max() <= bound * scores[1].abs().max()
        for p, batch in enumerate(apart):
            alone = logps(model, batch)
            assert (scores[0][:, p : p + 1, : alone.shape[2]] - alone).abs().max() <= bound * alone.abs().max()
    want = gradients(model, [padded])
    assert distance(gradients(model, [forked]), want) <= bound
    assert distance(gradients(model, apart), want) <= bound


FORKS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(forks=FORKS, seed=st.integers(0, 99))
def test_any_lengths_agree(build: Build, forks: list[tuple[int, int, int]], seed: int) -> None:
    model = build("grouped heads")
    examples = [(i, pair(trunk, lengths, seed + i)) for i, (trunk, *lengths) in enumerate(forks)]
    want = gradients(model, [pad(examples, pad_id=5)])
    assert distance(gradients(model, [pack(examples)]), want, floor=1e-5) <= 1e-10


PIECES = st.lists(st.tuples(st.integers(1, 7), st.integers(-2, 6)), min_size=1, max_size=6)  # tokens, which parent


@settings(max_examples=25)
@given(pieces=PIECES)
def test_any_forest(build: Build, pieces: list[tuple[int, int]]) -> None:
    """More than the two branches that a pair has, and branches of branches: states equal those of every text alone."""
    model, spans, lines = build("grouped heads"), list[tuple[int, ...]](), list[list[int]]()
    root = place = 0
    for i, (length, up) in enumerate(pieces):
        root = i if up < 0 or not i else root
        parent = () if root == i else (root + up % (i - root),)
        spans.append((place, place + length, *parent))
        lines.append([*(lines[parent[0]] if parent else []), *range(place, place + length)])
        place += length
    ids = torch.randint(0, VOCABULARY, (1, place), generator=torch.Generator().manual_seed(place))
    with torch.no_grad():
        forked = model.hidden(ids, spans=spans)
        for line in lines:
            alone = model.hidden(ids[:, line])
            assert (forked[:, line] - alone).abs().max() <= 1e-12 * alone.abs().max()


TEXT = st.lists(st.integers(0, 2), min_size=3, max_size=9)


@settings(max_examples=25)
@given(texts=st.lists(TEXT, min_size=1, max_size=7), start=st.integers(0, 5))
def test_any_texts_that_begin_alike(build: Build, texts: list[list[int]], start: int) -> None:
    """Rows to learn from, copies and beginnings of each other among them, each trained from a token of its own on."""
    model, rows = build("grouped heads"), [[5] * start + ids for ids in texts]
    trained = [[k > i % (len(ids) - 1) for k in range(len(ids))] for i, ids in enumerate(rows)]
    examples = [(i, Example((Encoded(ids, flags),))) for i, (ids, flags) in enumerate(zip(rows, trained, strict=True))]
    sums = []
    for batch in (pack(examples), pad(examples, 5)):
        hidden = model.hidden(batch.input_ids, None, batch.spans).flatten(0, 1)[batch.rows]
        loss = nn.functional.cross_entropy(model.lm_head(hidden), batch.targets, reduction="sum")
        sums.append((loss, batch.weight, *torch.autograd.grad(loss, [*model.parameters()])))
    (loss, weight, *found), (value, count, *want) = sums
    assert weight == count and abs(loss - value) <= 1e-10 * value
    least = 1e-5 * torch.stack([gradient.norm() for gradient in want]).norm()
    assert max((a - b).norm() / max(b.norm(), least) for a, b in zip(found, want, strict=True)) <= 1e-10


def test_a_shared_token_that_counts_once_is_caught(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pack

    def once(examples: Any) -> Batch:
        batch = original(examples)
        first = np.unique(batch.rows.numpy() << 32 | batch.targets.numpy(), return_index=True)[1]
        return replace(batch, rows=batch.rows[first], targets=batch.targets[first], trained=len(first))

    monkeypatch.setitem(globals(), "pack", once)
    with pytest.raises(AssertionError):
        test_any_texts_that_begin_alike.hypothesis.inner_test(build, [[1, 2, 0, 1], [1, 2, 0, 2]], 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["grouped heads", "lora on nf4"])
def test_another_branch_changes_nothing_to_the_bit(build: Build, kind: str) -> None:
    model = build(kind, torch.float32)
    batch = pack(PAIRS)
    trunk = next(i for i, span in enumerate(batch.spans or ()) if span[1] - span[0] == 30)
    for a, b, _ in batch.spans[trunk + 1 : trunk + 3]:
        changed = batch.input_ids.clone()
        changed[:, a:b] = (changed[:, a:b] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = (model.hidden(ids, batch.position_ids, batch.spans) for ids in (batch.input_ids, changed))
        assert torch.equal(before[:, :a], after[:, :a]) and torch.equal(before[:, b:], after[:, b:])
        assert not torch.equal(before[:, a:b], after[:, a:b])


def as_if(patch: pytest.MonkeyPatch, change: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """With other keys before a branch: `change` of those and of where it begins."""
    original = spans_module.segments

    def changed(*how: Any) -> Any:
        for start, end, keys in original(*how):
            before = keys[: len(keys) - (end - start)]
            yield start, end, np.concatenate((change(before, start) if len(before) else before, np.arange(start, end)))

    patch.setattr(spans_module, "segments", lambda *how: [*changed(*how)])


def branches_see_each_other(patch: pytest.MonkeyPatch) -> None:
    """One causal text: the second branch sees the first."""
    as_if(patch, lambda before, start: np.arange(before[0], start))


def branch_without_trunk(patch: pytest.MonkeyPatch) -> None:
    as_if(patch, lambda before, start: before[:0])


def trunk_one_short(patch: pytest.MonkeyPatch) -> None:
    """A branch begins one token later than it does."""
    as_if(patch, lambda before, start: before[:-1])


def upper_left(patch: pytest.MonkeyPatch) -> None:
    """The second branch's first token sees the first key only, as a causal mask aligned at the start has it."""
    original = Packed._batches

    def shifted(*how: Any) -> Any:
        made = original(*how)
        sees = [bias if bias is None else torch.ones_like(bias).tril() for bias in made.biases]
        return made._replace(biases=sees)

    patch.setattr(Packed, "_batches", shifted)


def positions_run_on(patch: pytest.MonkeyPatch) -> None:
    """The second branch is numbered after the first, as if it followed it."""
    original = Decoder.hidden

    def hidden(self: Any, ids: Tensor, positions: Tensor | None = None, spans: Any = None) -> Tensor:
        roots = [span[0] for span in spans or () if len(span) == 2]
        plain = [*itertools.pairwise([*roots, ids.numel()])]
        moved = span_positions(plain, ids.device).view(ids.shape) if plain else positions
        return original(self, ids, moved, spans)

    patch.setattr(Decoder, "hidden", hidden)


def target_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Answers are predicted from their own place, not from the one before."""
    original = pack

    def shifted(examples: Any) -> Batch:
        batch = original(examples)
        return replace(batch, rows=(batch.rows + 1).clamp(max=batch.tokens - 1))

    patch.setitem(globals(), "pack", shifted)


def first_target_from_the_row_before(patch: pytest.MonkeyPatch) -> None:
    """The second branch's first token is predicted from the token that stands before it: the first branch's last."""
    original = pack

    def wrong(examples: Any) -> Batch:
        batch = original(examples)
        rows = batch.rows.clone()
        for start, _, parent in (span for span in batch.spans or () if len(span) > 2):
            if batch.spans[parent][1] < start:
                (first,) = (rows == batch.spans[parent][1] - 1).nonzero()[-1]
                rows[first] = start - 1
        return replace(batch, rows=rows)

    patch.setitem(globals(), "pack", wrong)


@pytest.mark.parametrize(
    "fault",
    [
        *(branches_see_each_other, branch_without_trunk, trunk_one_short, upper_left, positions_run_on),
        *(target_off_by_one, first_target_from_the_row_before),
    ],
)
def test_planted_faults_are_caught(build: Build, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_forked_separate_and_padded_are_one(build, "grouped heads", torch.float32, 2e-5, False)
