"""Greedy answers of a 4-bit model and its adapter on a CPU: as they are, the base decoded once, or both merged.

`python -m benchmarks.merging_cpu` loads SmolLM2-135M in NF4 with a LoRA of rank 16 on every layer and answers prompts
three ways, in turn in one process: from 4 bits, in a `fourbit.merging` block that decodes bases alone, in one that
merges the adapter too. It prints tokens a CPU second (prompts included, making the dense weights not), medians over
rounds, and the seconds and MiB of making those weights. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

import fourbit

from .turns import find_model

ROOM = 1 << 40  # bytes: the block is to hold its weights, whatever is free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, tokenizer = fourbit.load(options.model or find_model(), quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=16))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.002)
    prompts = [tokenizer.encode(f"Write number {i} in words, and a story.") for i in range(8)]
    figures: dict[str, float] = {}
    for batch in (1, 8):
        rates: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            ways: dict[str, AbstractContextManager[object]] = {
                "4 bits": nullcontext(),
                "decoded": fourbit.merging(model, ROOM, adapters=False),
                "merged": fourbit.merging(model, ROOM),
            }
            for way, block in ways.items():
                start = time.process_time()
                with block as held:
                    made = time.process_time()
                    answers = fourbit.generate(model, prompts[:batch], max_new_tokens=options.new_tokens)
                    rates.setdefault(way, []).append(sum(map(len, answers)) / (time.process_time() - made))
                if isinstance(held, int):
                    figures[f"{way}_made_s"] = made - start
                    figures[f"{way}_mib"] = held / 2**20
        medians = {way: statistics.median(found) for way, found in rates.items()}
        print(f"batch {batch}: " + ", ".join(f"{way} {rate:.1f}" for way, rate in medians.items()) + " tokens a CPU s")
        figures |= {f"{way}_batch_{batch}": rate for way, rate in medians.items()}
    print(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
