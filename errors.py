"""The errors a user can cause or meet, each with the exit code that the command line ends with.

A leaf module: every layer may import it. Bad input raises `InputError` with one clear paragraph that says what is
wrong, where (file and line, key, tensor), the rule, the value received and what to do. Misuse of a function by a
program (a wrong shape, an impossible argument) stays a plain `ValueError` or `TypeError`.

What a message quotes may be a stranger's, of any length: here, and nowhere else, it is made safe to print and short.
"""

import re

_MESSAGE = 1_900  # characters; with the command's "fourbit: " and a last hint still one paragraph of 2,000
_WORD = 300  # longer than any path that somebody typed
_LONG_WORD = re.compile(rf"\S{{{_WORD + 1},}}")


class FourbitError(Exception):
    """Base of every error below; `exit_code` is what the command line ends with. Its message is `clean`."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(clean(str(message)))


class InputError(FourbitError, ValueError):
    """A file, a setting or a row that breaks a rule the user can mend."""

    exit_code = 2


class EnvironmentProblem(FourbitError, RuntimeError):
    """Something the machine lacks: a device, a library, a permission, a free output folder."""

    exit_code = 3


class DiskError(FourbitError, OSError):
    """A write that the disk refused; the message says how many bytes were needed."""

    exit_code = 5


class NumericError(FourbitError, ArithmeticError):
    """Training met NaN or infinity and stopped, so that no broken weights are saved."""

    exit_code = 6


def visible(text: str) -> str:
    """Text from elsewhere, safe to print: control characters, which could drive the terminal, are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def clean(message: str) -> str:
    """One paragraph, `visible`, of at most 1,900 characters: the middle of an overlong word or message is left out."""
    shorter = _LONG_WORD.sub(lambda word: _without_middle(word[0], _WORD), message)
    return _without_middle(re.sub(r"\n\s*\n", "\n", visible(_without_middle(shorter, _MESSAGE))), _MESSAGE)


def shown(value: object, limit: int = 80) -> str:
    """A value quoted in a message: as Python writes it, of at most `limit` characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    return _without_middle(text, limit)


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    gap = f" ... ({len(text) - limit:,} more characters) ... "
    head = (limit - len(gap)) * 2 // 3
    return text[:head] + gap + text[len(text) - (limit - len(gap) - head) :]
