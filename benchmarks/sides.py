"""What the sides of a comparison share: the peer's model, its 4-bit weights in ours, and answering requests for steps.

The parent (`turns`) writes one line to ask for a step and reads one JSON line back, so the two sides take turns on a
quiet machine and each process' peak memory is its own.

Both sides train on the same 4-bit weights, bitsandbytes' own: the packed codes are equal anyway, but where a scale lies
between two of double quantisation's codes bitsandbytes on CPU may store the farther one (1 in 400 here), and that alone
moves a loss by about 1e-3. With the same stored codes what is left of a difference is the training.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CLIP, RANK, ALPHA = 1.0, 16, 32
ADAPTER, DENSE, PACKED, BATCHES = "adapter", "dense", "packed.safetensors", "batches.json"  # in the working folder

Row = dict[str, Any]  # token ids by name, as each comparison has them
Step = Callable[[Sequence[Row]], float]  # one optimizer step on these rows; returns its loss
MakeStep = Callable[[Path, str, str], Step]  # from the working folder, the model's file and a dtype's name


def load_ours(folder: Path, model_path: str, dtype: str) -> tuple[Any, Any]:
    """Our model in 4 bits, with the peer's codes and the adapter that both sides start from; and its tokenizer."""
    import fourbit

    model, tokenizer = fourbit.load(model_path, quant_type="nf4", dtype=dtype)
    take_packed(model, folder / PACKED)
    fourbit.load_adapter(model, folder / ADAPTER)
    return model, tokenizer


def take_packed(model: torch.nn.Module, path: Path) -> None:
    """Put the peer's 4-bit weights into our layers."""
    import fourbit

    with safe_open(path, framework="pt") as file:
        for name, module in model.named_modules():
            if isinstance(module, fourbit.NF4Linear):
                own = module.state_dict()
                module.load_state_dict({key: file.get_tensor(f"{name}.{key}").view_as(own[key]) for key in own})


def load_peer(folder: Path, dtype: str = "float32") -> Any:
    """The dense folder in 4 bits, through transformers and bitsandbytes; what stays dense, and compute, in `dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / DENSE, quantization_config=config, dtype=getattr(torch, dtype), device_map={"": "cpu"}
    )
    model.config.use_cache = False
    return model


def prepare(folder: Path, model_path: str) -> None:
    """The weights as an fp32 Hugging Face folder, read from the GGUF by transformers itself, and as its 4-bit codes."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    path = Path(model_path)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config  # it says GGUF, and transformers refuses to save what came from one
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder / DENSE)
    packed = {}
    for name, module in load_peer(folder).named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            packed[f"{name}.packed"], packed[f"{name}.absmax"] = module.weight.data, state.absmax
            packed[f"{name}.nested_absmax"], packed[f"{name}.nested_offset"] = state.state2.absmax, state.offset
    save_file(packed, folder / PACKED)


def peak_bytes() -> int:
    """Most resident memory this process ever had (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def serve(step: Step, batches: Sequence[Sequence[Row]], requests: Any, replies: Any) -> None:
    """Answer each request line (the number of a batch) with wall and CPU seconds, loss and peak memory."""
    print(json.dumps({"peak": peak_bytes()}), file=replies, flush=True)  # loaded and ready
    for line in requests:
        rows = batches[int(line)]
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step(rows)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        reply = {"seconds": seconds, "cpu": cpu, "loss": loss, "peak": peak_bytes()}
        print(json.dumps(reply), file=replies, flush=True)


def main(sides: Mapping[str, MakeStep], prepare: Callable[[Path, str], None] = prepare) -> None:
    """A worker's command line: `ours|peer|prepare[:DTYPE] FOLDER MODEL THREADS`, in float32 if no dtype is said."""
    side, folder, model_path, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not fall among the replies
    torch.set_num_threads(threads)
    if side == "prepare":
        prepare(folder, model_path)
        return
    side, _, dtype = side.partition(":")
    serve(
        sides[side](folder, model_path, dtype or "float32"),
        json.loads((folder / BATCHES).read_text()),
        sys.stdin,
        replies,
    )
