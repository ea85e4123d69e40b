"""Files to a checked, encoded dataset, with a report of everything that was found on the way."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import InputError
from .encode import Encoded, LossOn, encode_conversation
from .formats import Conversation, conversations
from .protocol import TokenizerLike
from .read import BadRow, Problem, read_rows
from .template import ChatTemplate, template_for

SHOWN_PROBLEMS = 20
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass
class Report:
    """What loading found: counts, the rows left out by kind, and notices for the user."""

    rows: int = 0  # rows that became examples
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    duplicates: int = 0
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Dataset:
    """Examples and the conversations they came from, in file order."""

    examples: list[Encoded]
    conversations: list[Conversation]
    report: Report

    def __len__(self) -> int:
        return len(self.examples)


def load_dataset(
    paths: Paths,
    tokenizer: TokenizerLike,
    *,
    template: str | os.PathLike[str] | ChatTemplate | None = None,
    max_length: int = 1024,
    loss_on: LossOn = "assistant",
    on_bad_row: Literal["error", "skip"] = "error",
) -> Dataset:
    """Read, check and encode one or several files.

    An example longer than `max_length` tokens loses its tail where no trained token stands there (counted as
    truncated); where one does, the row is bad: an answer cut short teaches a model not to stop. Bad rows raise
    InputError, the first 20 one a line, or with `on_bad_row="skip"` are left out and counted. Raises InputError when no
    row is left, and for a template that is broken for every row.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row must be "error" or "skip", not {on_bad_row!r}')
    chat_template = template_for(tokenizer, template)
    found, problems = read_conversations(paths)
    dataset = Dataset([], [], Report())
    notes: Counter[str] = Counter()
    for conv in found:
        try:
            example = _fit(
                encode_conversation(conv, tokenizer, chat_template, loss_on=loss_on), conv, max_length, dataset.report
            )
        except BadRow as bad:
            problems.append(bad.problem)
            continue
        dataset.examples.append(example)
        dataset.conversations.append(conv)
        notes.update(example.notes)
    _settle(problems, on_bad_row, dataset)
    _fill_report(dataset, notes, chat_template)
    return dataset


def read_conversations(paths: Paths) -> tuple[list[Conversation], list[Problem]]:
    """The conversations of one or several files, and the problems of the rows that are none."""
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise InputError("no data file was named: give at least one .jsonl file.")
    found: list[Conversation] = []
    problems: list[Problem] = []
    for name in names:
        rows, unread = read_rows(name)
        good, bad = conversations(rows)
        found += good
        problems += sorted(unread + bad, key=lambda problem: problem.line)
    return found, problems


def _fit(example: Encoded, conv: Conversation, max_length: int, report: Report) -> Encoded:
    """Cut an example to `max_length` tokens; BadRow if that would cut an answer."""
    length = len(example.ids)
    if length <= max_length:
        return example
    if any(example.trained[max_length:]):
        reason = (
            f"{length} tokens, and max_length {max_length} cuts off the end of an answer: raise it or skip such rows"
        )
        raise BadRow(conv.problem("length", reason, "too long"))
    report.truncated += 1
    return Encoded(example.ids[:max_length], example.trained[:max_length], example.text, example.source, example.notes)


def _settle(problems: list[Problem], on_bad_row: str, dataset: Dataset) -> None:
    """Raise for bad rows, or count them."""
    if problems and on_bad_row == "error":
        raise InputError(describe(problems, len(dataset.examples) + len(problems)))
    if not dataset.examples:
        raise InputError(describe(problems, len(problems)))
    dataset.report.problems = problems
    dataset.report.skipped = dict(Counter(problem.kind for problem in problems))


def describe(problems: Sequence[Problem], rows: int) -> str:
    """Many problems as one message: the first 20, one a line, and how many there are."""
    lines = [str(problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    head = f"{len(problems)} of {rows} rows cannot be used; mend them, or leave them out with on_bad_row skip:"
    return "\n".join([head, *lines])


def _fill_report(dataset: Dataset, notes: Counter[str], template: ChatTemplate) -> None:
    report, examples = dataset.report, dataset.examples
    report.rows = len(examples)
    report.tokens = sum(len(example.ids) for example in examples)
    report.trained = sum(sum(example.trained) for example in examples)
    report.longest = max((len(example.ids) for example in examples), default=0)
    report.duplicates = len(examples) - len({row_key(conv) for conv in dataset.conversations})
    report.notices = [template.notice] if template.notice else []
    if "strftime_now" in template.source and template.date is None:
        report.notices.append(
            "the chat template writes today's date into every example: another day gives other tokens"
        )
    if report.duplicates:
        report.notices.append(f"{report.duplicates} of {report.rows} rows repeat an earlier row")
    report.notices += [f"{count} of {report.rows} rows: {note}" for note, count in sorted(notes.items())]


def row_key(conv: Conversation) -> bytes:
    """SHA-256 of a row's content: the same for the same messages and tools, wherever they stand."""
    content = json.dumps([conv.messages, conv.tools], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).digest()


def split_validation(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """(train, validation): a row's side depends on its content alone, so it stays when rows are added or moved.

    Equal rows go to one side. `fraction` is the expected share of validation; each side gets at least one row where the
    dataset has two different ones.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, not {fraction}")
    keys = [row_key(conv) for conv in dataset.conversations]
    held = {key for key in keys if int.from_bytes(key[:8], "big") < fraction * 2**64}
    if len(set(keys)) >= 2:
        held = held or {min(keys)}
        held = held - {max(keys)} if held == set(keys) else held
    return _subset(dataset, [key not in held for key in keys]), _subset(dataset, [key in held for key in keys])


def _subset(dataset: Dataset, chosen: list[bool]) -> Dataset:
    examples = [example for example, keep in zip(dataset.examples, chosen, strict=True) if keep]
    kept = [conv for conv, keep in zip(dataset.conversations, chosen, strict=True) if keep]
    report = Report(
        rows=len(examples),
        tokens=sum(len(example.ids) for example in examples),
        trained=sum(sum(example.trained) for example in examples),
        longest=max((len(example.ids) for example in examples), default=0),
        duplicates=len(kept) - len({row_key(conv) for conv in kept}),
    )
    return Dataset(examples, kept, report)


def count_overlap(train: Dataset, validation: Dataset) -> int:
    """Validation rows whose very content also stands in train: a leak, and a score that means little."""
    seen = {row_key(conv) for conv in train.conversations}
    return sum(row_key(conv) in seen for conv in validation.conversations)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) of every example's token ids and mask, in order: equal when training would see the same data."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        digest.update(json.dumps([example.ids, [int(t) for t in example.trained]], separators=(",", ":")).encode())
    return digest.hexdigest()
