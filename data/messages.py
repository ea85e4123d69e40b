"""Messages, checked: role, content, weight and tool calls of every turn, whichever form of row it stood in.

What comes out has the roles of chat templates, its content as one string and its tool calls' arguments as objects.
Every rule that a message can break is one problem with its line, its field and the reason.
"""

import json
from typing import Any

from .read import BadRow, Problem, Row, excerpt

ROLES = ("system", "developer", "user", "assistant", "tool")
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


def bad(row: Row, field: str, reason: str, kind: str = "row") -> BadRow:
    """The error for a row that breaks a rule; the caller raises it."""
    return BadRow(Problem(row.file, row.line, field, reason, kind))


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def trains(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def as_context(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a prompt: its assistant turns are not learned, whatever their weight says."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def checked_messages(row: Row, field: str, value: Any) -> list[dict[str, Any]]:
    """A row's list of messages in the one shape. Raises BadRow for what is none, or breaks a rule of messages."""
    if not isinstance(value, list):
        raise bad(row, field, f"must be a list of messages, not {type_name(value)}")
    if not value:
        raise bad(row, field, "is an empty list", "empty")
    return [_message(row, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(row: Row, field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad(row, field, f"must be an object with `role` and `content`, not {type_name(message)}")
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
            raise bad(
                row, field, f'has `{key}` where `{meant}` is needed: a message is {{"role": ..., "content": ...}}'
            )
    if "role" not in message:
        raise bad(row, f"{field}.role", "is missing")
    role = message["role"]
    if not isinstance(role, str):
        raise bad(row, f"{field}.role", f"must be a string, not {type_name(role)}")
    if role not in ROLES:
        meant = ROLE_SYNONYMS.get(role.lower(), role.lower().strip())
        hint = f": did you mean {meant!r}?" if meant in ROLES else f": must be one of {', '.join(ROLES)}"
        raise bad(row, f"{field}.role", f"is {excerpt(role)}{hint}")
    return role


def _content(row: Row, field: str, message: dict[str, Any], role: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if "content" not in message:
        raise bad(row, field, "is missing")
    if isinstance(content, list):
        content = "".join(_part(row, f"{field}[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise bad(row, field, f"must be a string or a list of text parts, not {type_name(content)}")
    if role == "user" or (role == "assistant" and not message.get("tool_calls") and message.get("weight") != 0):
        return filled(row, field, content)
    return content


def _part(row: Row, field: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise bad(row, field, f'must be an object {{"type": "text", "text": ...}}, not {type_name(part)}')
    if part.get("type") != "text":
        raise bad(row, f"{field}.type", f"is {excerpt(str(part.get('type')))}: only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise bad(row, f"{field}.text", f"must be a string, not {type_name(part.get('text'))}")
    return str(part["text"])


def filled(row: Row, field: str, text: str) -> str:
    """`text` unless there is nothing in it. Raises BadRow."""
    if not text:
        raise bad(row, field, "is empty", "empty")
    if text.isspace():
        raise bad(row, field, "holds only white space", "empty")
    return text


def _check_weight(row: Row, field: str, weight: Any, role: str) -> None:
    if isinstance(weight, bool) or weight not in (0, 1):
        raise bad(row, field, f"must be 0 or 1, not {excerpt(repr(weight))[1:-1]}")
    if role != "assistant":
        raise bad(row, field, f"belongs on assistant turns only, this one is {role!r}")


def _tool_calls(row: Row, field: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, as chat templates want them (OpenAI writes them as JSON text)."""
    if role != "assistant":
        raise bad(row, field, f"belongs on assistant turns only, this one is {role!r}")
    if not isinstance(calls, list):
        raise bad(row, field, f"must be a list, not {type_name(calls)}")
    return [_tool_call(row, f"{field}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(row: Row, field: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(row, field, 'must be an object {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise bad(row, f"{field}.arguments", "is not valid JSON") from None
    if not isinstance(arguments, dict):
        raise bad(row, f"{field}.arguments", f"must be a JSON object, not {type_name(arguments)}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
