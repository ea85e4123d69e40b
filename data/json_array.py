"""The elements of a JSON array that fills a whole text, each with its line: what a reader needs to name a bad one."""

import json
import re
from collections.abc import Iterator

from .row import excerpt

_SPACE = re.compile(r"[ \t\r\n]*")


def elements(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, text of an element, ""), or (line, "", what is wrong). A syntax error is the last: no more can be told."""
    at, line, counted = _past_space(text, text.index("[") + 1), 1, 0  # `line` is that of character `counted`
    first = True
    while not text.startswith("]", at):
        if not first:
            line, counted = line + text.count("\n", counted, at), at
            if not text.startswith(",", at):
                yield line, "", "the array is not closed: a comma or ] is missing here"
                return
            at = _past_space(text, at + 1)
        line, counted, first = line + text.count("\n", counted, at), at, False
        try:
            end = json.JSONDecoder().raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            line += text.count("\n", at, error.pos)
            yield line, "", f"is not valid JSON: {error.msg}; the rest of the array is not read"
            return
        except (ValueError, RecursionError):  # digits or brackets without end: a strict reader of the rest says which
            yield line, text[at:], ""
            return
        yield line, text[at:end], ""
        at = _past_space(text, end)
    if rest := text[at + 1 :].strip():
        yield line + text.count("\n", counted, at), "", f"more text follows the array: {excerpt(rest)}"


def _past_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]
