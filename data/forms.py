"""Every form of a data row, in one table, and the one shape that each becomes: a Sample.

A form is one entry of FORMS: the kind of training it serves, its name, how its rows are told by their keys, what makes
a Sample of one, and the fields that are read. A file has one form, told from its first rows; every row is then held to
it, and a row that does not fit is a problem with its line, its field and the reason.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ..errors import InputError
from .dialects import (
    answer_messages,
    both,
    conversation,
    instruction,
    prompt_completion,
    question,
    spoken,
    trl_parts,
    with_system,
)
from .read import (
    ROLE_SYNONYMS,
    Messages,
    as_context,
    checked_messages,
    checked_tools,
    core,
    filled,
    read_rows,
    trains,
    turn,
)
from .row import UNUSED, BadRow, Problem, Row, bad, excerpt, type_name

Kind = Literal["sft", "pairs", "judged", "prompts"]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

DETECT_ROWS = 200
WANTED = {  # of each kind: what a row of it is, who reads it, and how one may be written
    "sft": (
        "a row to learn from",
        "`fourbit sft` reads",
        '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}',
    ),
    "pairs": ("a preference pair", "`fourbit dpo` reads", '{"prompt": ..., "chosen": ..., "rejected": ...}'),
    "judged": (
        "an answer with a judgement",
        "losses for unpaired answers take",
        '{"prompt": ..., "completion": ..., "label": true or false}',
    ),
    "prompts": (
        "a prompt to answer",
        "`fourbit generate` reads",
        '{"prompt": ...} or {"messages": [{"role": ..., "content": ...}, ...]}',
    ),
}


@dataclass(frozen=True)
class Sample:
    """A row, understood.

    Answers begin and end with assistant turns; each stands after the whole context, whose assistant turns are not
    learned. Of a row to learn from as a whole (chat), the context is empty and the answer is all of it: there `weight`
    0 keeps a turn out of the loss.
    """

    context: Messages
    answers: tuple[Messages, ...]  # one; of a pair the chosen and the rejected one; of a prompt none
    file: str
    line: int
    tools: Messages | None = None
    label: bool | None = None  # of a judged answer: whether it is a good one
    text: str | None = None  # of plain text: all there is
    row: dict[str, Any] = field(default_factory=dict)  # of a prompt: the row itself, to be written with its answer
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of each conversation the name of its answer, "" where no other could be meant."""
        if len(self.answers) > 1:
            return ("chosen", "rejected")
        return ("",) if self.label is None else ("completion",)

    def problem(self, field: str, reason: str, kind: str = "row") -> Problem:
        """A problem that names this row."""
        return Problem(self.file, self.line, field, reason, kind)

    def content(self) -> list[Any]:
        """What makes two rows the same row, as JSON."""
        learned = [[(core(message), trains(message)) for message in answer] for answer in self.answers]
        return [list(map(core, self.context)), learned, self.label, self.text, self.tools]

    def topic(self) -> list[Any]:
        """What rows have in common that must stay on one side of a split, as JSON: the prompt, or all there is."""
        if self.context:
            return [list(map(core, self.context)), self.tools]
        return [self.text] if self.text is not None else [list(map(core, self.answers[0])), self.tools]


Matches = Callable[[dict[str, Any]], bool]


class Form(NamedTuple):
    """One form: `matches` looks at a row's keys, `sample` raises BadRow for a row that breaks a rule of the form."""

    kind: Kind
    name: str
    matches: Matches
    sample: Callable[[Row], Sample]
    fields: tuple[str, ...]


def read_samples(paths: Paths, kind: Kind) -> tuple[list[Sample], list[Problem]]:
    """The samples of one or several files, and the problems of the rows that are none, in the order of files, lines."""
    found: list[Sample] = []
    problems: list[Problem] = []
    for name in _names(paths):
        rows, unread = read_rows(name)
        good, bad_ones = samples(rows, kind)
        found += good
        problems += sorted(unread + bad_ones, key=lambda problem: problem.line)
    return found, problems


def kind_of(paths: Paths) -> Kind:
    """What most of the first rows are: "judged", "pairs" or, of all others, "sft"."""
    rows, _ = read_rows(_names(paths)[0])
    kinds: tuple[Kind, ...] = ("judged", "pairs", "sft")
    seen = Counter(kind for row in rows[:DETECT_ROWS] for kind in kinds if recognise(row.data, kind))
    return seen.most_common(1)[0][0] if seen else "sft"


def _names(paths: Paths) -> list[str | os.PathLike[str]]:
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise InputError("no data file was named: give at least one .jsonl file.")
    return names


def samples(rows: Sequence[Row], kind: Kind) -> tuple[list[Sample], list[Problem]]:
    """Every row of one file as a sample, or as a problem. The file's form is the one most of its first 200 rows have;
    prompts may mix theirs."""
    seen = Counter(form.name for row in rows[:DETECT_ROWS] if (form := recognise(row.data, kind)))
    name = seen.most_common(1)[0][0] if seen and kind != "prompts" else None
    good: list[Sample] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            good.append(sample(row, kind, name))
        except BadRow as error:
            problems.append(error.problem)
    return good, problems


def sample(row: Row, kind: Kind, name: str | None = None) -> Sample:
    """One row as a sample. Raises BadRow when it is not of the form `name` (None: any) or breaks a rule of it."""
    form = recognise(row.data, kind)
    if form is None:
        raise _unknown(row, kind)
    if name is not None and form.name != name:
        reason = f"is of the {form.name} form, but this file's first rows are of the {name} form: one form a file"
        raise bad(row, "row", reason, "form")
    made = form.sample(row)
    unused = [UNUSED + excerpt(key) for key in row.data if key not in form.fields]
    return replace(made, notes=(*made.notes, *unused)) if unused else made


def recognise(data: dict[str, Any], kind: Kind) -> Form | None:
    """The form of a row, told by its keys; None when they belong to none of this kind."""
    return next((form for form in FORMS if form.kind == kind and form.matches(data)), None)


def _unknown(row: Row, kind: Kind) -> BadRow:
    wanted, _, use = WANTED[kind]
    others = (other for other in ("judged", "pairs", "sft") if other != kind and recognise(row.data, other))
    seen = next((f"; it looks like {WANTED[other][0]}, which {WANTED[other][1]}" for other in others), "")
    reason = f"is not {wanted}, keys are {_listed(list(row.data)) or 'none'}{seen}: use {use}"
    return bad(row, "row", reason, "form")


def _listed(keys: Sequence[str]) -> str:
    return excerpt(", ".join(map(repr, keys[:6])), 80)[1:-1]


def _learned(row: Row, *parts: Messages) -> Sample:
    """A whole conversation to learn from."""
    messages = [message for part in parts for message in part]
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        reason = f"has the role {role!r}: a conversation must end with an assistant turn, the answer to learn"
        raise bad(row, "last message", reason, "nothing to train")
    if not any(trains(message) for message in messages):
        raise bad(row, "messages", "every assistant turn has weight 0: nothing to train", "nothing to train")
    if trains(messages[0]):
        raise bad(row, "first message", "is an assistant turn: an answer needs something before it")
    return Sample([], (messages,), row.file, row.line, _tools(row))


def _compared(
    row: Row,
    context: Messages,
    chosen: Messages,
    rejected: Messages,
    tools: Messages | None,
    fields: tuple[str, str] = ("chosen", "rejected"),
    notes: tuple[str, ...] = (),
) -> Sample:
    """Two answers to one prompt, of which the first is preferred."""
    for name, said in zip(fields, (chosen, rejected), strict=True):
        _check_answer(row, context, said, name)
    if list(map(core, chosen)) == list(map(core, rejected)):
        raise bad(row, ", ".join(fields), "are the same: a pair needs two different answers", "identical")
    return Sample(as_context(context), (chosen, rejected), row.file, row.line, tools, notes=notes)


def _judged(row: Row, context: Messages, answer: Messages, field: str, key: str = "kto_tag") -> Sample:
    """One answer and whether it is a good one, which the field `key` says."""
    label = row.data[key]
    if not isinstance(label, bool):
        raise bad(row, key, f"must be true (a good answer) or false, not {type_name(label)}")
    _check_answer(row, context, answer, field)
    return Sample(as_context(context), (answer,), row.file, row.line, _tools(row), label)


def _asked(row: Row, messages: Messages) -> Sample:
    """A prompt to be answered."""
    if not messages:
        raise bad(row, "prompt", "is empty: an answer needs something before it")
    return Sample(as_context(messages), (), row.file, row.line, _tools(row), row=row.data)


def _check_answer(row: Row, context: Messages, answer: Messages, field: str) -> None:
    """Something is asked, and an assistant answers."""
    if not context:
        raise bad(row, "prompt", "is empty: an answer needs something before it")
    for place, message in (("first", answer[0]), ("last", answer[-1])):
        if message["role"] != "assistant":
            raise bad(row, field, f"must be by the assistant, but its {place} message has the role {message['role']!r}")
    if not any(trains(message) for message in answer):
        raise bad(row, field, "every assistant turn has weight 0: nothing to train", "nothing to train")


def _tools(row: Row) -> Messages | None:
    return checked_tools(row, "tools", row.data.get("tools"))


def _output(row: Row) -> Messages:
    return turn(row, "output", row.data.get("output"), "assistant")


def _chat(row: Row) -> Sample:
    if "completion" in row.data:
        raise bad(row, "row", "has both `messages` and `completion`: keep one of the two forms", "form")
    return _learned(row, checked_messages(row, "messages", row.data["messages"]))


def _text(row: Row) -> Sample:
    """Plain text, of which every token is learned."""
    text = row.data["text"]
    if not isinstance(text, str):
        raise bad(row, "text", f"must be a string, not {type_name(text)}")
    return Sample([], (), row.file, row.line, text=filled(row, "text", text))


def _openai_pair(row: Row) -> Sample:
    fields = ("preferred_output", "non_preferred_output")
    outputs = both(row, *fields)
    source = row.data.get("input")
    if not isinstance(source, dict):
        raise bad(row, "input", f"must be an object with `messages`, not {type_name(source)}")
    context = checked_messages(row, "input.messages", source.get("messages"))
    chosen, rejected = (answer_messages(row, field, output) for field, output in zip(fields, outputs, strict=True))
    return _compared(row, context, chosen, rejected, checked_tools(row, "input.tools", source.get("tools")), fields)


def _sharegpt_pair(row: Row) -> Sample:
    """Each answer is one message, or a list."""
    given = zip(("chosen", "rejected"), both(row, "chosen", "rejected"), strict=True)
    chosen, rejected = (spoken(row, key, value if isinstance(value, list) else [value]) for key, value in given)
    return _compared(row, conversation(row, "conversations"), chosen, rejected, _tools(row))


def _alpaca_pair(row: Row) -> Sample:
    chosen, rejected = both(row, "chosen", "rejected")
    answers = turn(row, "chosen", chosen, "assistant"), turn(row, "rejected", rejected, "assistant")
    return _compared(row, instruction(row), *answers, None)


def _trl_pair(row: Row) -> Sample:
    (prompt, chosen, rejected), notes = trl_parts(row)
    return _compared(row, with_system(row, prompt), chosen, rejected, _tools(row), notes=notes)


def _completion(row: Row) -> Sample:
    return _learned(row, *prompt_completion(row))


def _talk(row: Row) -> Sample:
    return _learned(row, conversation(row, "conversations"))


def _task(row: Row) -> Sample:
    return _learned(row, instruction(row), _output(row))


def _judged_completion(row: Row) -> Sample:
    return _judged(row, *prompt_completion(row), "completion", "label")


def _judged_task(row: Row) -> Sample:
    return _judged(row, instruction(row), _output(row), "output")


def _judged_talk(row: Row) -> Sample:
    """The last message is the answer."""
    messages = conversation(row, "conversations" if "conversations" in row.data else "messages")
    return _judged(row, messages[:-1], messages[-1:], "last message")


def _asked_task(row: Row) -> Sample:
    return _asked(row, instruction(row))


def _asked_prompt(row: Row) -> Sample:
    return _asked(row, question(row, "prompt"))


def _asked_talk(row: Row) -> Sample:
    """The answer that the conversation may end with is left out."""
    key = "messages" if "messages" in row.data else "conversations"
    given = row.data[key]
    if isinstance(given, list) and given and isinstance(given[-1], dict):
        speaker = str(given[-1].get("from")).lower()
        answered = "assistant" in (given[-1].get("role"), ROLE_SYNONYMS.get(speaker, speaker))
        given = given[:-1] if answered else given
    return _asked(row, conversation(replace(row, data={**row.data, key: given}), key) if given != [] else [])


# The table: the first entry of a kind that matches is a row's form.


def _learns(key: str, *beside: str) -> Matches:
    """Rows with the field `key` and none of those named besides, that hold no judgement: half of the answers that are
    judged are not to be imitated."""
    return lambda row: (
        key in row
        and not row.keys() & {*beside, "kto_tag"}
        and not ("completion" in row and isinstance(row.get("label"), bool))
    )


def _has(*keys: str, one: Sequence[str] = ()) -> Matches:
    """Rows with all these fields; and, if some are given, with one of these."""
    return lambda row: row.keys() >= set(keys) and (not one or bool(row.keys() & set(one)))


_PAIR, _OUTPUTS = ("chosen", "rejected"), ("preferred_output", "non_preferred_output")
_OTHERS = ("conversations", "conversation", "instruction", "question", "input", *_PAIR, *_OUTPUTS)
_TALK, _TASK = ("conversations", "system", "tools"), ("instruction", "input", "system", "history")
_CHAT, _TEXTS = ("messages", "system", "tools"), ("prompt", "completion", "tools")
_TRL = ("prompt", "question", "system", "tools", *_PAIR)

FORMS: tuple[Form, ...] = (
    Form("sft", "chat", _learns("messages"), _chat, ("messages", "tools")),
    Form("sft", "prompt/completion", _learns("completion"), _completion, _TEXTS),
    Form("sft", "prompt/completion", _learns("prompt", "text", *_OTHERS), _completion, _TEXTS),
    Form("sft", "conversations", _learns("conversations", *_PAIR, *_OUTPUTS), _talk, _TALK),
    Form("sft", "instruction/output", _learns("instruction", *_PAIR, *_OUTPUTS), _task, (*_TASK, "output")),
    Form("sft", "text", _learns("text", "prompt", *_OTHERS), _text, ("text",)),
    Form("pairs", "preferred_output/non_preferred_output", _has(one=_OUTPUTS), _openai_pair, ("input", *_OUTPUTS)),
    Form("pairs", "conversations/chosen/rejected", _has(_TALK[0], one=_PAIR), _sharegpt_pair, (*_TALK, *_PAIR)),
    Form("pairs", "instruction/chosen/rejected", _has(_TASK[0], one=_PAIR), _alpaca_pair, (*_TASK, *_PAIR)),
    Form("pairs", "prompt/chosen/rejected", _has(one=_PAIR), _trl_pair, _TRL),
    Form("judged", "conversations/kto_tag", _has("kto_tag", "conversations"), _judged_talk, (*_TALK, "kto_tag")),
    Form("judged", "messages/kto_tag", _has("kto_tag", "messages"), _judged_talk, (*_CHAT, "kto_tag")),
    Form("judged", "instruction/kto_tag", _has("kto_tag", _TASK[0]), _judged_task, (*_TASK, "output", "kto_tag")),
    Form("judged", "prompt/completion/label", _has("completion", "label"), _judged_completion, (*_TEXTS, "label")),
    Form("prompts", "messages", _has("messages"), _asked_talk, (*_CHAT, "answer")),
    Form("prompts", "conversations", _has("conversations"), _asked_talk, (*_TALK, "answer")),
    Form("prompts", "instruction", _has("instruction"), _asked_task, (*_TASK, "output", "answer")),
    Form("prompts", "prompt", _has("prompt"), _asked_prompt, (*_TEXTS, "answer")),
)
