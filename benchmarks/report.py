"""A run for people: a table of every point, and a comparison with an earlier run.

`python -m benchmarks.report RESULT.jsonl` prints the table of a result file again.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import OPS, OURS
from .timing import quartiles

Line = dict[str, Any]
NOISE = 0.02  # medians closer than this are called equal whatever their spread


def table(figures: Sequence[Line]) -> str:
    """By op: our time, its share of the roofline, and how many times as long every other variant takes."""
    parts = []
    for op, about in OPS.items():
        lines = [line for line in figures if line["op"] == op]
        if lines:
            parts.append(f"{op}: {about}\n{_op_table(lines)}")
    return "\n\n".join(parts)


def _op_table(lines: Sequence[Line]) -> str:
    points = dict.fromkeys(line["name"] for line in lines)
    others = [name for name in dict.fromkeys(line["variant"] for line in lines) if name != OURS]
    rows = [["", "ours us", "quartiles", "roofline", *others]]
    for name in points:
        here = {line["variant"]: line for line in lines if line["name"] == name}
        rows.append([name.partition(" ")[2], *_own(here.get(OURS)), *(_other(here.get(other)) for other in others)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    aligned = [[row[0].ljust(widths[0]), *rest[1:]] for row, rest in zip(rows, right, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _own(line: Line | None) -> list[str]:
    if line is None:
        return ["refused", "", ""]
    low, high = line["us_quartiles"]
    share = f"{line['roofline_share']:.0%}" if "roofline_share" in line else ""
    return [f"{line['us']:.4g}", f"{low:.4g}-{high:.4g}", share]


def _other(line: Line | None) -> str:
    if line is None:
        return "-"
    return f"{line['over_ours'][1]:.2f}x" if "over_ours" in line else f"{line['us']:.4g} us"


def read(path: Path) -> list[Line]:
    """The lines of a result file. ValueError, naming the line, where one is no JSON object."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as problem:
            raise ValueError(f"{path}:{number} is no JSON: {problem}") from None
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(f"{path}:{number} is no line of a benchmark's result")
        lines.append(line)
    return lines


def compare(new: Sequence[Line], old: Sequence[Line]) -> str:
    """Our own times against those of an earlier run, point by point; slower or quicker only beyond both spreads."""
    before = {(line["name"], line["variant"]): line for line in figures_of(old)}
    pairs = [(line, before.get((line["name"], line["variant"]))) for line in figures_of(new)]
    known = [(line, other) for line, other in pairs if other is not None and line["variant"].startswith(OURS)]
    if not known:
        return "no point of this run is in the earlier one"
    text = [f"{'':60} {'before us':>10} {'now us':>10} {'now/before':>10}"]
    for line, other in known:
        text.append(
            f"{line['name'] + ', ' + line['variant']:60} {other['us']:10.4g} {line['us']:10.4g} "
            f"{line['us'] / other['us']:10.3f} {verdict(line, other)}"
        )
    low, middle, high = quartiles([line["us"] / other["us"] for line, other in known])
    text.append(f"{len(known)} points, now/before: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    machines = {line.get("gpu") or line.get("cpu") for pair in known for line in pair}
    if len(machines) > 1:
        text.append(f"CAREFUL: not one machine: {', '.join(sorted(map(str, machines)))}")
    return "\n".join(text)


def verdict(line: Line, other: Line) -> str:
    if abs(line["us"] / other["us"] - 1) < NOISE:
        return ""
    if line["us_quartiles"][0] > other["us_quartiles"][1]:
        return "slower"
    return "quicker" if line["us_quartiles"][1] < other["us_quartiles"][0] else ""


def figures_of(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line["kind"] == "figure"]


def heading(lines: Iterable[Line]) -> str:
    """The machine and its ceilings, in a line."""
    line = next(line for line in lines if line["kind"] == "ceilings")
    rates = f"copies {line['copy_bandwidth'] / 1e9:.4g} GB/s, multiplies {line['matmul_rate'] / 1e12:.4g} TFLOP/s"
    machine = line["gpu"] or f"{line['cpu']}, {line['threads']} thread{'s' * (line['threads'] != 1)}"
    return f"{machine}, torch {line['versions']['torch']}, {line['dtype']}, {line['date'][:10]}: {rates}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    result = read(parser.parse_args().result)
    print(f"{heading(result)}\n\n{table(figures_of(result))}")
