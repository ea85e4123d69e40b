"""Rows into conversations: the chat form (`messages`) and the prompt/completion form, recognised by themselves.

A file has one form, told from its first rows; every row is then held to it, and a row that does not fit is a problem
with its line, its field and the reason. What comes out is one shape, a list of messages, whatever went in.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from .messages import as_context, bad, checked_messages, filled, trains, type_name
from .read import BadRow, Problem, Row, excerpt

T = TypeVar("T")

DETECT_ROWS = 200
OTHER_FORMS = {
    "conversations": "the ShareGPT form (`conversations`)",
    "conversation": "the ShareGPT form (`conversation`)",
    "instruction": "the Alpaca form (`instruction`/`output`)",
    "question": "a question/answer form (`question`)",
    "input": "an input/output form (`input`)",
    "text": "plain text (`text`)",
}
PREFERENCE_KEYS = {
    "preferred_output": "OpenAI's preference form (`preferred_output`/`non_preferred_output`)",
    "non_preferred_output": "OpenAI's preference form (`preferred_output`/`non_preferred_output`)",
    "chosen": "a preference pair (`chosen`/`rejected`)",
    "rejected": "a preference pair (`chosen`/`rejected`)",
    "kto_tag": "an answer with a judgement (`kto_tag`)",
}
USE_INSTEAD = 'use {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Conversation:
    """Messages in order, ending with an assistant turn; `weight: 0` on a turn keeps it out of the loss."""

    messages: list[dict[str, Any]]
    file: str
    line: int
    tools: list[dict[str, Any]] | None = None

    def problem(self, field: str, reason: str, kind: str = "row") -> Problem:
        """A problem that names this conversation's row."""
        return Problem(self.file, self.line, field, reason, kind)

    def content(self) -> list[Any]:
        """What makes two rows the same row."""
        return [self.messages, self.tools]

    def topic(self) -> list[Any]:
        """What rows have in common that must stay on one side of a split: here all of it."""
        return self.content()


def recognise(row: Row) -> str | None:
    """ "chat", "prompt/completion", or None when the keys belong to neither."""
    keys = row.data.keys()
    if is_judged(row):
        return None
    if "messages" in keys:
        return "chat"
    if "completion" in keys or ("prompt" in keys and not keys & (OTHER_FORMS.keys() | PREFERENCE_KEYS.keys())):
        return "prompt/completion"
    return None


def is_judged(row: Row) -> bool:
    """Whether the row holds one answer and says if it is a good one: half of such answers are not to be imitated."""
    return "kto_tag" in row.data or ("completion" in row.data and isinstance(row.data.get("label"), bool))


def conversations(rows: Iterable[Row]) -> tuple[list[Conversation], list[Problem]]:
    """Every row of one file as a conversation, or as a problem.

    The form is the one most of the first 200 rows have; a later row of another form is a problem that names its line.
    """
    return by_form(rows, recognise, conversation)


def by_form(
    rows: Iterable[Row], recognise: Callable[[Row], str | None], convert: Callable[[Row, str | None], T]
) -> tuple[list[T], list[Problem]]:
    """Every row of one file converted, or as a problem; `convert` is told the form most of the first 200 rows have."""
    rows = list(rows)
    forms = Counter(form for row in rows[:DETECT_ROWS] if (form := recognise(row)))
    form = forms.most_common(1)[0][0] if forms else None
    good: list[T] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            good.append(convert(row, form))
        except BadRow as error:
            problems.append(error.problem)
    return good, problems


def conversation(row: Row, form: str | None = None) -> Conversation:
    """One row as a conversation. Raises BadRow when it is not of `form` (None: any) or breaks a rule of it."""
    own = recognise(row)
    if own is None:
        raise _unknown_form(row)
    check_form(row, own, form)
    messages = _chat(row) if own == "chat" else [m for part in prompt_completion(row) for m in part]
    _check_trainable(row, messages)
    return Conversation(messages, row.file, row.line, checked_tools(row, "tools", row.data.get("tools")))


def check_form(row: Row, own: str, form: str | None) -> None:
    """Raise BadRow where a row's own form is not that of its file (None: any)."""
    if form is not None and own != form:
        reason = f"is of the {own} form, but this file's first rows are of the {form} form: one form a file"
        raise bad(row, "row", reason, "form")


def checked_tools(row: Row, field: str, tools: Any) -> list[dict[str, Any]] | None:
    """The tools a row offers; None for none."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise bad(row, field, f"must be a list of objects, not {type_name(tools)}")
    return tools or None


def _unknown_form(row: Row) -> BadRow:
    preference = next((PREFERENCE_KEYS[key] for key in PREFERENCE_KEYS if key in row.data), None)
    if preference is None and is_judged(row):
        preference = "an answer with a judgement (`completion`/`label`)"
    if preference:
        return bad(row, "row", f"this looks like {preference}, which `fourbit dpo` reads: here {USE_INSTEAD}", "form")
    seen = next((OTHER_FORMS[key] for key in OTHER_FORMS if key in row.data), None)
    if seen:
        return bad(row, "row", f"this looks like {seen}, which is not supported yet: {USE_INSTEAD}", "form")
    keys = ", ".join(map(repr, list(row.data)[:6])) or "none"
    return bad(row, "row", f"no form recognised, keys are {excerpt(keys, 80)[1:-1]}: {USE_INSTEAD}", "form")


def _chat(row: Row) -> list[dict[str, Any]]:
    if "completion" in row.data:
        raise bad(row, "row", "has both `messages` and `completion`: keep one of the two forms", "form")
    return checked_messages(row, "messages", row.data["messages"])


def prompt_completion(row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of a row's `prompt`, whose assistant turns are context, and of its `completion`."""
    for key in ("prompt", "completion"):
        if key not in row.data:
            raise bad(row, key, "is missing: a prompt/completion row needs both")
    prompt, completion = row.data["prompt"], row.data["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return (
            [{"role": "user", "content": filled(row, "prompt", prompt)}],
            [{"role": "assistant", "content": filled(row, "completion", completion)}],
        )
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        reason = (
            f"must both be strings or both be lists of messages, not {type_name(prompt)} and {type_name(completion)}"
        )
        raise bad(row, "prompt, completion", reason)
    return as_context(checked_messages(row, "prompt", prompt)), answer_messages(row, "completion", completion)


def not_alike(row: Row, first: str, second: str) -> BadRow:
    """The error for two fields of which one is a string and the other a list, or either is neither."""
    types = f"{type_name(row.data[first])} and {type_name(row.data[second])}"
    return bad(row, f"{first}, {second}", f"must both be strings or both be lists of messages, not {types}")


def answer_messages(row: Row, field: str, value: Any) -> list[dict[str, Any]]:
    """Messages that begin with an assistant turn."""
    messages = checked_messages(row, field, value)
    if messages[0]["role"] != "assistant":
        raise bad(row, f"{field}[0].role", f"must be 'assistant', not {messages[0]['role']!r}")
    return messages


def _check_trainable(row: Row, messages: list[dict[str, Any]]) -> None:
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        reason = f"has the role {role!r}: a conversation must end with an assistant turn, the answer to learn"
        raise bad(row, "last message", reason, "nothing to train")
    if not any(trains(message) for message in messages):
        raise bad(row, "messages", "every assistant turn has weight 0: nothing to train", "nothing to train")
    if trains(messages[0]):
        raise bad(row, "first message", "is an assistant turn: an answer needs something before it")
