"""Messages in the one shape, and the rules that they keep."""

from typing import Any

from ..errors import shown
from .keys import CALL, TURN, Fields, opened, parsed, plain, present
from .row import Row, bad, type_name, typed

Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
CALLING = ("function_call", "tool_call")  # roles whose content is a call, as JSON, by the assistant
ROLE_SYNONYMS = dict.fromkeys(("function", "observation", "tool_response", "function_response"), "tool")
ROLE_SYNONYMS |= {"human": "user"} | dict.fromkeys(("gpt", "bot", "model", "ai"), "assistant")
MISSING = "is missing, or null"
SEEN = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


def trains(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def as_context(messages: Messages) -> Messages:
    """The messages of a prompt: its assistant turns are not learned, whatever their weight says."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def core(message: dict[str, Any]) -> tuple[Any, ...]:
    """What a model sees of a message: marks such as an id or a score make no other message of it."""
    return tuple(message.get(key) for key in SEEN)


def checked_messages(row: Row, field: str, value: Any) -> Messages:
    """A row's list of messages in the one shape; given so, or with ShareGPT's `from` and `value`. Raises BadRow for
    what is none, or breaks a rule of messages."""
    if not typed(row, field, value, list, "be a list of messages"):
        raise bad(row, field, "is an empty list", "empty")
    return [_message(row, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(row: Row, field: str, message: Any) -> dict[str, Any]:
    typed(row, field, message, Fields, "be an object with `role` and `content`")
    message.level = TURN
    message.get("tool_call_id")  # a link between turns, which their order tells too
    theirs = "from" in message and "role" not in message
    if theirs and {"value", "content"} <= message.keys():
        raise bad(row, field, "has both `value` and `content`: keep one of them")
    speaker, text = ("from", "content" if "content" in message else "value") if theirs else ("role", "content")
    role = _role(row, field, speaker, message)
    if role in CALLING:
        calls, role, content = _calls_of_text(row, f"{field}.{text}", message, text), "assistant", ""
    else:
        calls = _tool_calls(row, field, message, role)
        content = _content(row, f"{field}.{text}", message, role, bool(calls))
    if "weight" in message:
        if isinstance(weight := message["weight"], bool) or weight not in (0, 1):
            raise bad(row, f"{field}.weight", f"must be 0 or 1, not {shown(weight)}")
        if role != "assistant":
            raise bad(row, f"{field}.weight", f"belongs on assistant turns only, this one is {role!r}")
    result = plain(message) | {"role": role, "content": content} | ({} if calls is None else {"tool_calls": calls})
    for key in {"from", "value"} & {speaker, text} | {"function_call"} & message.read:
        result.pop(key, None)
    return result


def _role(row: Row, field: str, key: str, message: Fields) -> str:
    if key not in message:
        raise bad(row, f"{field}.{key}", MISSING)
    role = typed(row, f"{field}.{key}", message[key], str)
    role = ROLE_SYNONYMS.get(role.lower(), role)
    if role not in (*ROLES, *CALLING):
        meant = role.lower().strip()
        hint = f": did you mean {meant!r}?" if meant in ROLES else f": must be one of {', '.join(ROLES)}"
        raise bad(row, f"{field}.{key}", f"is {shown(role)}{hint}")
    return role


def _content(row: Row, field: str, message: Fields, role: str, calls: bool) -> str:
    content = message.get(field.rpartition(".")[2])
    if content is None and calls:
        return ""
    if content is None:
        raise bad(row, field, MISSING)
    if isinstance(content, list):
        content = "".join(_part(row, f"{field}[{i}]", part) for i, part in enumerate(content))
    typed(row, field, content, str, "be a string or a list of text parts")
    if role == "user" or (role == "assistant" and not calls and message.get("weight") != 0):
        return filled(row, field, content)
    return content


def _part(row: Row, field: str, part: Any) -> str:
    typed(row, field, part, dict, 'be an object {"type": "text", "text": ...}')
    if part.get("type") != "text":
        raise bad(row, f"{field}.type", f"is {shown(part.get('type'))}: only text parts can be trained on")
    return str(typed(row, f"{field}.text", part.get("text"), str))


def turn(row: Row, field: str, text: Any, role: str = "assistant") -> Messages:
    """A string as one turn."""
    return [{"role": role, "content": filled(row, field, text)}]


def said(row: Row, key: str, role: str = "assistant") -> Messages:
    """What a field of a row says: messages, one of them, or a string as one turn of `role`. Raises BadRow."""
    if key not in row.data:
        raise bad(row, key, MISSING)
    value = row.data[key]
    if isinstance(value, (dict, list)):
        return checked_messages(row, key, value if isinstance(value, list) else [value])
    return turn(row, key, value, role)


def filled(row: Row, field: str, text: Any) -> str:
    """A string with something in it. Raises BadRow."""
    if not typed(row, field, text, str).strip():
        raise bad(row, field, "holds only white space" if text else "is empty", "empty")
    return str(text)


def _tool_calls(row: Row, field: str, message: Fields, role: str) -> Messages | None:
    """The calls of a turn: `tool_calls`, or the one `function_call` that OpenAI's first form of them had."""
    key = "function_call" if not message.get("tool_calls") and message.get("function_call") else "tool_calls"
    if key not in message:
        return None
    calls, where = message[key], f"{field}.{key}"
    if role != "assistant" and calls:
        raise bad(row, where, f"belongs on assistant turns only, this one is {role!r}")
    if key == "function_call":
        return [_tool_call(row, where, calls)]
    return [_tool_call(row, f"{where}[{i}]", c) for i, c in enumerate(typed(row, where, calls, list, "be a list"))]


def _calls_of_text(row: Row, field: str, message: Fields, key: str) -> Messages | None:
    """The calls, one or a list, that the content of a turn holds as JSON."""
    calls = message.get(key)
    calls = present(parsed(row, field, calls), null=True) if isinstance(calls, str) else calls
    message[key] = calls = calls if isinstance(calls, list) else [calls]  # as it was read, for what is unread there
    return [_tool_call(row, f"{field}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(row: Row, field: str, call: Any) -> dict[str, Any]:
    """A call as chat templates want it: under `function`, its arguments an object (OpenAI writes them as JSON text)."""
    function = call.get("function", call) if isinstance(call, Fields) else None
    kind = call.get("type", "function") if isinstance(call, Fields) else None
    if not isinstance(function, Fields) or kind != "function" or not isinstance(function.get("name"), str):
        raise bad(row, field, 'must be an object {"type": "function", "function": {"name": ..., "arguments": ...}}')
    call.get("id")  # a link between turns, which their order tells too
    call.level = function.level = CALL
    arguments = opened(row, f"{field}.arguments", function.get("arguments", ""))
    arguments = {} if arguments is None else arguments
    typed(row, f"{field}.arguments", arguments, dict, "be a JSON object")
    made = plain(function) | {"arguments": arguments}
    return plain(call) | {"function": made} if "function" in call else {"type": "function", "function": made}


# What a row says beside its messages.


def offered_tools(row: Row, fields: dict[str, Any], inside: str = "") -> Messages | None:
    """The tools that a row, or its part `inside`, offers: `tools`, or the `functions` that OpenAI had first; or as
    JSON text. None for none."""
    key = "functions" if "functions" in fields and not fields.get("tools") else "tools"
    field = inside + key
    tools = opened(row, field, fields.get(key))
    if isinstance(tools, list):
        tools = [opened(row, f"{field}[{i}]", tool) for i, tool in enumerate(tools)]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise bad(row, field, f"must be a list of objects, or that as JSON text, not {type_name(tools)}")
    if key == "functions":
        return [{"type": "function", "function": tool} for tool in tools or []] or None
    return tools or None


def system_turn(row: Row, first: dict[str, Any] | None) -> Messages:
    """The row's `system` text as a turn to stand before `first`; none if that is one already, and no text is read."""
    if first is not None and first["role"] in ("system", "developer"):
        return []
    text = row.data.get("system")
    return [] if text in (None, "") else turn(row, "system", text, "system")
