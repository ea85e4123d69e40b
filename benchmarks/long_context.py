"""A QLoRA step as rows grow: `python -m benchmarks.long_context MODEL [--tokens 256 2048 8192] [--length 256]`.

Random tokens pass SmolLM2-135M (its GGUF, or any model) in NF4 with LoRA of rank 16 on every linear, in one row: packed
texts of `--length` tokens each, or one text (`--length 0`). Every token but each text's last is trained. Printed for
each number of tokens: CPU seconds of a step (forward, backward, update; the least of rounds in turn, behind one that is
not counted; take one thread, threads that wait count too), microseconds a token and millions of operations a token
(`operations`, from sizes alone) beside those of the first number, the share of attention's in the latter, and the peak
of `RssAnon` above the level after imports. Texts of one length should take a time that is proportional to their tokens;
of one text attention's operations grow with the square of its length, and the time should with all of them.
`--layers`: how many of the model's, a few for times, 30 for SmolLM2's memory. The last line is JSON.

Memory is freed as in the command line's processes (`fourbit.cli.main.give_memory_back`): without that most of the peak
at thousands of tokens may be holes in glibc's heap.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import fourbit
from fourbit.cli.main import give_memory_back
from fourbit.data.batch import pack
from fourbit.data.encode import Encoded, Example
from fourbit.lora.layer import adapter_layers, adapter_parameters
from fourbit.models.recompute import AGAIN, KEEPS
from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.loop import Run
from fourbit.trainer.step import make_optimizer

from .load_memory import Watch, rss_anon
from .machine import cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--length", type=int, default=256, help="tokens of each packed text; 0: one text")
    parser.add_argument("--layers", type=int, default=4, help="the first so many of the model's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", choices=KEEPS, default="input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    give_memory_back()
    before = rss_anon()
    run = training(options.model, options.layers, options.checkpointing, getattr(torch, options.dtype))
    found: dict[int, list[tuple[float, int]]] = {tokens: [] for tokens in options.tokens}
    for _ in range(options.rounds + 1):
        for tokens, measured in found.items():
            measured.append(step(run, tokens, options.length or tokens, before))
    report(run.model, found, options)


def training(path: Path, layers: int, checkpointing: Any, dtype: torch.dtype = torch.float32) -> Run:
    model, _ = fourbit.load(path, quant_type="nf4", dtype=dtype)
    del model.model.layers[layers:]
    fourbit.attach(model, fourbit.LoRAConfig(rank=16, alpha=32), seed=0)
    model.train().checkpointing = checkpointing
    parameters = adapter_parameters(model)
    config = TrainingConfig(out="none", weight_decay=0.0, max_grad_norm=1.0)
    return Run(model, parameters=parameters, optimizer=make_optimizer(parameters, config))


def step(run: Run, tokens: int, length: int, before: int) -> tuple[float, int]:
    """CPU seconds, and the peak of memory above `before`, of a step on texts of that length."""
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    texts = [Encoded(ids[i : i + length], [True] * len(ids[i : i + length]), "", "") for i in range(0, tokens, length)]
    batch = pack([(i, Example((text,))) for i, text in enumerate(texts)])
    with Watch() as watch:
        start = time.process_time()
        run.forward_backward(batch)
        run.optim_step(1e-4)
        seconds = time.process_time() - start
    return seconds, watch.peak - before


def operations(model: Any, length: int, again: bool) -> tuple[float, float]:
    """Multiplications and additions of a step for each token of texts of `length`: of products with weights, of
    attention. Forward, a second time where layers run `again`, backward; of products with frozen weights that is one
    more, of attention five for two (it makes the weights again), of LoRA's two each."""
    adapted, spec = adapter_layers(model).values(), model.spec
    frozen = sum(layer.in_features * layer.out_features for layer in adapted) * (2 + again)
    lora = sum(p.numel() for p in adapter_parameters(model).values()) * (3 + again)
    head = 2 * spec.hidden_size * spec.vocab_size
    sums = len(model.model.layers) * spec.num_attention_heads * spec.head_dim * (length + 1) / 2  # of a product
    return 2 * (frozen + lora + head), 2 * 2 * sums * (1 + again + 2.5)


def report(model: Any, found: dict[int, list[tuple[float, int]]], options: argparse.Namespace) -> None:
    rows = list[dict[str, Any]]()
    print(f"{cpu()}, {options.threads} threads, {options.layers} layers, {options.dtype}")
    for tokens, measured in found.items():
        seconds, peak = min(s for s, _ in measured[1:] or measured), max(peak for _, peak in measured)
        products, attention = operations(model, options.length or tokens, options.checkpointing in AGAIN)
        count = products + attention
        rows.append({"tokens": tokens, "seconds": round(seconds, 3), "peak_bytes": peak, "operations": count})
        each, share, first = seconds / tokens, attention / count, rows[0]
        times = f"{1e6 * each:8.0f} us a token, {each * first['tokens'] / first['seconds']:5.2f} times the first"
        counts = f"{count / 1e6:6.0f} M operations, {count / first['operations']:5.2f} times, {share:4.0%} attention's"
        print(f"{tokens:6} tokens  {seconds:8.2f} CPU s {times}; {counts}  {peak / 2**30:6.2f} GiB")
    print(json.dumps({"cpu": cpu()} | vars(options) | {"model": options.model.name, "steps": rows}))


if __name__ == "__main__":
    main()
