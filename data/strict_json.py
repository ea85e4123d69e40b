"""JSON as a data file may hold it: no key twice, no NaN, no half characters, 64 levels; and an array, by element."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from .row import excerpt

MAX_DEPTH = 64


class Refused(ValueError):
    """A text that is no JSON, or holds a value that a dataset must not; `hint` is for one that is a row."""

    def __init__(self, reason: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def _refuse_constant(text: str) -> NoReturn:
    raise Refused(f"holds {text}, which is not JSON: use null or leave the field out")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"holds the number {excerpt(text, 20)}, too large for a float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refused(f"the key {excerpt(twice)} stands twice in one object")
    return result


_UNFIT = re.compile("[\0\ud800-\udfff]")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def parse(text: str) -> Any:
    """One JSON value filling the whole of `text`. Raises Refused."""
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip()))
    except json.JSONDecodeError as error:
        raise _no_json(text, error) from None
    except RecursionError:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels") from None
    except Refused:
        raise
    except ValueError:
        raise Refused("holds a number with too many digits") from None
    if rest := text[end:].strip():
        hint = ": one object a line, without commas between" if rest.startswith((",", "{")) else ""
        raise Refused(f"more text follows the JSON value: {excerpt(rest)}", hint)
    if "\\u" in text or _UNFIT.search(text) or text.count("{") + text.count("[") > MAX_DEPTH:  # few rows are so
        _check_values(value)
    return value


def _no_json(text: str, error: json.JSONDecodeError) -> Refused:
    if not text.lstrip().startswith(("{", "[", '"')):
        return Refused(f"is not JSON: {excerpt(text.strip())}", "; expected an object {...}")
    if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
        return Refused("ends before the JSON value is complete", ": each row must stand whole on one line")
    near = excerpt(text[max(0, error.pos - 10) : error.pos + 20].strip(), 40)
    return Refused(f"is not valid JSON at column {error.pos + 1}: {error.msg}, near {near}")


def _check_values(value: Any) -> None:
    """Refuse text that no tokenizer takes, and nesting that would exhaust the stack later."""
    stack = [(value, "", 0)]
    while stack:
        node, where, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise Refused(f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, str):
            _check_text(node, where)
        elif isinstance(node, dict):
            for key, child in node.items():
                _check_text(key, where)
                stack.append((child, f"{where}.{key}" if where else key, depth + 1))
        elif isinstance(node, list):
            stack.extend((child, f"{where}[{i}]", depth + 1) for i, child in enumerate(node))


def _check_text(text: str, where: str) -> None:
    if (text.isascii() and "\0" not in text) or not (found := _UNFIT.search(text)):
        return
    what = "a NUL character" if found.group() == "\0" else "a lone surrogate (half a character)"
    raise Refused(f"{where or 'a key'} holds {what}")


# Arrays.

_SPACE = re.compile(r"[ \t\r\n]*")
_ANY = json.JSONDecoder()


def elements(text: str) -> Iterator[tuple[int, str, str]]:
    """Of the array that fills a text: (line, an element's text, ""), or (line, "", what is wrong), so that a reader
    can name a bad one. A syntax error is the last: no more can be told."""
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
            end = _ANY.raw_decode(text, at)[1]
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
