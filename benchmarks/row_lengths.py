"""Time of a training step for rows of 256 to 8,192 tokens: it should be linear in them.

`python -m benchmarks.row_lengths [--dtype bf16] [--layers N] [--longest TOKENS]` trains a LoRA adapter of rank 16 on
one row of each length, over a random NF4 decoder of SmolLM2-135M's shapes, lengths in turn; checkpointing keeps each
layer's input only. It prints microseconds a token (the quickest of three steps) and their ratio to those of the
shortest row, and one JSON line. What is not linear is attention: 8,192 tokens look at 32 times as many keys as 256.
"""

import argparse
import json
import random
import time
from typing import Any

import torch

import fourbit
from fourbit.data.batch import Encoded, Example, pack
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec
from fourbit.trainer.loop import Run

from .machine import cpu
from .shapes import SMOLLM2

STEPS = 3


def row(tokens: int) -> Any:
    """One example of so many tokens, a quarter of them trained."""
    draw = random.Random(tokens)
    ids = [draw.randrange(SMOLLM2.vocabulary) for _ in range(tokens)]
    return pack([(0, Example((Encoded(ids, [4 * i >= 3 * tokens for i in range(tokens)]),)))])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.row_lengths", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", type=int, default=SMOLLM2.layers)
    parser.add_argument("--longest", type=int, default=8192)
    options = parser.parse_args()
    m = SMOLLM2
    sizes = m.vocabulary, m.hidden, m.intermediate, options.layers, m.heads, m.key_heads, m.head_dim
    model = Decoder(Spec(*sizes))
    fourbit.quantize_(model)
    model.to(torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    fourbit.attach(model, fourbit.LoRAConfig(rank=16, alpha=32), seed=0)
    model.checkpointing = True
    run, lengths = Run(model.train()), [256 << i for i in range(6) if 256 << i <= options.longest]
    seconds: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    for tokens in lengths * (STEPS + 1):  # the first is not counted
        start = time.perf_counter()
        run.forward_backward(row(tokens))
        run.optim_step(1e-4)
        seconds[tokens].append(time.perf_counter() - start)
    each = {tokens: min(found[1:]) / tokens * 1e6 for tokens, found in seconds.items()}
    print(f"{cpu()}, {torch.get_num_threads()} threads, {options.dtype}, {options.layers} layers")
    for tokens, cost in each.items():
        print(f"{tokens:6} tokens {cost:8.1f} us a token {cost / each[lengths[0]]:6.2f} times that of {lengths[0]}")
    figures = {str(tokens): round(cost, 2) for tokens, cost in each.items()}
    print(json.dumps({"us_per_token": figures, "cpu": cpu(), "dtype": options.dtype, "layers": options.layers}))


if __name__ == "__main__":
    main()
