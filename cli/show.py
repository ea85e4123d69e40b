"""What a person sees: notes and progress on stderr, results on stdout, so that a pipe gets results alone."""

import json
import math
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..data.encode import Dataset
from ..errors import visible
from ..models.load import Progress

SHOWN_DROPS = 3


def note(text: str) -> None:
    """A line of progress or advice, on stderr; it may quote a stranger's file."""
    print(visible(text), file=sys.stderr, flush=True)


def wrapped(text: str, first: str = "", later: str = "  ") -> str:
    """Text broken to the terminal's width, at blanks alone: half of a name with a hyphen is no name."""
    width = min(120, shutil.get_terminal_size().columns)
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=later, **how)


@contextmanager
def working(text: str) -> Iterator[Progress | None]:
    """Shows that something takes a while: a bar where someone watches, which what it yields moves on, else one line."""
    from rich import progress
    from rich.console import Console

    if not (console := Console(stderr=True)).is_terminal:
        note(f"{text} ...")
        yield None
    else:
        parts = progress.TextColumn("{task.description}", markup=False), progress.BarColumn()
        speed = progress.TextColumn("{task.fields[of]}"), progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
        with progress.Progress(*parts, *speed, console=console, transient=True) as bar:
            task = bar.add_task(visible(text), total=None, of="")
            yield lambda n, of, size, total: bar.update(task, completed=size, total=total, of=f"{n} of {of} tensors")


def describe(name: str, dataset: Dataset) -> None:
    """One line of counts for a dataset, and what its reader found remarkable."""
    report = dataset.report
    share = report.trained / max(1, report.tokens)
    parts = [count(report.rows, "row"), count(report.tokens, "token"), f"{share:.0%} trained"]
    parts += [f"longest {report.longest}"] + [f"{report.truncated} truncated"] * (report.truncated > 0)
    parts += [f"{number} skipped ({kind})" for kind, number in report.skipped.kinds.items()]
    parts += [f"{number} dropped ({kind})" for kind, number in report.dropped.kinds.items()]
    note(f"{name}: {', '.join(parts)}")
    for line in report.dropped.lines(SHOWN_DROPS):
        note(f"  dropped: {line}")
    for notice in report.notices:
        note(f"  note: {notice}")


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the names padded to one width."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def result(values: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """The outcome of a command: JSON for programs, else text; NaN and infinity are null in JSON."""
    if as_json:
        finite = json.loads(json.dumps(values, default=str), parse_constant=lambda name: None)
        text = json.dumps(finite, ensure_ascii=False)
    print(text if as_json else visible(text), flush=True)


def bars(values: Sequence[int], most: int = 10, width: int = 40) -> str:
    """A histogram of whole numbers in at most `most` round steps, one line each."""
    top = max(values, default=0)
    step = next(s for e in range(20) for s in (10**e, 2 * 10**e, 5 * 10**e) if s * most > top)
    counts = Counter(value // step for value in values)
    longest = max(counts.values(), default=1)
    rows = []
    for i in range(min(counts, default=0), top // step + 1):
        name = f"{i * step}-{(i + 1) * step - 1}" if step > 1 else str(i)
        rows.append((name, f"{'█' * -(-counts[i] * width // longest)} {counts[i]}"))
    return pairs(rows)


def count(number: int, noun: str) -> str:
    """`1 row`, `1,024 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(number: int) -> str:
    """A large number to three digits: `134 M`, `1.24 B`, `35.6 k`."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "B"), (1e6, "M")) if number >= size), (1e3, "k"))
    return f"{number / size:.3g} {unit}"


def figure(value: float | None, digits: int = 4) -> str:
    """`value` with so many digits; a dash for what is missing or not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
