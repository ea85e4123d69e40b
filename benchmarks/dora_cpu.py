"""What a step under DoRA costs beside one under LoRA, over a dense and a 4-bit base: ours and PEFT's, in one run.

`python -m benchmarks.dora_cpu` trains SmolLM2-135M on ticket rows with all four, one optimizer step in turn, each in
its own process, and prints a table and one JSON line. `ours` is the median over steps of DoRA's time over LoRA's, by
the clock and in CPU seconds (which a busy machine disturbs less), `peft` that of PEFT's, `speed_ratio` PEFT's DoRA over
ours. It refuses to report when the two DoRAs train differently.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import fourbit

from . import CHECKOUT
from .dora_sides import FORMS, KINDS
from .sft_cpu import SIDES as PREPARE
from .sft_cpu import batches_of
from .sides import ALPHA, RANK
from .turns import LARGEST_LOSS_GAP, WARM_UP, Side, main, worker

SIDES = "dora_sides"


def prepare(folder: Path, model_path: Path, steps: int, batch_size: int, threads: int) -> int:
    """Write batches, the adapters that all start from, and the weights as the peer takes them; tokens of a step."""
    model, tokenizer = fourbit.load(model_path)
    batches = batches_of(folder, tokenizer, steps, batch_size)
    for kind in KINDS:
        fourbit.attach(model, fourbit.LoRAConfig(rank=RANK, alpha=ALPHA, kind=kind), seed=0)
        fourbit.save_adapter(model, folder / kind)
        fourbit.remove_adapter(model, "default")
    subprocess.run(worker(PREPARE, "prepare", folder, model_path, threads), check=True, cwd=CHECKOUT)
    return sum(len(row["ids"]) for row in batches[-1])


def compare(form: str, folder: Path, model: Path, steps: int, threads: int) -> dict[str, Any]:
    """The figures of one form of the base; exits when the two DoRAs did not train alike."""
    names = [f"{who}-{kind}-{form}" for who in ("ours", "peft") for kind in KINDS]
    sides = [Side(name, worker(SIDES, name, folder, model, threads), threads) for name in names]
    for i in range(steps):
        for side in sides[i % 4 :] + sides[: i % 4]:
            side.step(i)
        print(f"{form} step {i + 1}: {', '.join(f'{s.name} {s.seconds[-1]:.2f} s' for s in sides)}", file=sys.stderr)
    for side in sides:
        side.close()
    gap = max(abs(a - b) for a, b in zip(sides[1].losses, sides[3].losses, strict=True))
    allowed = LARGEST_LOSS_GAP["float32"]
    if not gap <= allowed:
        sys.exit(f"not comparable: losses differ by up to {gap:.2g}, allowed {allowed}: nothing is reported")
    lora, dora, _, peft = range(4)
    ratios = {}
    for name, a, b in (("ours", dora, lora), ("peft", peft, 2), ("speed_ratio", peft, dora)):
        for clock in ("seconds", "cpu"):
            pairs = zip(getattr(sides[a], clock)[WARM_UP:], getattr(sides[b], clock)[WARM_UP:], strict=True)
            values = ratios[f"{name}, {clock}"] = [x / y for x, y in pairs]
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            print(f"{form:6} {name:12} {clock:8} {middle:6.3f}   quartiles {low:.3f} - {high:.3f}")
    found: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    seconds = {side.name: round(statistics.median(side.seconds[WARM_UP:]), 3) for side in sides}
    return found | {"seconds": seconds, "largest_loss_gap": float(f"{gap:.2g}")}


def run(options: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    steps = options.steps + WARM_UP
    tokens = prepare(folder, model, steps, options.batch_size, options.threads)
    print(
        f"SmolLM2-135M, rank {RANK}, about {tokens} tokens a step, {options.threads} threads: time under DoRA over LoRA"
    )
    return {form: compare(form, folder, model, steps, options.threads) for form in FORMS}


if __name__ == "__main__":
    main("dora_cpu", __doc__ or "", 8, run)
