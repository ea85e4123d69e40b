"""DPO with QLoRA on CPU, speed and peak memory, ours against TRL with peft and bitsandbytes, in one run.

`python -m benchmarks.dpo_cpu` trains SmolLM2-135M on preference pairs of the ticket task with both (the right answer
against one with a wrong field), one optimizer step in turn, each in its own process, and prints a table and one JSON
line with `speed_ratio` (pairs a second, ours over theirs, the median over pairs of steps) and `rss_ratio` (peak
resident memory, loading included). It refuses to report when the two train differently: the losses of every step must
agree. `--dtype` is as in `sft_cpu`. `--against padded` holds ours against itself with each answer in a padded row of
its own, which says what sharing the prompt is worth.
"""

import argparse
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fourbit
from fourbit.data.batch import Example
from fourbit.data.encode import load
from fourbit.data.order import step_indices

from . import CHECKOUT
from .sides import ADAPTER, ALPHA, BATCHES, RANK, Row
from .turns import TICKETS, WARM_UP, main, measure, summarise, worker

SIDES = "dpo_sides"
PACKAGES = ("torch", "trl", "transformers", "peft", "bitsandbytes")
SYSTEM = (
    "File this ticket. Categories are delivery, payment, account and product; priorities are high, medium and low; "
    "teams are logistics, finance, support, returns and business."
)


def near_misses(path: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Preference rows: the right answer of each ticket against the same with one field's value changed to another."""
    tickets = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    right = [dict(part.split(": ") for part in messages[-1]["content"].split(" / ")) for messages in tickets]
    values = {field: sorted({labels[field] for labels in right}) for field in right[0]}
    chooser = random.Random(seed)
    for (_, user, answer), labels in zip(tickets, right, strict=True):
        field = chooser.choice(list(values))
        wrong = labels | {field: chooser.choice([value for value in values[field] if value != labels[field]])}
        text = " / ".join(f"{name}: {value}" for name, value in wrong.items())
        yield {
            "prompt": [{"role": "system", "content": SYSTEM}, user],
            "chosen": [answer],
            "rejected": [{"role": "assistant", "content": text}],
        }


def row(number: int, pair: Example) -> Row:
    """A pair as token ids: the prompt once, and of each answer what is trained."""
    start = pair.parts[0].trained.index(True)
    answers = {}
    for name, part in zip(("chosen", "rejected"), pair.parts, strict=True):
        end = len(part.ids) - part.trained[::-1].index(True)  # what the template adds after the answer goes
        assert all(part.trained[start:end]) and part.trained.index(True) == start
        answers[name] = part.ids[start:end]
    return {"number": number, "prompt": pair.parts[0].ids[:start], **answers}


def prepare(folder: Path, model_path: Path, steps: int, batch_size: int, threads: int) -> list[list[Row]]:
    """Write what both sides read: batches of pairs, one adapter start, and the weights as the peer takes them."""
    model, tokenizer = fourbit.load(model_path, quant_type="nf4")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, near_misses(TICKETS, seed=0))))
    pairs = load(folder / "pairs.jsonl", tokenizer, "pairs").examples
    batches = [
        [row(k * batch_size + n, pairs[i]) for n, i in enumerate(step_indices(len(pairs), batch_size, k, 0))]
        for k in range(steps)
    ]
    (folder / BATCHES).write_text(json.dumps(batches))
    fourbit.attach(model, fourbit.LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    fourbit.save_adapter(model, folder / ADAPTER)
    subprocess.run(worker(SIDES, "prepare", folder, model_path, threads), check=True, cwd=CHECKOUT)
    return batches


def run(options: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    batches = prepare(folder, model, options.steps + WARM_UP, options.batch_size, options.threads)
    rows = [row for batch in batches for row in batch]
    length = sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) for r in rows) / (2 * len(rows))
    prompt = sum(len(r["prompt"]) for r in rows) / len(rows)
    sides = measure(SIDES, folder, model, len(batches), options.threads, options.dtype, options.against)
    print(
        f"SmolLM2-135M, NF4, rank {RANK}, {options.batch_size} pairs a step of 2 x {length:.0f} tokens on average, "
        f"{prompt:.0f} of them prompt, {options.threads} threads; losses agree in every step"
    )
    figures = summarise(sides, [len(batch) for batch in batches], "pairs", PACKAGES)
    return figures | {"tokens_per_answer": round(length, 1), "tokens_per_prompt": round(prompt, 1)}


if __name__ == "__main__":
    main("dpo_cpu", __doc__ or "", 4, run, against=("peer", "padded"))
