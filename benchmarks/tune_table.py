"""kernels/table.json as `tune` writes it: one line a row, so that a diff shows what was measured anew."""

import json
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
LISTS = ("fused", "measured")
HEAD = (("gpu", "source", "sms"), ("copy_bandwidth", "matmul_rate", "issue_rate"))  # fields that share a line
KEY = ("op", "dtype", "N", "K", "rank", "M")


def merged(entry: Row, rows: Sequence[Row]) -> Row:
    """`entry` with these measured rows, each in the place of the one it had for the same point."""
    kept = {_key(row): row for row in entry["measured"]} | {_key(row): row for row in rows}
    return entry | {"measured": sorted(kept.values(), key=_order)}


def _key(row: Row) -> str:
    return json.dumps([row.get(name) for name in KEY])


def _order(row: Row) -> tuple[Any, ...]:
    N = row["N"] if isinstance(row["N"], list) else [row["N"]]
    return row["op"], row["dtype"], row["K"], len(N), N, row.get("rank", 0), row["M"]


def dump(table: dict[str, Row]) -> str:
    """The table as text. Parsing it gives the table back."""
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {_entry(entry)}" for name, entry in table.items()) + "\n}\n"


def _entry(entry: Row) -> str:
    lines = [", ".join(_pair(name, entry[name]) for name in names if name in entry) for names in HEAD]
    other = [name for name in entry if name not in LISTS and not any(name in names for names in HEAD)]
    lines += [_pair(name, entry[name]) for name in other]
    return (
        "{\n"
        + ",\n".join(f"    {line}" for line in [*filter(None, lines), *(_list(entry, n) for n in LISTS)])
        + "\n  }"
    )


def _list(entry: Row, name: str) -> str:
    rows = ",\n".join(f"      {json.dumps(row)}" for row in entry[name])
    return f"{json.dumps(name)}: [\n{rows}\n    ]" if rows else f"{json.dumps(name)}: []"


def _pair(name: str, value: Any) -> str:
    return f"{json.dumps(name)}: {_rate(value) if name in HEAD[1] else json.dumps(value)}"


def _rate(value: float) -> str:
    """Such as 2.96e13, which reads better than its digits; those where it would not be the same number."""
    mantissa, _, exponent = f"{value:.2e}".partition("e+")
    text = f"{mantissa.removesuffix('0')}e{exponent}"
    return text if float(text) == value else json.dumps(value)
