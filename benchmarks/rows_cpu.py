"""Adapters for rows of one batch on a CPU: eight trained at once against one on the same batches; memory of 256.

`python -m benchmarks.rows_cpu` trains SmolLM2-135M's decoder (its shapes; weights drawn, as speed does not depend on
them) with one adapter of rank 16 on a batch, and with eight of ranks 8 and 16, a row each, in turn in one process. It
prints tokens a second of both and their ratio (median and quartiles over pairs of steps), then the peak of resident
memory of a step with 256 adapters of rank 8 over that of one with a single one, beside the bytes of the adapters and
their gradients; each peak in a process of its own. The last line is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fourbit import LoRAConfig, attach, quantize_, rows, train_only, using
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec

from .shapes import SMOLLM2
from .timing import quartiles

WARM_UP = 2


def decoder(layers: int) -> Decoder:
    """SmolLM2's, with so many layers."""
    s = SMOLLM2
    sizes = {"vocab_size": s.vocabulary, "hidden_size": s.hidden, "intermediate_size": s.intermediate}
    heads = {"num_attention_heads": s.heads, "num_key_value_heads": s.key_heads, "head_dim": s.head_dim}
    more = {"num_hidden_layers": layers, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return Decoder(read_spec({"model_type": "llama"} | sizes | heads | more)).train()


def step(model: Decoder, run: Callable[[], Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    run().backward()
    return time.perf_counter() - start


def speed(options: argparse.Namespace, quantised: bool) -> dict[str, float]:
    model = decoder(options.layers)
    if quantised:
        quantize_(model)
    names = [f"n{i}" for i in range(8)]
    for i, name in enumerate(names):
        attach(model, LoRAConfig(rank=8 if i % 2 else 16), name)
    attach(model, LoRAConfig(rank=16), "one")
    ids = torch.randint(SMOLLM2.vocabulary, (8, options.tokens))

    def loss() -> Tensor:
        return model.hidden(ids).square().mean()

    one, eight = list[float](), list[float]()
    for _ in range(options.steps + WARM_UP):
        train_only(model, "one")
        with using(model, "one"):
            one.append(step(model, loss))
        train_only(model, *names)
        with rows(model, names):
            eight.append(step(model, loss))
    ratios = quartiles([a / b for a, b in zip(one[WARM_UP:], eight[WARM_UP:], strict=True)])
    each = [ids.numel() / quartiles(seconds[WARM_UP:])[1] for seconds in (one, eight)]
    what = "4-bit" if quantised else "dense"
    spread = f"{ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})"
    print(f"{what}: one adapter {each[0]:.0f} tokens/s, eight {each[1]:.0f}; ratio {spread}", flush=True)
    return {f"{what}_speed_ratio": ratios[1], f"{what}_low": ratios[0], f"{what}_high": ratios[2]}


def peak(adapters: int, layers: int) -> None:
    """Print the peak of a step of 256 rows, and the bytes of adapters and gradients, as JSON."""
    model = decoder(layers)
    names = [f"n{i}" for i in range(adapters)]
    for name in names:
        attach(model, LoRAConfig(rank=8), name)
    train_only(model, *names)
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ids = torch.randint(SMOLLM2.vocabulary, (256, 16))
    with rows(model, names * (256 // adapters)):
        model.hidden(ids).square().mean().backward()
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "own": 2 * own}))


def memory(options: argparse.Namespace) -> dict[str, float]:
    found = []
    for adapters in (1, 256):
        command = [
            sys.executable,
            "-m",
            "benchmarks.rows_cpu",
            "--peak",
            str(adapters),
            "--layers",
            str(options.layers),
        ]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    one, many = found
    figures = {f"memory_{key}_mib": (many[key] - one[key]) / 2**20 for key in ("peak", "own")}
    print("256 adapters over one: {memory_peak_mib:.0f} MiB more, {memory_own_mib:.0f} their own".format(**figures))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak is not None:
        return peak(options.peak, options.layers)
    parts = [partial(speed, options, False), partial(speed, options, True), partial(memory, options)]
    print(json.dumps({key: round(value, 3) for part in parts for key, value in part().items()}))


if __name__ == "__main__":
    main()
