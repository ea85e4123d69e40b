"""Messages in the one shape, and the rules that they keep."""

import json
from typing import Any

from .row import Row, bad, excerpt, type_name

Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_SYNONYMS = {"human": "user", "function": "tool", "observation": "tool"}
ROLE_SYNONYMS |= dict.fromkeys(("gpt", "bot", "model", "ai"), "assistant")
KEY_SYNONYMS = {"from": "role", "value": "content", "text": "content"}


def trains(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def as_context(messages: Messages) -> Messages:
    """The messages of a prompt: its assistant turns are not learned, whatever their weight says."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def core(message: dict[str, Any]) -> tuple[Any, ...]:
    """What a model sees of a message: marks such as an id or a score make no other message of it."""
    return tuple(message.get(key) for key in ("role", "content", "tool_calls", "tool_call_id", "name"))


def checked_tools(row: Row, field: str, tools: Any) -> Messages | None:
    """The tools a row offers; None for none."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise bad(row, field, f"must be a list of objects, not {type_name(tools)}")
    return tools or None


def checked_messages(row: Row, field: str, value: Any) -> Messages:
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


def turn(row: Row, field: str, text: Any, role: str = "assistant") -> Messages:
    """A string as one turn."""
    return [{"role": role, "content": filled(row, field, text)}]


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages after the row's `system` text, unless it has none or they begin with a system message already."""
    text = row.data.get("system")
    if text in (None, "") or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return turn(row, "system", text, "system") + messages


def filled(row: Row, field: str, text: Any) -> str:
    """A string with something in it. Raises BadRow."""
    if not isinstance(text, str):
        raise bad(row, field, f"must be a string, not {type_name(text)}")
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
