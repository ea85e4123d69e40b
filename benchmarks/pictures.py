"""Pictures of a run: `python -m benchmarks.pictures RESULT.jsonl`. The roofline, and speed against each peer.

Drawn from the result file alone, so a machine without matplotlib can measure and another one draw. PNG and SVG.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import report
from .cases import OURS
from .ops_linear import FALLBACK
from .peers import bnb, dense, fused_lora, peft_lora

Line = dict[str, Any]
COLOURS = {
    OURS: "#08519c",
    FALLBACK: "#6baed6",
    bnb.NESTED: "#d94801",
    bnb.PLAIN: "#fd8d3c",
    bnb.DECODED: "#fdbe85",
    peft_lora.QLORA: "#d94801",
    fused_lora.NAME: "#31a354",
    peft_lora.DENSE: "#969696",
    dense.NAME: "#252525",
}
MARKERS = {"dequantize": "s", "linear": "o", "qlora": "^"}
ON_ROOFLINE = (OURS, bnb.NESTED, peft_lora.QLORA, dense.NAME)


def draw(path: Path) -> list[Path]:
    """The pictures of the result file at `path`, beside it; those for which the run has figures."""
    matplotlib.rcParams["svg.hashsalt"] = "fourbit"  # the same file each time
    lines = report.read(path)
    figures, ceilings = report.figures_of(lines), next(line for line in lines if line["kind"] == "ceilings")
    drawn: list[Path] = []
    for name, make in (("roofline", roofline), ("speed", speed)):
        figure = make(figures, ceilings)
        for ending in ("png", "svg") if figure else ():
            drawn.append(path.with_name(f"{path.stem}-{name}.{ending}"))
            figure.savefig(drawn[-1], dpi=150, metadata={"Date": None} if ending == "svg" else None)
    return drawn


def roofline(figures: Sequence[Line], ceilings: Line) -> Figure | None:
    """Reached FLOP/s over the work's FLOP a byte, under the measured ceilings."""
    points = [f for f in figures if f["op"] in MARKERS and f["flops"] and f["bytes"] and f["variant"] in ON_ROOFLINE]
    if not points:
        return None
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    bandwidth, rate = ceilings["copy_bandwidth"], ceilings["matmul_rate"]
    intensities = [point["flops"] / point["bytes"] for point in points]
    left, right = min(intensities) / 2, max(*intensities, 4 * rate / bandwidth)
    roof = ([left, rate / bandwidth, right], [left * bandwidth, rate, rate])
    label = f"measured: {bandwidth / 1e9:.3g} GB/s copied, {rate / 1e12:.3g} TFLOP/s"
    axes.plot(*roof, color="black", linewidth=1.2, label=label)
    for variant in ON_ROOFLINE:
        for op, marker in MARKERS.items():
            here = [p for p in points if p["variant"] == variant and p["op"] == op]
            x, y = [p["flops"] / p["bytes"] for p in here], [p["flops"] / p["us"] * 1e6 for p in here]
            face = COLOURS[variant] if variant == OURS else "none"
            label = f"{variant}: {op}" if here else None
            axes.scatter(x, y, s=22, marker=marker, edgecolors=COLOURS[variant], facecolors=face, label=label)
    axes.set(xscale="log", yscale="log", xlabel="least work, FLOP a byte", ylabel="reached, FLOP/s")
    axes.set_title(machine(ceilings), fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def speed(figures: Sequence[Line], ceilings: Line) -> Figure | None:
    """How many times as long each peer takes, over the rows of x; a panel for each op and shape, ours the line at 1."""
    panels: dict[tuple[str, ...], list[Line]] = {}
    for line in figures:
        plain = line["op"] in ("linear", "qlora") and line["rank"] in (0, 16) and not line["dropout"]
        if plain and "over_ours" in line and line["variant"] != dense.NAME:
            panels.setdefault((line["op"], line["model"], line["projection"]), []).append(line)
    chosen = most_rows(panels)
    if not chosen:
        return None
    columns = min(3, len(chosen))
    lines_of = -(-len(chosen) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * lines_of + 1), layout="constrained")
    named: dict[str, Any] = {}
    for i, (key, lines) in enumerate(chosen.items(), 1):
        axes = figure.add_subplot(lines_of, columns, i)
        speed_panel(axes, lines)
        axes.set_title(f"{' '.join(key)} ({lines[0]['N']}x{lines[0]['K']})", fontsize=8)
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
    figure.suptitle(machine(ceilings), fontsize=9)
    return figure


def most_rows(panels: dict[tuple[str, ...], list[Line]], most: int = 6) -> dict[tuple[str, ...], list[Line]]:
    """Up to `most` panels, those with most numbers of rows first, in the order of the run."""
    rows = {key: len({line["M"] for line in lines}) for key, lines in panels.items()}
    best = sorted(panels, key=lambda key: -rows[key])[:most]
    return {key: panels[key] for key in panels if key in best and rows[key] > 1}


def speed_panel(axes: Axes, lines: Sequence[Line]) -> None:
    axes.axhline(1, color=COLOURS[OURS], linewidth=1)
    for variant in dict.fromkeys(line["variant"] for line in lines):
        here = sorted((line for line in lines if line["variant"] == variant), key=lambda line: line["M"])
        low, middle, high = zip(*(line["over_ours"] for line in here), strict=True)
        x, colour = [line["M"] for line in here], COLOURS.get(variant, "#756bb1")
        axes.plot(x, middle, "o-", markersize=3, linewidth=1, color=colour, label=variant)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="rows of x", ylabel="time / ours", ylim=(0, None))
    axes.set_xticks(ticks := sorted({line["M"] for line in lines}), [str(tick) for tick in ticks], fontsize=6)
    axes.minorticks_off()


def machine(line: Line) -> str:
    return f"{line['gpu'] or line['cpu']}, torch {line['versions']['torch']}, {line['date'][:10]}, {line['commit']}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    for picture in draw(parser.parse_args().result):
        print(f"drew {picture}")
    sys.exit()
