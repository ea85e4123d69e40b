"""Forecasts of memory beside what training takes: `python -m benchmarks.plan_check [--quick]`.

Each combination of shape, form, dtype, batch, length, checkpointing and optimizer trains two steps in a process of
its own on random weights; predicted is the forecast, measured the peak of RssAnon above imports. On a GPU both are the
allocator's. The last line is JSON; exit code 1 where one is off by more than 5%.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

from . import CHECKOUT
from .load_memory import Watch, rss_anon

SHAPES: dict[str, tuple[int, ...]] = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads, head size
    "tiny": (8192, 256, 704, 4, 8, 4, 32),
    "135M": (49152, 576, 1536, 30, 9, 3, 64),
    "1B, 3 layers": (32000, 2048, 8192, 3, 32, 8, 64),
}
CASES: list[tuple[str, str, str, int, int, str, str]] = [
    # shape, form, dtype, examples of a pass, tokens of each, checkpointing, optimizer
    ("tiny", "full", "float32", 4, 256, "off", "adamw"),
    ("tiny", "nf4", "float32", 8, 256, "on", "lion"),
    ("tiny", "lora", "float32", 8, 512, "products", "adamw"),
    ("tiny", "nf4", "bfloat16", 2, 128, "products", "adamw"),
    ("135M", "nf4", "float32", 2, 128, "products", "adamw"),
    ("135M", "nf4", "float32", 2, 128, "off", "adamw8bit"),
    ("135M", "nf4", "float32", 2, 256, "on", "adamw"),
    ("135M", "lora", "float32", 2, 128, "products", "lion"),
    ("135M", "full", "float32", 2, 64, "on", "adamw"),
    ("135M", "full", "float32", 2, 64, "products", "paged-lion8bit"),
    ("1B, 3 layers", "nf4", "float32", 2, 64, "products", "adamw"),
    ("1B, 3 layers", "lora", "float32", 1, 128, "on", "adamw8bit"),
]
QUICK = (0, 2, 3)
STEPS = 2  # from the second on all state is there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three of them")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(options.case)))
        return 0
    found = []
    print(f"{'':64}{'predicted':>10}{'measured':>10}{'off':>7}   MiB")
    for number in QUICK if options.quick else range(len(CASES)):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan_check", "--case", str(number)]
        answer = subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(answer.splitlines()[-1]))
        predicted, measured = found[-1]["predicted"], found[-1]["measured"]
        name = ", ".join(map(str, CASES[number]))
        print(f"{name:64}{predicted / 2**20:10.0f}{measured / 2**20:10.0f}{predicted / measured - 1:7.1%}", flush=True)
    print(json.dumps(found))
    return int(any(abs(one["predicted"] / one["measured"] - 1) > 0.05 for one in found))


def measure(number: int) -> dict[str, Any]:
    """Train, then foresee, in this process."""
    import torch

    import fourbit
    import fourbit.cli.main
    from fourbit.data.batch import Encoded, Example
    from fourbit.data.encode import Dataset
    from fourbit.models.decoder import Decoder
    from fourbit.models.recompute import AGAIN
    from fourbit.models.spec import Spec
    from fourbit.trainer.config import KEPT
    from fourbit.trainer.heard import MAPPED

    fourbit.cli.main.give_memory_back()  # as the command line does
    shape, form, dtype, examples, tokens, checkpointing, optimizer = CASES[number]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = rss_anon()
    with Watch() as watch:
        spec = replace(Spec(*SHAPES[shape]), tie_word_embeddings=True)
        with torch.device("meta"):
            model: Any = Decoder(spec).to(getattr(torch, dtype))
        if form == "nf4":  # on meta too: a dense model before it would leave its memory with the allocator
            fourbit.quantize_(model)
        model.to_empty(device=device)
        model.lm_head.weight = model.model.embed_tokens.weight  # which to_empty has parted
        for tensor in model.parameters():
            tensor.data.normal_(std=0.02) if tensor.is_floating_point() else tensor.data.random_(255)
        if form != "full":
            fourbit.attach(model, fourbit.LoRAConfig(rank=16, alpha=32))
        trained = [i >= tokens // 2 for i in range(tokens)]  # other tokens in each row: a common beginning runs once
        every = [Example((Encoded([number] * tokens, trained),)) for number in range(3 * examples)]
        rows = Dataset("sft", every)
        with tempfile.TemporaryDirectory() as folder:
            config = fourbit.SFTConfig(
                out=folder, batch_size=examples, micro_batch=examples, full=form == "full", optimizer=optimizer,
                checkpointing=checkpointing, max_length=tokens,
            )  # fmt: skip
            trainer = fourbit.SFTTrainer(model, Letters(), train=rows, config=config)
            model.checkpointing = KEPT[checkpointing]
            fourbit.cli.main.give_memory_back(MAPPED[KEPT[checkpointing] in AGAIN])  # `cli.main.leaner`
            loading, watch.peak = watch.peak, rss_anon()
            for step in range(STEPS):
                batches, _ = trainer.step_data(step)
                trainer.run.forward_backward(*batches)
                trainer.run.optim_step(1e-4)
    case = trainer.case()
    forecast = case.forecast(KEPT[checkpointing])
    measured = watch.peak - before if device.type == "cpu" else torch.cuda.max_memory_allocated()
    less = 0 if device.type == "cpu" else forecast.parts["framework"]
    figures = {"predicted": forecast.peak - less, "measured": measured, "loading": loading - before}
    return {"case": CASES[number], **figures, "parts": forecast.parts}


class Letters:
    """A tokenizer that nothing asks."""

    vocab_size = 1
    stop_ids = ()
    encode_with_offsets = None


if __name__ == "__main__":
    sys.exit(main())
