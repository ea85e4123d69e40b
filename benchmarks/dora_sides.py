"""One side of `benchmarks.dora_cpu` in its own process: the step of `sft_sides` under LoRA or DoRA, ours or PEFT's.

All start from the adapters that the parent wrote, and over a 4-bit base from the same codes.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from .sft_sides import our_step, peer_step
from .sides import DENSE, PACKED, Step, load_peer, main, take_packed

KINDS, FORMS = ("lora", "dora"), ("dense", "nf4")


def ours(kind: str, form: str, folder: Path, model_path: str, dtype: str) -> Step:
    import fourbit

    model: Any = fourbit.load(model_path, quant_type="nf4" if form == "nf4" else None, dtype=dtype)[0]
    if form == "nf4":
        take_packed(model, folder / PACKED)
    fourbit.load_adapter(model, folder / kind)
    return our_step(model)


def peft(kind: str, form: str, folder: Path, model_path: str, dtype: str) -> Step:
    from transformers import AutoModelForCausalLM

    if form == "nf4":
        return peer_step(load_peer(folder, dtype), folder / kind)
    model = AutoModelForCausalLM.from_pretrained(folder / DENSE, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    return peer_step(model, folder / kind)


if __name__ == "__main__":
    made = {"ours": ours, "peft": peft}
    main(
        {
            f"{who}-{kind}-{form}": partial(make, kind, form)
            for who, make in made.items()
            for kind in KINDS
            for form in FORMS
        }
    )
