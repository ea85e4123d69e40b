"""The benchmark suite: `python -m benchmarks [--quick] [--only PATTERN] [--compare OLD] [--device D] [--out DIR]`.

Measures the machine's ceilings, then ours and every peer that is installed in turn, on one GPU or on the CPU. Prints a
table, the share of the roofline, the ratio to each peer and whether each level we are held to is met; writes one JSON
line a figure and draws pictures of them. Ends in exit code 1 if one of our own ops computed a wrong result.
"""

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import (
    CHECKOUT,
    ceilings,
    layer,
    machine,
    ops_grouped,
    ops_linear,
    ops_lora,
    ops_lora_cost,
    ops_memory,
    ops_weights,
    optimizers,
    peers,
    report,
    step,
)
from .cases import OPS, Case, Setting
from .ceilings import Ceilings
from .held_to import findings
from .run import Result, Runner
from .shapes import Grid, grid_for
from .timing import clock_for

MODULES = (ops_weights, ops_linear, ops_memory, ops_lora, ops_lora_cost, layer, step, ops_grouped, optimizers)
RESULTS = CHECKOUT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None, grid: Grid | None = None) -> int:
    """`grid` replaces the points of the device: for tests."""
    start = time.monotonic()
    parser = build_parser()
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA GPU here; --device cpu runs without one")
    old = read_old(parser, options.compare)
    grid = grid or grid_for(device, options.quick)
    setting = Setting(device, grid.dtype, machine.cache_bytes(device))
    every = [case for module in MODULES for case in module.cases(grid, setting)]
    cases = chosen(parser, every, options.only)
    path = result_path(options.out, setting, options.quick)
    with path.open("x") as file:
        result = measure(setting, grid, cases, start, file, quick=options.quick)
        # The levels are those of a GPU.
        found = findings(result.lines, [case.point for case in every]) if device.type == "cuda" else []
        for finding in found:
            write(file, finding.fields() | machine.facts(device))
    summarise(result, found)
    if old is not None:
        print(f"\nagainst {options.compare}:\n{report.compare(result.lines, old)}")
    print(f"\nwrote {path}")
    draw(path)
    return 1 if result.wrong else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="fewer points, in two minutes instead of ten")
    parser.add_argument("--only", metavar="PATTERN", help=f"points whose name matches; ops: {', '.join(OPS)}")
    parser.add_argument("--compare", metavar="OLD.jsonl", type=Path, help="an earlier run's file, to compare with")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser


def read_old(parser: argparse.ArgumentParser, path: Path | None) -> list[dict[str, Any]] | None:
    """Read before the run, so that a wrong name does not cost one."""
    if path is None:
        return None
    try:
        return report.read(path)
    except (OSError, ValueError) as problem:
        parser.error(f"--compare: {problem}")


def chosen(parser: argparse.ArgumentParser, cases: list[Case], pattern: str | None) -> list[Case]:
    """The cases whose name the regular expression is found in."""
    if pattern is None:
        return cases
    try:
        found = [case for case in cases if re.search(pattern, case.point.name)]
    except re.error as problem:
        parser.error(f"--only: {pattern!r} is no regular expression: {problem}")
    if not found:
        parser.error(f"--only: nothing matches {pattern!r}; names are such as {cases[0].point.name!r}")
    return found


def result_path(folder: Path, setting: Setting, quick: bool) -> Path:
    """A new file such as nvidia-h100-80gb-hbm3-20261122-0715.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-quick" if quick else "")
    return folder / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"


def measure(setting: Setting, grid: Grid, cases: list[Case], start: float, file: Any, *, quick: bool) -> Result:
    facts, clock = machine.facts(setting.device), clock_for(setting.device)
    before = machine.clocks() if setting.device.type == "cuda" else None
    limits = ceilings.measure(setting, clock)
    first = ceiling_line(limits, setting) | facts
    print(report.heading([first]))
    write(file, first)
    runner = Runner(
        setting,
        clock,
        limits,
        facts,
        grid.case_seconds,
        start + grid.seconds,
        grid.least_rounds,
        keep=lambda line: write(file, line),
    )
    peers.load()
    gc.freeze()  # what is imported by now need not be searched for garbage between two cases
    result = runner.run(cases)
    gc.unfreeze()
    run = {"kind": "run", "argv": sys.argv[1:], "quick": quick, "seconds": round(time.monotonic() - start, 1)}
    run |= {"left_out": result.left_out, "absent": result.absent, "wrong": result.wrong}
    if setting.device.type == "cuda":  # SM and memory clock, temperature, power
        run["clocks"] = [before, machine.clocks()]
    write(file, run | facts)
    return result


def ceiling_line(limits: Ceilings, setting: Setting) -> dict[str, Any]:
    return {
        "kind": "ceilings",
        "copy_bandwidth": float(f"{limits.bandwidth:.4g}"),
        "matmul_rate": float(f"{limits.rate:.4g}"),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "copy_us_quartiles": [round(1e6 * value, 2) for value in limits.copy.quartiles],
        "matmul_us_quartiles": [round(1e6 * value, 2) for value in limits.matmul.quartiles],
        "timed": limits.copy.timed,
    }


def write(file: Any, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=file, flush=True)


def summarise(result: Result, found: Sequence[Any]) -> None:
    print(f"\n{report.table(result.figures())}\n")
    if found:
        print("held to, at its worst point:")
        print("\n".join(f"  {finding}" for finding in found))
    for name, reason in result.absent.items():
        print(f"not here: {name} ({reason})")
    if result.left_out:
        ops = {op: sum(name.split()[0] == op for name in result.left_out) for op in OPS}
        print(f"left out for want of time: {', '.join(f'{n} of {op}' for op, n in ops.items() if n)}")
    for text in result.wrong:
        print(f"WRONG: {text}")


def draw(path: Path) -> None:
    try:
        from . import pictures
    except ImportError as problem:
        print(f"no pictures: {problem}; draw them elsewhere with python -m benchmarks.pictures {path.name}")
        return
    for drawn in pictures.draw(path):
        print(f"drew {drawn}")


if __name__ == "__main__":
    sys.exit(main())
