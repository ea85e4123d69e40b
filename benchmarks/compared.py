"""Whole comparisons on a CPU, as a table and a picture: `python -m benchmarks.compared [FILE.json ...]`.

A file is the JSON line that `sft_cpu`, `dpo_cpu`, `rl_cpu` or `generate_cpu` end with, and its name begins with theirs:
kept as benchmarks/results/cpu/sft_cpu-bf16.json it is in docs/numbers.md, whose table a test holds to the files. Ratios
are those of the run, round by round, so they need not be the quotient of the two medians beside them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CHECKOUT

FOLDER = CHECKOUT / "benchmarks" / "results" / "cpu"
PICTURE = FOLDER / "compared.svg"
Figures = dict[str, Any]


def read(paths: Sequence[Path]) -> dict[str, Figures]:
    """The figures of each comparison, by its file's name without ending; of generation one for each number of rows."""
    found: dict[str, Figures] = {}
    for path in paths:
        figures = json.loads(path.read_text())
        rows = [key.removeprefix("ours_rows_") for key in figures if key.startswith("ours_rows_")]
        found |= {f"{path.stem}, {count} rows": of_rows(figures, count) for count in rows} or {path.stem: figures}
    return found


def of_rows(figures: Figures, count: str) -> Figures:
    """What a run of `generate_cpu` found for so many prompts, as the other comparisons have it."""
    sides = {key.removesuffix(f"_rows_{count}"): v for key, v in figures.items() if key.endswith(f"_rows_{count}")}
    speeds = {name: value for name, value in sides.items() if "_over_" not in name}
    against = max({*speeds} - {"ours", "packed"}, key=speeds.__getitem__)
    return {
        "speed_ratio": sides[f"ours_over_{against}"],
        "rss_ratio": figures["ours_peak_rss"] / figures[f"{against}_peak_rss"],
        "against": against,
        "tokens_per_second": speeds,
        "cpu": f"{figures['cpu']}, {figures['dtype']}",
    }


def speeds(figures: Figures) -> tuple[str, dict[str, float]]:
    """(unit, units a second of each side), ours first: the one field of that kind."""
    ((key, found),) = [(key, value) for key, value in figures.items() if key.endswith("_per_second")]
    return key.removesuffix("_per_second"), dict(sorted(found.items(), key=lambda side: not side[0].startswith("ours")))


def table(found: dict[str, Figures]) -> str:
    """A row for each comparison, as Markdown; a sentence where there is none."""
    if not found:
        return "No result is kept yet."
    rows = ["| | ours | the quickest other | ratio | peak memory | CPU, torch |", "|---|---|---|---|---|---|"]
    for name, figures in found.items():
        unit, sides = speeds(figures)
        (own, ours), *others = sides.items()
        other = figures.get("against") or max(dict(others), key=dict(others).__getitem__)
        texts = [f"{name}: {own}", f"{ours:g} {unit}/s", f"{other}: {sides[other]:g}", f"{figures['speed_ratio']:.2f}x"]
        where = ", ".join([figures["cpu"], *filter(None, [figures.get("versions", {}).get("torch")])])
        texts += [f"{figures['rss_ratio']:.2f}x", where]
        rows.append(f"| {' | '.join(texts)} |")
    return "\n".join(rows)


def draw(found: dict[str, Figures], path: Path) -> None:
    """Units a second of every side as bars, a panel for each comparison."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "fourbit"  # the same file each time
    figure = Figure(figsize=(7, 0.6 + 1.1 * len(found)), layout="constrained")
    for i, (name, figures) in enumerate(found.items(), 1):
        unit, sides = speeds(figures)
        axes = figure.add_subplot(len(found), 1, i)
        colours = ["#08519c" if side.startswith("ours") else "#fd8d3c" for side in sides]
        axes.bar_label(axes.barh(list(sides), list(sides.values()), color=colours), fmt="%.4g", fontsize=7)
        axes.set_title(f"{name}: {unit} a second, {figures['cpu']}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compared", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help=f"default: those of {FOLDER.relative_to(CHECKOUT)}")
    found = read(parser.parse_args(argv).files or sorted(FOLDER.glob("*.json")))
    print(table(found))
    if found:
        draw(found, PICTURE)
        print(f"drew {PICTURE}", file=sys.stderr)


if __name__ == "__main__":
    main()
