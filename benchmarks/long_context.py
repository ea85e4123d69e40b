"""A QLoRA step as rows grow: `python -m benchmarks.long_context MODEL [--tokens 256 1024 8192] [--length 0]`.

Random tokens pass SmolLM2-135M (its GGUF, or any model) in NF4 with LoRA of rank 16 on every linear, in one row: one
text, or packed texts of `--length` tokens each. Every token but each text's last is trained. Printed for each number of
tokens, the median of rounds in turn: seconds of a step (forward, backward, update), tokens a second, and the peak of
`RssAnon` in it above the level after imports. One text's attention grows with the square of its length; texts of one
length should take a time that is proportional to their tokens. The last line is JSON.

glibc keeps freed blocks of up to 32 MB, between which the inputs that layers keep lie: at thousands of tokens
most of the peak may be such holes. MALLOC_MMAP_THRESHOLD_=1048576 in the environment gives them back, and shows it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fourbit
from fourbit.data.batch import pack
from fourbit.data.encode import Encoded, Example
from fourbit.lora.layer import adapter_parameters
from fourbit.models.recompute import KEEPS
from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.loop import Run
from fourbit.trainer.step import make_optimizer

from .load_memory import Watch, rss_anon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 8192])
    parser.add_argument("--length", type=int, default=0, help="tokens of each packed text; 0: one text")
    parser.add_argument("--checkpointing", choices=KEEPS, default="input")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = rss_anon()
    run = training(options.model, options.checkpointing)
    found: dict[int, list[tuple[float, int]]] = {tokens: [] for tokens in options.tokens}
    for _ in range(options.rounds):
        for tokens, measured in found.items():
            measured.append(step(run, tokens, options.length or tokens, before))
    report(found, options)


def training(path: Path, checkpointing: Any) -> Run:
    model, _ = fourbit.load(path, quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=16, alpha=32), seed=0)
    model.train().checkpointing = checkpointing
    parameters = adapter_parameters(model)
    config = TrainingConfig(out="none", weight_decay=0.0, max_grad_norm=1.0)
    return Run(model, parameters=parameters, optimizer=make_optimizer(parameters, config))


def step(run: Run, tokens: int, length: int, before: int) -> tuple[float, int]:
    """Seconds, and the peak of memory above `before`, of a step on texts of that length."""
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    texts = [Encoded(ids[i : i + length], [True] * len(ids[i : i + length]), "", "") for i in range(0, tokens, length)]
    batch = pack([(i, Example((text,))) for i, text in enumerate(texts)])
    with Watch() as watch:
        start = time.perf_counter()
        run.forward_backward(batch)
        run.optim_step(1e-4)
        seconds = time.perf_counter() - start
    return seconds, watch.peak - before


def report(found: dict[int, list[tuple[float, int]]], options: argparse.Namespace) -> None:
    rows = []
    for tokens, measured in found.items():
        seconds, peak = statistics.median(s for s, _ in measured), max(peak for _, peak in measured)
        rows.append({"tokens": tokens, "seconds": round(seconds, 3), "peak_bytes": peak})
        print(f"{tokens:7} tokens  {seconds:8.2f} s  {tokens / seconds:8.1f} tokens/s  {peak / 2**30:6.2f} GiB")
    print(json.dumps({"checkpointing": options.checkpointing, "length": options.length, "steps": rows}))


if __name__ == "__main__":
    main()
