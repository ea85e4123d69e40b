"""QLoRA training speed and peak memory on CPU, ours against transformers + peft + bitsandbytes, in one run.

`python -m benchmarks.sft_cpu` trains SmolLM2-135M on ticket rows with both, one optimizer step in turn, each in its own
process, and prints a table and one JSON line with `speed_ratio` (non-padding tokens a second, ours over theirs, the
median over pairs of steps) and `rss_ratio` (peak resident memory, loading included). It refuses to report when the two
train differently: the losses of every step must agree. `--dtype bf16`: both in bfloat16, and the peer in float32 too,
in case that is its best; the ratios are to the quicker.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import fourbit
from fourbit.data.batch import Encoded
from fourbit.data.encode import load as load_rows
from fourbit.data.order import step_indices

from . import CHECKOUT
from .sides import ADAPTER, ALPHA, BATCHES, RANK, Row
from .turns import TICKETS, WARM_UP, main, measure, summarise, worker

SIDES = "sft_sides"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def row(part: Encoded) -> Row:
    """Its tokens, and after each the one to predict there, or -100."""
    following = zip(part.ids[1:], part.trained[1:], strict=True)
    return {"ids": part.ids, "targets": [token if trained else -100 for token, trained in following] + [-100]}


def batches_of(folder: Path, tokenizer: Any, steps: int, batch_size: int) -> list[list[Row]]:
    """The ticket rows of each step, written for the sides to read."""
    rows = [row(*example.parts) for example in load_rows([TICKETS], tokenizer).examples]
    batches = [[rows[i] for i in step_indices(len(rows), batch_size, k, 0)] for k in range(steps)]
    (folder / BATCHES).write_text(json.dumps(batches))
    return batches


def prepare(folder: Path, model_path: Path, steps: int, batch_size: int, threads: int) -> list[list[Row]]:
    """Write what both sides read: batches of token ids, one adapter start, and the weights as the peer takes them."""
    model, tokenizer = fourbit.load(model_path, quant_type="nf4")
    batches = batches_of(folder, tokenizer, steps, batch_size)
    fourbit.attach(model, fourbit.LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    fourbit.save_adapter(model, folder / ADAPTER)
    subprocess.run(worker(SIDES, "prepare", folder, model_path, threads), check=True, cwd=CHECKOUT)
    return batches


def run(options: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    batches = prepare(folder, model, options.steps + WARM_UP, options.batch_size, options.threads)
    sides = measure(SIDES, folder, model, len(batches), options.threads, options.dtype)
    print(f"SmolLM2-135M, NF4, rank {RANK}, {options.batch_size} examples a step, {options.threads} threads")
    tokens = [sum(len(row["ids"]) for row in batch) for batch in batches]
    return summarise(sides, tokens, "tokens", PACKAGES)


if __name__ == "__main__":
    main("sft_cpu", __doc__ or "", 8, run)
