"""Preference rows to tokens: pairs of answers, and single judged answers, each encoded as a whole conversation.

A prompt is never tokenised by itself: prompt and answer are one text, tokenised once, and where the answer begins is
told by characters (see `encode`). What two answers share is the longest beginning of equal tokens, wherever that ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .dataset import Dropped, Examples, OnBadRow, Paths, Report, Template, encode_all, read_files, without_tail
from .encode import UNKNOWN_STOP, Encoded, encode_conversation
from .preferences import Judged, Preference, judgements, preferences
from .protocol import TokenizerLike
from .read import BadRow
from .template import ChatTemplate, template_for

Truncation = Literal["drop", "answer"]
LOST = "lost to truncation"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each with the prompt before it; the first `shared` tokens of both are the same.

    At least one token of each is not shared, so a model that runs shared tokens once still has two branches.
    """

    chosen: Encoded
    rejected: Encoded
    shared: int
    source: str

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """The chosen answer, then the rejected one."""
        return (self.chosen, self.rejected)

    def content(self) -> list[object]:
        """All that training sees, as JSON."""
        return [part.content() for part in self.parts]


@dataclass(frozen=True)
class Judgement:
    """One answer with its prompt, and whether it is a good one."""

    answer: Encoded
    label: bool
    source: str

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """The one answer."""
        return (self.answer,)

    def content(self) -> list[object]:
        """All that training sees, as JSON."""
        return [self.answer.content(), self.label]


class PairDataset(Examples[Pair, Preference]):
    """Preference pairs, encoded, and the rows they came from."""


class JudgedDataset(Examples[Judgement, Judged]):
    """Judged answers, encoded, and the rows they came from."""


def load_preferences(
    paths: Paths,
    tokenizer: TokenizerLike,
    *,
    template: Template = None,
    max_length: int = 1024,
    truncation: Truncation = "drop",
    on_bad_row: OnBadRow = "error",
) -> PairDataset:
    """Read, check and encode pairs of answers from one or several files (forms: see `preferences`).

    `max_length` counts prompt and answer. With `truncation="drop"` a pair of which an answer is longer is left out and
    counted (`report.dropped`, `report.drops`); with "answer" that answer loses its tail and keeps its end of turn, and
    the pair is left out if nothing of the answer stays or both become the same. A prompt is never cut. Bad rows raise
    InputError, the first 20 one a line, or with `on_bad_row="skip"` are left out and counted. Raises InputError when no
    row is left, and for a template that is broken for every row.
    """
    dataset = PairDataset([], [], Report())
    encoder = _Encoder(tokenizer, template_for(tokenizer, template), max_length, truncation, dataset.report)

    def encode(row: Preference) -> tuple[Pair, Sequence[str]]:
        chosen, rejected = encoder.answers(row)
        pair = Pair(chosen, rejected, shared_tokens(chosen.ids, rejected.ids), chosen.source)
        return pair, sorted({*row.notes, *chosen.notes, *rejected.notes})

    encode_all(dataset, *read_files(paths, preferences), encode, encoder.template, on_bad_row)
    return dataset


def load_judged(
    paths: Paths,
    tokenizer: TokenizerLike,
    *,
    template: Template = None,
    max_length: int = 1024,
    truncation: Truncation = "drop",
    on_bad_row: OnBadRow = "error",
) -> JudgedDataset:
    """Read, check and encode answers that are each judged good or bad; all else as `load_preferences` does it."""
    dataset = JudgedDataset([], [], Report())
    encoder = _Encoder(tokenizer, template_for(tokenizer, template), max_length, truncation, dataset.report)

    def encode(row: Judged) -> tuple[Judgement, Sequence[str]]:
        (answer,) = encoder.answers(row)
        return Judgement(answer, row.label, answer.source), sorted({*row.notes, *answer.notes})

    encode_all(dataset, *read_files(paths, judgements), encode, encoder.template, on_bad_row)
    if len({example.label for example in dataset.examples}) == 1:
        kind = "good" if dataset.examples[0].label else "bad"
        dataset.report.notices.append(f"all {len(dataset)} answers are judged {kind}: there is nothing to compare with")
    return dataset


def shared_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with, leaving at least one of each."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)


@dataclass(frozen=True)
class _Encoder:
    """A row's answers in tokens, none longer than `max_length`."""

    tokenizer: TokenizerLike
    template: ChatTemplate
    max_length: int
    truncation: Truncation
    report: Report

    def __post_init__(self) -> None:
        if self.truncation not in ("drop", "answer"):
            raise ValueError(f'truncation must be "drop" or "answer", not {self.truncation!r}')
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")

    def answers(self, row: Preference | Judged) -> list[Encoded]:
        """Raises BadRow for a row that cannot be encoded, Dropped for one that is too long."""
        whole = [self._encode(row, name) for name in row.answers]
        _check_different(row, whole)
        fitted = [self._fit(row, name, answer) for name, answer in zip(row.answers, whole, strict=True)]
        cut = sum(a.ids is not b.ids for a, b in zip(fitted, whole, strict=True))
        if len({tuple(answer.ids) for answer in fitted}) < len(fitted):
            reason = f"cut to max_length {self.max_length}, chosen and rejected are the same"
            raise Dropped(row.problem("length", reason, LOST))
        self.report.truncated += cut
        return fitted

    def _encode(self, row: Preference | Judged, name: str) -> Encoded:
        try:
            return encode_conversation(row.answers[name], self.tokenizer, self.template)
        except BadRow as error:
            raise BadRow(replace(error.problem, field=f"{name}: {error.problem.field}")) from None

    def _fit(self, row: Preference | Judged, name: str, answer: Encoded) -> Encoded:
        """One answer within `max_length`. Raises Dropped where that is not to be had."""
        answer = without_tail(answer, self.max_length)
        length = len(answer.ids)
        if length <= self.max_length:
            return answer
        if self.truncation == "drop":
            reason = f"the {name} answer has {length} tokens with its prompt, more than max_length {self.max_length}"
            raise Dropped(row.problem("length", reason, "too long"))
        if UNKNOWN_STOP in answer.notes:
            reason = f"the {name} answer has {length} tokens and ends with no stop token, which cutting it could keep"
            raise Dropped(row.problem("length", reason, LOST))
        shorter = shorten(answer, self.max_length, self.tokenizer.stop_ids)
        if shorter is None:
            reason = (
                f"max_length {self.max_length} leaves nothing of the {name} answer ({length} tokens with its prompt)"
            )
            raise Dropped(row.problem("length", reason, LOST))
        return shorter


def _check_different(row: Preference | Judged, answers: Sequence[Encoded]) -> None:
    if len(answers) > 1 and len({tuple(answer.ids) for answer in answers}) == 1:
        reason = "become the same tokens (the template leaves out what sets them apart)"
        raise BadRow(row.problem("chosen, rejected", reason, "identical"))


def shorten(answer: Encoded, max_length: int, stops: Sequence[int]) -> Encoded | None:
    """An answer cut to at most `max_length` tokens that still ends as a turn ends; None if nothing of it is left.

    Its last turn loses its tail but not its end (the stop tokens it closes with). Where the cut falls before that turn,
    an earlier turn of the answer becomes the last one, whole, or cut in the same way.
    """
    last = max(i for i, trained in enumerate(answer.trained) if trained)
    first_end = last + 1
    while answer.trained[first_end - 1] and answer.ids[first_end - 1] in stops:
        first_end -= 1
    end = answer.ids[first_end : last + 1]
    keep = max_length - len(end)  # tokens before the end
    while keep > 0 and not answer.trained[keep - 1]:
        keep -= 1  # the cut falls between two turns, or into the prompt
    if keep <= 0:
        return None
    if answer.ids[keep - 1] not in stops:
        return replace(answer, ids=answer.ids[:keep] + end, trained=answer.trained[:keep] + [True] * len(end))
    return replace(answer, ids=answer.ids[:keep], trained=answer.trained[:keep])
