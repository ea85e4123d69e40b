"""A row of a data file, and what can be wrong with one, or with many."""

import math
from collections import Counter
from typing import Any, NamedTuple

from ..errors import InputError

UNUSED = "not used: "  # begins the note of a field of a row that nothing reads
SHOWN_KEYS = 8
SHOWN_PROBLEMS, SHOWN_CHARACTERS = 20, 1600
KEPT_PROBLEMS = 1000


class Place(NamedTuple):
    """Where a row stands, counted from 1: `file:line`, or in rows that were given as objects "row 17 of train"."""

    name: str
    number: int
    in_file: bool = True

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.in_file else f"row {self.number} of {self.name}"


class BadRow(InputError):
    """One row that cannot be used, told on one line, `place: field: reason`; `kind` groups them for counting."""

    def __init__(self, place: Place, field: str, reason: str, kind: str = "row") -> None:
        super().__init__(f"{place}: {field}: {reason}".replace("\n", "\\n").replace("\t", "\\t"))
        self.place, self.kind = place, kind


class Problems(list[BadRow]):
    """The first 1,000 of many problems, how many there are (`total`), and of each kind (`kinds`)."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.kinds = 0, Counter[str]()

    def add(self, bad: BadRow) -> None:
        """Count one more problem, and keep it while there is room."""
        self.total += 1
        self.kinds[bad.kind] += 1
        if self.total <= KEPT_PROBLEMS:
            bad.__traceback__ = bad.__context__ = None  # which hold the row
            self.append(bad)

    def lines(self, most: int, characters: float = math.inf) -> list[str]:
        """The first ones, one a line: so many, or fewer of more characters; and how many more there are."""
        shown = [str(problem) for problem in self[:most]]
        while len(shown) > 1 and sum(map(len, shown)) > characters:
            shown.pop()
        return shown + [f"... and {self.total - len(shown)} more"] * (self.total > len(shown))

    def describe(self, rows: str, way: str) -> str:
        """One message: how many of `rows` these are, what to do, and the first ones."""
        head = f"{self.total} of {rows} rows cannot be used; {way}:"
        return "\n".join([head, *self.lines(SHOWN_PROBLEMS, SHOWN_CHARACTERS)])


class Row(NamedTuple):
    """One JSON object and where it stood."""

    data: dict[str, Any]
    place: Place


def bad(row: Any, field: str, reason: str, kind: str = "row") -> BadRow:
    """The error for a row, or a sample of one, that breaks a rule; the caller raises it."""
    return BadRow(row.place, field, reason, kind)


def typed(row: Any, field: str, value: Any, kind: type, rule: str = "be a string") -> Any:
    """The value. Raises BadRow where it is of another type: it must ..."""
    if not isinstance(value, kind):
        raise bad(row, field, f"must {rule}, not {type_name(value)}")
    return value


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), "null")


def counted(notes: Counter[str], rows: int) -> list[str]:
    """Notes of rows as notices that say how many rows each is of; of fields that are not used the 8 most frequent."""
    unused = sorted((note for note in notes if note.startswith(UNUSED)), key=lambda note: (-notes[note], note))
    said = [*sorted(note for note in notes if not note.startswith(UNUSED)), *unused[:SHOWN_KEYS]]
    more = [f"... and {len(unused) - SHOWN_KEYS} more keys that are not used"] if len(unused) > SHOWN_KEYS else []
    return [f"{notes[note]} of {rows} rows: {note}" for note in said] + more
