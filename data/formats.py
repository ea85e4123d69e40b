"""Rows into conversations: the chat form (`messages`) and the prompt/completion form, recognised by themselves.

A file has one form, told from its first rows; every row is then held to it, and a row that does not fit is a problem
with its line, its field and the reason. What comes out is one shape, a list of messages, whatever went in.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .read import BadRow, Problem, Row, excerpt

ROLES = ("system", "developer", "user", "assistant", "tool")
DETECT_ROWS = 200
OTHER_FORMS = {
    "conversations": "the ShareGPT form (`conversations`)",
    "conversation": "the ShareGPT form (`conversation`)",
    "preferred_output": "OpenAI's preference form (`preferred_output`)",
    "chosen": "a preference pair (`chosen`/`rejected`)",
    "rejected": "a preference pair (`chosen`/`rejected`)",
    "instruction": "the Alpaca form (`instruction`/`output`)",
    "question": "a question/answer form (`question`)",
    "input": "an input/output form (`input`)",
    "text": "plain text (`text`)",
}
USE_INSTEAD = 'use {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'
ROLE_SYNONYMS = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
}
KEY_SYNONYMS = {"from": "role", "value": "content", "text": "content"}


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


def recognise(row: Row) -> str | None:
    """ "chat", "prompt/completion", or None when the keys belong to neither."""
    keys = row.data.keys()
    if "messages" in keys:
        return "chat"
    if "completion" in keys or ("prompt" in keys and not keys & OTHER_FORMS.keys()):
        return "prompt/completion"
    return None


def conversations(rows: Iterable[Row]) -> tuple[list[Conversation], list[Problem]]:
    """Every row of one file as a conversation, or as a problem.

    The form is the one most of the first 200 rows have; a later row of another form is a problem that names its line.
    """
    rows = list(rows)
    forms = Counter(form for row in rows[:DETECT_ROWS] if (form := recognise(row)))
    form = forms.most_common(1)[0][0] if forms else None
    good: list[Conversation] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            good.append(conversation(row, form))
        except BadRow as bad:
            problems.append(bad.problem)
    return good, problems


def conversation(row: Row, form: str | None = None) -> Conversation:
    """One row as a conversation. Raises BadRow when it is not of `form` (None: any) or breaks a rule of it."""
    own = recognise(row)
    if own is None:
        raise _unknown_form(row)
    if form is not None and own != form:
        raise _bad(
            row,
            "row",
            f"is of the {own} form, but this file's first rows are of the {form} form: one form a file",
            "form",
        )
    tools = row.data.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _bad(row, "tools", f"must be a list of objects, not {_type(tools)}")
    messages = _chat(row) if own == "chat" else _prompt_completion(row)
    _check_trainable(row, messages)
    return Conversation(messages, row.file, row.line, tools or None)


def _bad(row: Row, field: str, reason: str, kind: str = "row") -> BadRow:
    return BadRow(Problem(row.file, row.line, field, reason, kind))


def _type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def _unknown_form(row: Row) -> BadRow:
    seen = next((OTHER_FORMS[key] for key in OTHER_FORMS if key in row.data), None)
    if seen:
        return _bad(row, "row", f"this looks like {seen}, which is not supported yet: {USE_INSTEAD}", "form")
    keys = ", ".join(map(repr, list(row.data)[:6])) or "none"
    return _bad(row, "row", f"no form recognised, keys are {excerpt(keys, 80)[1:-1]}: {USE_INSTEAD}", "form")


def _chat(row: Row) -> list[dict[str, Any]]:
    if "completion" in row.data:
        raise _bad(row, "row", "has both `messages` and `completion`: keep one of the two forms", "form")
    return _messages(row, "messages", row.data["messages"])


def _prompt_completion(row: Row) -> list[dict[str, Any]]:
    for key in ("prompt", "completion"):
        if key not in row.data:
            raise _bad(row, key, "is missing: a prompt/completion row needs both")
    prompt, completion = row.data["prompt"], row.data["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            {"role": "user", "content": _filled(row, "prompt", prompt)},
            {"role": "assistant", "content": _filled(row, "completion", completion)},
        ]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        reason = f"must both be strings or both be lists of messages, not {_type(prompt)} and {_type(completion)}"
        raise _bad(row, "prompt, completion", reason)
    return _prompt_messages(row, prompt) + _completion_messages(row, completion)


def _prompt_messages(row: Row, value: list[Any]) -> list[dict[str, Any]]:
    """The prompt's messages; its assistant turns are context, whatever their weight says."""
    messages = _messages(row, "prompt", value)
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def _completion_messages(row: Row, value: list[Any]) -> list[dict[str, Any]]:
    messages = _messages(row, "completion", value)
    if messages[0]["role"] != "assistant":
        raise _bad(row, "completion[0].role", f"must be 'assistant', not {messages[0]['role']!r}")
    return messages


def _messages(row: Row, field: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _bad(row, field, f"must be a list of messages, not {_type(value)}")
    if not value:
        raise _bad(row, field, "is an empty list")
    return [_message(row, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(row: Row, field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _bad(row, field, f"must be an object with `role` and `content`, not {_type(message)}")
    role = _role(row, field, message)
    result = {**message, "role": role}
    if message.get("tool_calls") is not None:
        result["tool_calls"] = _tool_calls(row, f"{field}.tool_calls", message["tool_calls"], role)
    else:
        result.pop("tool_calls", None)
    result["content"] = _content(row, f"{field}.content", message, role)
    if "weight" in message:
        _check_weight(row, f"{field}.weight", message["weight"], role)
    return result


def _role(row: Row, field: str, message: dict[str, Any]) -> str:
    for key, meant in KEY_SYNONYMS.items():
        if key in message and meant not in message:
            raise _bad(
                row, field, f'has `{key}` where `{meant}` is needed: a message is {{"role": ..., "content": ...}}'
            )
    if "role" not in message:
        raise _bad(row, f"{field}.role", "is missing")
    role = message["role"]
    if not isinstance(role, str):
        raise _bad(row, f"{field}.role", f"must be a string, not {_type(role)}")
    if role not in ROLES:
        meant = ROLE_SYNONYMS.get(role.lower(), role.lower().strip())
        hint = f": did you mean {meant!r}?" if meant in ROLES else f": must be one of {', '.join(ROLES)}"
        raise _bad(row, f"{field}.role", f"is {excerpt(role)}{hint}")
    return role


def _content(row: Row, field: str, message: dict[str, Any], role: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if "content" not in message:
        raise _bad(row, field, "is missing")
    if isinstance(content, list):
        content = "".join(_part(row, f"{field}[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise _bad(row, field, f"must be a string or a list of text parts, not {_type(content)}")
    if role == "user" or (role == "assistant" and not message.get("tool_calls") and message.get("weight") != 0):
        return _filled(row, field, content)
    return content


def _part(row: Row, field: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise _bad(row, field, f'must be an object {{"type": "text", "text": ...}}, not {_type(part)}')
    if part.get("type") != "text":
        raise _bad(row, f"{field}.type", f"is {excerpt(str(part.get('type')))}: only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise _bad(row, f"{field}.text", f"must be a string, not {_type(part.get('text'))}")
    return str(part["text"])


def _filled(row: Row, field: str, text: str) -> str:
    if not text:
        raise _bad(row, field, "is empty")
    if text.isspace():
        raise _bad(row, field, "holds only white space")
    return text


def _check_weight(row: Row, field: str, weight: Any, role: str) -> None:
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _bad(row, field, f"must be 0 or 1, not {excerpt(repr(weight))[1:-1]}")
    if role != "assistant":
        raise _bad(row, field, f"belongs on assistant turns only, this one is {role!r}")


def _tool_calls(row: Row, field: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as chat templates want them (OpenAI writes them as JSON text)."""
    if role != "assistant":
        raise _bad(row, field, f"belongs on assistant turns only, this one is {role!r}")
    if not isinstance(calls, list):
        raise _bad(row, field, f"must be a list, not {_type(calls)}")
    return [_tool_call(row, f"{field}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(row: Row, field: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(row, field, 'must be an object {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise _bad(row, f"{field}.arguments", "is not valid JSON") from None
    if not isinstance(arguments, dict):
        raise _bad(row, f"{field}.arguments", f"must be a JSON object, not {_type(arguments)}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _check_trainable(row: Row, messages: list[dict[str, Any]]) -> None:
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        reason = f"has the role {role!r}: a conversation must end with an assistant turn, the answer to learn"
        raise _bad(row, "last message", reason, "nothing to train")
    if not any(trains(message) for message in messages):
        raise _bad(row, "messages", "every assistant turn has weight 0: nothing to train", "nothing to train")
    if trains(messages[0]):
        raise _bad(row, "first message", "is an assistant turn: an answer needs something before it")


def trains(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0
