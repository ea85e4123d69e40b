"""What a conversation says, and whether its template said it.

A template may leave out anything: the calls of tools, the tools themselves, a system text, thoughts, or whole turns. A
model would then be trained on another conversation than the row holds, in silence. So the rule: every content, the name
and the arguments of every call, the name, description and parameters of every tool, and the thoughts of every answer
that is trained stand in the text, contents in their order, an answer that is trained at its own place. White space does
not count, and a text may be spelled as JSON, Python or HTML spell it. Of earlier answers the thoughts may be left out:
so do templates by design.

A special token in what is said is an error, wherever: as a token it would end or forge a turn, and as text it would be
cut otherwise here than by other tools. Plain text rows are what a model sees, and may hold them.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .messages import SEEN
from .turns import THOUGHT, Talk, Turn

REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of an assistant turn; the first is the standard one
ANYWHERE = ("system", "developer")  # roles whose texts templates put where they like

ESCAPED = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"})  # as jinja's filter
SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: re.sub(r"[\\']", r"\\\g<0>", text).replace("\n", "\\n").replace("\r", "\\r"),  # LFM2's Python
    lambda text: text.translate(ESCAPED),
)

Part = tuple[str, str]  # the field that holds a text, and the text


def unsaid(talk: Talk, text: str, turns: Mapping[int, Turn]) -> Part | None:
    """The first part of a conversation that the text lacks; `turns`: those that are trained, and their places."""
    whole, at = _bare(text), 0
    spots = _spots(text, turns)
    order, starts = sorted(spots), sorted(start for start, _ in spots.values())
    for part in _tools(talk):
        if _found(whole, part[1], 0, len(whole)) < 0:
            return part
    for i, message in enumerate(talk.messages):
        later = bisect_right(order, i)
        low, high = spots.get(i, (at, starts[later] if later < len(starts) else len(whole)))
        thoughts = [(f"messages[{i}].{key}", message[key]) for key in REASONING if isinstance(message.get(key), str)]
        for field, said in _calls(i, message) + (thoughts if i in turns else []):
            if _found(whole, said, low, high) < 0:
                return field, said
        if message["role"] in ANYWHERE:
            low, high = 0, len(whole)
        for said in _contents(message, i in turns):
            low = _found(whole, said, low, high)
            if low < 0:
                return f"messages[{i}].content", said.strip()
        if i in spots:
            at = high
        elif message["role"] not in ANYWHERE:
            at = low
    return None


def spelled(talk: Talk, tokens: Sequence[str]) -> Part | None:
    """The first field of a conversation whose text spells one of the tokens, and the token."""
    pattern = _any_of(tuple(tokens))
    held: list[tuple[str, Any]] = [("tools", talk.tools), ("chat_template_kwargs", talk.variables)]
    for i, message in enumerate(talk.messages):
        held += [(f"messages[{i}].{key}", message[key]) for key in SEEN if key in message]
    for field, value in held:
        for text in _texts(value):
            if match := pattern.search(text):
                return field, match.group()
    return None


def lacks(text: str, parts: Sequence[str]) -> bool:
    """Whether one of the parts stands nowhere in a text, in no spelling."""
    whole = _bare(text) if parts else ""
    return any(_found(whole, part, 0, len(whole)) < 0 for part in parts)


@lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _bare(text: str) -> str:
    return "".join(text.split())


def _spots(text: str, turns: Mapping[int, Turn]) -> dict[int, tuple[int, int]]:
    """The places of turns in the text without white space."""
    spots, done, here = {}, 0, 0
    for i, turn in sorted(turns.items()):
        start = here + len(_bare(text[done : turn.start]))
        done = max(turn.start, turn.region)
        here = start + len(_bare(text[turn.start : done]))
        spots[i] = (start, here)
    return spots


def _found(whole: str, said: str, low: int, high: int) -> int:
    """Where what is said ends in the text without white space, in any spelling; -1 where it is not there."""
    for spell in SPELLINGS:
        wanted = _bare(spell(said))
        if (at := whole.find(wanted, low, high)) >= 0:
            return at + len(wanted)
    return -1


def _contents(message: dict[str, Any], trained: bool) -> list[str]:
    """A message's content; of an answer between the marks of its thoughts, of an earlier one what follows them."""
    content = str(message.get("content") or "")
    if message["role"] != "assistant":
        return [content]
    parts = THOUGHT.split(content)
    return parts if trained else parts[-1:]


def _calls(i: int, message: dict[str, Any]) -> list[Part]:
    found = list[Part]()
    for k, call in enumerate(message.get("tool_calls") or ()):
        function, field = call.get("function", call), f"messages[{i}].tool_calls[{k}]"
        found.append((f"{field}.name", str(function["name"])))
        found += [(f"{field}.arguments", text) for text in _texts(function.get("arguments"))]
    return found


def _tools(talk: Talk) -> list[Part]:
    """What a template has to say of the tools: their names, descriptions and parameters."""
    found = list[Part]()
    for k, tool in enumerate(talk.tools or ()):
        function = tool.get("function")
        function = function if isinstance(function, dict) else tool
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        told = [function.get("name"), function.get("description")]
        told += properties if isinstance(properties, dict) else ()
        found += [(f"tools[{k}]", text) for text in told if isinstance(text, str)]
    return found


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included, numbers as they are written. Null, and what is null, is absent; true
    and false, which templates spell as they like, are told by their keys."""
    if isinstance(value, dict):
        for key, child in value.items():
            if child is not None:
                yield key
                yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def words_of(source: str) -> set[str]:
    """The words of a template's source, among them the keys that it knows. Reasoning has several names for one."""
    words = set(re.findall(r"\w+", source))
    return words | {*REASONING} if words & {*REASONING} else words
