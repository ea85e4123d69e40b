"""Files to a checked, encoded dataset, with a report of everything that was found on the way."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from ..errors import InputError
from .encode import Encoded, LossOn, encode_conversation
from .formats import Conversation, conversations
from .protocol import TokenizerLike
from .read import BadRow, Problem, Row, read_rows
from .template import ChatTemplate, template_for

SHOWN_PROBLEMS = 20
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
OnBadRow = Literal["error", "skip"]
Template = str | os.PathLike[str] | ChatTemplate | None


class ReadRow(Protocol):
    """A row once it is understood: a conversation, a pair of answers, an answer and its judgement."""

    def content(self) -> list[Any]:
        """What makes two rows the same row, as JSON."""

    def topic(self) -> list[Any]:
        """What rows have in common that must stay on one side of a split, as JSON."""


class Example(Protocol):
    """A row in tokens."""

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """Each token sequence of it."""

    def content(self) -> list[Any]:
        """All that training sees of it, as JSON."""


E = TypeVar("E", bound=Example)
R = TypeVar("R", bound=ReadRow)


class Dropped(BadRow):
    """A row that is in order but was asked to be left out (too long): counted, and no error."""


@dataclass
class Report:
    """What loading found: counts, the rows left out by kind, and notices for the user."""

    rows: int = 0  # rows that became examples
    skipped: dict[str, int] = field(default_factory=dict)  # bad rows, by kind
    dropped: dict[str, int] = field(default_factory=dict)  # good rows left out as asked, by kind
    truncated: int = 0  # token sequences that lost their tail
    tokens: int = 0
    shared: int = 0  # of these, tokens that stand a second time only because two answers begin alike
    trained: int = 0
    longest: int = 0  # tokens of the longest sequence
    duplicates: int = 0
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # of the rows skipped
    drops: list[Problem] = field(default_factory=list)  # of the rows dropped


@dataclass
class Examples(Generic[E, R]):
    """Examples and the rows they came from, in file order."""

    examples: list[E]
    rows: list[R]
    report: Report

    def __len__(self) -> int:
        return len(self.examples)


class Dataset(Examples[Encoded, Conversation]):
    """Conversations, encoded."""

    @property
    def conversations(self) -> list[Conversation]:
        return self.rows


def load_dataset(
    paths: Paths,
    tokenizer: TokenizerLike,
    *,
    template: Template = None,
    max_length: int = 1024,
    loss_on: LossOn = "assistant",
    on_bad_row: OnBadRow = "error",
) -> Dataset:
    """Read, check and encode one or several files.

    An example longer than `max_length` tokens loses its tail where no trained token stands there (counted as
    truncated); where one does, the row is bad: an answer cut short teaches a model not to stop. Bad rows raise
    InputError, the first 20 one a line, or with `on_bad_row="skip"` are left out and counted. Raises InputError when no
    row is left, and for a template that is broken for every row.
    """
    chat_template = template_for(tokenizer, template)
    dataset = Dataset([], [], Report())

    def encode(conv: Conversation) -> tuple[Encoded, Sequence[str]]:
        whole = encode_conversation(conv, tokenizer, chat_template, loss_on=loss_on)
        example = without_tail(whole, max_length)
        dataset.report.truncated += example is not whole
        if len(example.ids) > max_length:
            reason = (
                f"{len(example.ids)} tokens, and max_length {max_length} cuts off the end of an answer:"
                " raise it or skip such rows"
            )
            raise BadRow(conv.problem("length", reason, "too long"))
        return example, example.notes

    encode_all(dataset, *read_conversations(paths), encode, chat_template, on_bad_row)
    return dataset


def encode_all(
    dataset: Examples[E, R],
    rows: Sequence[R],
    problems: list[Problem],
    encode: Callable[[R], tuple[E, Sequence[str]]],
    template: ChatTemplate,
    on_bad_row: OnBadRow,
) -> None:
    """Fill a dataset and its report: `encode` makes an example of a row and says what is to be noted about it.

    Its BadRows join `problems`, which raise InputError unless they are to be skipped; its Droppeds are counted.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row must be "error" or "skip", not {on_bad_row!r}')
    notes: Counter[str] = Counter()
    for row in rows:
        try:
            example, noted = encode(row)
        except Dropped as dropped:
            dataset.report.drops.append(dropped.problem)
        except BadRow as bad:
            problems.append(bad.problem)
        else:
            dataset.examples.append(example)
            dataset.rows.append(row)
            notes.update(noted)
    _settle(problems, on_bad_row, dataset)
    _fill_report(dataset, notes, template)


def read_conversations(paths: Paths) -> tuple[list[Conversation], list[Problem]]:
    """The conversations of one or several files, and the problems of the rows that are none."""
    return read_files(paths, conversations)


def read_files(
    paths: Paths, understand: Callable[[list[Row]], tuple[list[R], list[Problem]]]
) -> tuple[list[R], list[Problem]]:
    """What `understand` makes of the rows of each file, and all problems in the order of files and lines."""
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise InputError("no data file was named: give at least one .jsonl file.")
    found: list[R] = []
    problems: list[Problem] = []
    for name in names:
        rows, unread = read_rows(name)
        good, bad = understand(rows)
        found += good
        problems += sorted(unread + bad, key=lambda problem: problem.line)
    return found, problems


def without_tail(example: Encoded, max_length: int) -> Encoded:
    """An example that is too long, cut to `max_length` tokens if no trained one is lost by it."""
    if len(example.ids) <= max_length or any(example.trained[max_length:]):
        return example
    return replace(example, ids=example.ids[:max_length], trained=example.trained[:max_length])


def _settle(problems: list[Problem], on_bad_row: str, dataset: Examples[E, R]) -> None:
    """Raise for bad rows, or count them."""
    report = dataset.report
    rows = len(dataset.examples) + len(problems) + len(report.drops)
    if problems and on_bad_row == "error":
        raise InputError(describe(problems, rows))
    if not dataset.examples and report.drops:
        raise InputError(f"no row is left of {rows}; {len(report.drops)} were left out, the first: {report.drops[0]}")
    if not dataset.examples:
        raise InputError(describe(problems, rows))
    report.problems = problems
    report.skipped, report.dropped = (dict(Counter(p.kind for p in ps)) for ps in (problems, report.drops))


def describe(problems: Sequence[Problem], rows: int) -> str:
    """Many problems as one message: the first 20, one a line, and how many there are."""
    lines = [str(problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    head = f"{len(problems)} of {rows} rows cannot be used; mend them, or leave them out with on_bad_row skip:"
    return "\n".join([head, *lines])


def _fill_report(dataset: Examples[E, R], notes: Counter[str], template: ChatTemplate) -> None:
    report = dataset.report
    _measure(dataset)
    report.notices = [template.notice] if template.notice else []
    if "strftime_now" in template.source and template.date is None:
        report.notices.append(
            "the chat template writes today's date into every example: another day gives other tokens"
        )
    if report.duplicates:
        report.notices.append(f"{report.duplicates} of {report.rows} rows repeat an earlier row")
    report.notices += [f"{count} of {report.rows} rows: {note}" for note, count in sorted(notes.items())]


def _measure(dataset: Examples[E, R]) -> None:
    """Fill in the counts that follow from the examples alone."""
    report, parts = dataset.report, [part for example in dataset.examples for part in example.parts]
    report.rows = len(dataset.examples)
    report.tokens = sum(len(part.ids) for part in parts)
    report.shared = sum(getattr(example, "shared", 0) for example in dataset.examples)
    report.trained = sum(sum(part.trained) for part in parts)
    report.longest = max((len(part.ids) for part in parts), default=0)
    report.duplicates = report.rows - len({row_key(row) for row in dataset.rows})


def row_key(row: ReadRow) -> bytes:
    """SHA-256 of a row's content: the same for the same messages and tools, wherever they stand."""
    return _sha256(row.content())


def _sha256(content: list[Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


D = TypeVar("D", bound=Examples[Any, Any])


def split_validation(dataset: D, fraction: float) -> tuple[D, D]:
    """(train, validation): a row's side depends on its topic alone, so it stays when rows are added or moved.

    The topic of a conversation is all of it, of preference rows the prompt; rows of one topic go to one side.
    `fraction` is the expected share of validation; each side gets at least one row where there are two topics. What was
    skipped or dropped on reading stays in the report of the training side.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, not {fraction}")
    keys = [_sha256(row.topic()) for row in dataset.rows]
    held = {key for key in keys if int.from_bytes(key[:8], "big") < fraction * 2**64}
    if len(set(keys)) >= 2:
        held = held or {min(keys)}
        held = held - {max(keys)} if held == set(keys) else held
    train = _subset(dataset, [key not in held for key in keys])
    train.report.skipped, train.report.dropped = dataset.report.skipped, dataset.report.dropped
    return train, _subset(dataset, [key in held for key in keys])


def _subset(dataset: D, chosen: list[bool]) -> D:
    examples = [example for example, keep in zip(dataset.examples, chosen, strict=True) if keep]
    kept = [row for row, keep in zip(dataset.rows, chosen, strict=True) if keep]
    part = type(dataset)(examples, kept, Report())
    _measure(part)
    return part


def count_overlap(train: Examples[Any, Any], validation: Examples[Any, Any]) -> int:
    """Validation rows whose topic (see `split_validation`) also stands in train: a leak; a score that means little."""
    seen = {_sha256(row.topic()) for row in train.rows}
    return sum(_sha256(row.topic()) in seen for row in validation.rows)


def fingerprint(dataset: Examples[Any, Any]) -> str:
    """SHA-256 (hex) of all that training sees, in order: every example's token ids and mask, and its judgement."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        digest.update(json.dumps(example.content(), separators=(",", ":")).encode())
    return digest.hexdigest()
