"""Preference rows: pairs of answers, and single answers that are judged, in the forms of TRL, OpenAI, ShareGPT, Alpaca.

The form of a file is recognised by itself and every row is held to it (see `formats`). What comes out is one shape
whatever went in: the messages of the prompt, whose assistant turns are context, and those of each answer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .formats import Conversation, by_form, check_form, is_judged
from .messages import as_context, bad, trains, type_name
from .preference_forms import (
    SAME,
    Messages,
    Parts,
    alpaca_pair,
    core,
    labelled,
    openai_pair,
    sharegpt_pair,
    tagged_conversation,
    tagged_instruction,
    trl_pair,
)
from .read import BadRow, Problem, Row, excerpt

PAIRS: dict[str, Callable[[Row], Parts]] = {
    "prompt/chosen/rejected": trl_pair,
    "preferred_output/non_preferred_output": openai_pair,
    "conversations/chosen/rejected": sharegpt_pair,
    "instruction/chosen/rejected": alpaca_pair,
}
JUDGED: dict[str, Callable[[Row], Parts]] = {
    "prompt/completion/label": labelled,
    "conversations/kto_tag": tagged_conversation,
    "messages/kto_tag": tagged_conversation,
    "instruction/kto_tag": tagged_instruction,
}
USE_PAIRS = 'use {"prompt": ..., "chosen": ..., "rejected": ...}'
USE_JUDGED = 'use {"prompt": ..., "completion": ..., "label": true or false}'


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers to it, of which the first is preferred. Answers begin and end with assistant turns."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    file: str
    line: int
    tools: Messages | None = None
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> dict[str, Conversation]:
        """Both answers by their name, each as the whole conversation."""
        named = {"chosen": self.chosen, "rejected": self.rejected}
        return {name: _whole(self, answer) for name, answer in named.items()}

    def problem(self, field: str, reason: str, kind: str = "row") -> Problem:
        """A problem that names this row."""
        return Problem(self.file, self.line, field, reason, kind)

    def content(self) -> list[Any]:
        """What makes two rows the same row."""
        return [_seen(self.prompt), _seen(self.chosen), _seen(self.rejected), self.tools]

    def topic(self) -> list[Any]:
        """Pairs of one prompt must not stand on both sides of a split."""
        return [_seen(self.prompt), self.tools]


@dataclass(frozen=True)
class Judged:
    """A prompt, one answer to it and whether it is a good one (`label`)."""

    prompt: Messages
    completion: Messages
    label: bool
    file: str
    line: int
    tools: Messages | None = None
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> dict[str, Conversation]:
        """The answer by its name, as the whole conversation."""
        return {"completion": _whole(self, self.completion)}

    def problem(self, field: str, reason: str, kind: str = "row") -> Problem:
        """A problem that names this row."""
        return Problem(self.file, self.line, field, reason, kind)

    def content(self) -> list[Any]:
        """What makes two rows the same row."""
        return [_seen(self.prompt), _seen(self.completion), self.label, self.tools]

    def topic(self) -> list[Any]:
        """Answers to one prompt must not stand on both sides of a split."""
        return [_seen(self.prompt), self.tools]


def _seen(messages: Messages) -> list[tuple[Any, ...]]:
    """What a model sees of messages: an id that differs makes no other prompt."""
    return [core(message) for message in messages]


def preferences(rows: Iterable[Row]) -> tuple[list[Preference], list[Problem]]:
    """Every row of one file as a pair of answers, or as a problem."""
    return by_form(rows, recognise_pair, preference)


def judgements(rows: Iterable[Row]) -> tuple[list[Judged], list[Problem]]:
    """Every row of one file as a judged answer, or as a problem."""
    return by_form(rows, recognise_judged, judged)


def recognise_pair(row: Row) -> str | None:
    """The form of a row with two answers, or None when its keys belong to none."""
    keys = row.data.keys()
    if keys & {"preferred_output", "non_preferred_output"}:
        return "preferred_output/non_preferred_output"
    if not keys & {"chosen", "rejected"}:
        return None
    if "conversations" in keys:
        return "conversations/chosen/rejected"
    return "instruction/chosen/rejected" if "instruction" in keys else "prompt/chosen/rejected"


def recognise_judged(row: Row) -> str | None:
    """The form of a row with one answer and a judgement, or None when its keys belong to none."""
    keys = row.data.keys()
    if "kto_tag" in keys:
        first = next((key for key in ("conversations", "messages", "instruction") if key in keys), None)
        return f"{first}/kto_tag" if first else None
    return "prompt/completion/label" if keys >= {"completion", "label"} else None


def preference(row: Row, form: str | None = None) -> Preference:
    """One row as a pair of answers. Raises BadRow when it is not of `form` (None: any) or breaks a rule of it."""
    own = recognise_pair(row)
    if own is None:
        raise _unknown(row, "a preference pair", USE_PAIRS)
    check_form(row, own, form)
    parts = PAIRS[own](row)
    names = own.split("/")[-2:]
    for name, answer in zip(names, parts.answers, strict=True):
        _check(row, parts.prompt, answer, name)
    chosen, rejected = parts.answers
    if list(map(core, chosen)) == list(map(core, rejected)):
        raise bad(row, ", ".join(names), SAME, "identical")
    return Preference(as_context(parts.prompt), chosen, rejected, row.file, row.line, parts.tools, parts.notes)


def judged(row: Row, form: str | None = None) -> Judged:
    """One row as a judged answer. Raises BadRow when it is not of `form` (None: any) or breaks a rule of it."""
    own = recognise_judged(row)
    if own is None:
        raise _unknown(row, "an answer with a judgement", USE_JUDGED)
    check_form(row, own, form)
    key = own.split("/")[-1]
    label = row.data[key]
    if not isinstance(label, bool):
        raise bad(row, key, f"must be true (a good answer) or false, not {type_name(label)}")
    parts = JUDGED[own](row)
    (answer,) = parts.answers
    field = {"prompt": "completion", "instruction": "output"}.get(own.split("/")[0], "last message")
    _check(row, parts.prompt, answer, field)
    return Judged(as_context(parts.prompt), answer, label, row.file, row.line, parts.tools, parts.notes)


def _whole(row: Preference | Judged, answer: Messages) -> Conversation:
    return Conversation(row.prompt + answer, row.file, row.line, row.tools)


def _unknown(row: Row, wanted: str, use: str) -> BadRow:
    keys = ", ".join(map(repr, list(row.data)[:6])) or "none"
    seen = ""
    if use == USE_JUDGED and recognise_pair(row):
        seen = "; it looks like a preference pair"
    elif use == USE_PAIRS and is_judged(row):
        seen = "; it looks like an answer with a judgement, which losses for unpaired answers take"
    elif {"messages", "completion"} & row.data.keys():
        seen = "; it looks like a row of `fourbit sft`, with one answer and no judgement"
    return bad(row, "row", f"is not {wanted}, keys are {excerpt(keys, 80)[1:-1]}{seen}: {use}", "form")


def _check(row: Row, prompt: Messages, answer: Messages, field: str) -> None:
    """The rules that all forms share: something is asked, and an assistant answers."""
    if not prompt:
        raise bad(row, "prompt", "is empty: an answer needs something before it")
    for place, message in (("first", answer[0]), ("last", answer[-1])):
        if message["role"] != "assistant":
            raise bad(row, field, f"must be by the assistant, but its {place} message has the role {message['role']!r}")
    if not any(trains(message) for message in answer):
        raise bad(row, field, "every assistant turn has weight 0: nothing to train", "nothing to train")
