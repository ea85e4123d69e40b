"""Reinforcement with QLoRA on CPU, speed and peak memory, ours against TRL with peft and bitsandbytes, in one run.

`python -m benchmarks.rl_cpu` answers prompts of the ticket task with SmolLM2-135M, 8 answers of at most 15 tokens each,
and makes one update on them, with both in turn, each in its own process. It prints a table and one JSON line with
`speed_ratio` (answers a second, drawing and update together, ours over theirs, the median over pairs of steps) and
`rss_ratio` (peak resident memory, loading included). `--dtype` is as in `sft_cpu`.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import fourbit
from fourbit.data.encode import prompt_texts
from fourbit.data.forms import samples_of
from fourbit.data.template import template_for

from . import CHECKOUT
from .rl_sides import GROUP, NEW
from .sides import ADAPTER, ALPHA, BATCHES, RANK
from .turns import TICKETS, WARM_UP, main, measure, summarise, worker

SIDES = "rl_sides"
PACKAGES = ("torch", "trl", "transformers", "peft", "bitsandbytes")


def prepare(folder: Path, model_path: Path, steps: int, batch_size: int, threads: int) -> list[list[dict[str, Any]]]:
    """Write what both sides read: batches of prompts, one adapter start, and the weights as the peer takes them."""
    model, tokenizer = fourbit.load(model_path, quant_type="nf4")
    samples = samples_of([str(TICKETS)], "prompts")[: steps * batch_size]
    texts = prompt_texts(samples, tokenizer, template_for(tokenizer, None))
    rows = [{"prompt": text, "asked": sample.context} for text, sample in zip(texts, samples, strict=True)]
    batches = [rows[k * batch_size : (k + 1) * batch_size] for k in range(steps)]
    (folder / BATCHES).write_text(json.dumps(batches))
    fourbit.attach(model, fourbit.LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    fourbit.save_adapter(model, folder / ADAPTER)
    subprocess.run(worker(SIDES, "prepare", folder, model_path, threads), check=True, cwd=CHECKOUT)
    return batches


def run(options: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    batches = prepare(folder, model, options.steps + WARM_UP, options.batch_size, options.threads)
    sides = measure(SIDES, folder, model, len(batches), options.threads, options.dtype)
    print(
        f"SmolLM2-135M, NF4, rank {RANK}, {options.batch_size} prompts a step with {GROUP} answers of at most {NEW} "
        f"tokens each, {options.threads} threads"
    )
    return summarise(sides, [GROUP * len(batch) for batch in batches], "answers", PACKAGES, alike=False)


if __name__ == "__main__":
    main("rl_cpu", __doc__ or "", 2, run)
