"""One side of `benchmarks.sft_cpu` in its own process: our training step, or transformers + peft + bitsandbytes.

The parent writes one JSON line to ask for a step and reads one back, so the two sides take turns on a quiet machine and
each process' peak memory is its own. Both sides get the same token ids, targets, adapter start, threads, learning rate,
clipping and optimizer (torch's fused AdamW). The peer is what its users run, at its best: NF4 with double quantisation,
fp32 compute, no gradient checkpointing, scaled-dot-product attention, right padding, its own loss.

Both also train on the same 4-bit weights, bitsandbytes' own: the packed codes are equal anyway, but where a scale lies
between two of double quantisation's codes bitsandbytes on CPU may store the farther one (1 in 400 here), and that alone
moves a loss by about 1e-3. With the same stored codes what is left of a difference is the training.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RATE, CLIP, RANK, ALPHA = 2e-4, 1.0, 16, 32
ADAPTER, DENSE, PACKED, BATCHES = "adapter", "dense", "packed.safetensors", "batches.json"  # in the working folder

Row = dict[str, list[int]]  # "ids" and "targets", which are ids shifted by one, or -100
Step = Callable[[Sequence[Row]], float]  # one optimizer step on these rows; returns the mean loss of a trained token


def ours(folder: Path, model_path: str) -> Step:
    """fourbit as its trainer runs it: packed micro-batches, head on trained positions only."""
    import fourbit
    from fourbit.trainer.evaluate import batch_loss_sum
    from fourbit.trainer.step import Stepper, Sums
    from fourbit.trainer.trainer import TOKEN_BUDGET, adapter_parameters

    model = fourbit.load(model_path, quantize="nf4")[0]
    take_packed(model, folder / PACKED)
    fourbit.load_adapter(model, folder / ADAPTER)
    stepper = Stepper(
        adapter_parameters(model.train()),
        lambda batch: Sums(batch_loss_sum(model, batch), {}),
        weight_decay=0.0,
        max_grad_norm=CLIP,
    )

    def step(rows: Sequence[Row]) -> float:
        batches = fourbit.data.batch.micro_batches(
            [encoded(row) for row in rows],
            packing=True,
            micro_batch="auto",
            token_budget=TOKEN_BUDGET["cpu"],
            pad_id=0,
        )
        return stepper.step(batches, RATE).loss.item()

    return step


def encoded(row: Row) -> Any:
    """The row as fourbit's data layer gives it."""
    from fourbit.data.encode import Encoded

    return Encoded(row["ids"], [False] + [target >= 0 for target in row["targets"][:-1]], "", "")


def take_packed(model: torch.nn.Module, path: Path) -> None:
    """Put the peer's 4-bit weights into our layers."""
    import fourbit

    with safe_open(path, framework="pt") as file:
        for name, module in model.named_modules():
            if isinstance(module, fourbit.NF4Linear):
                module.load_state_dict({key: file.get_tensor(f"{name}.{key}") for key in module.state_dict()})


def peer(folder: Path, model_path: str) -> Step:
    """transformers + peft + bitsandbytes on the dense weights that `prepare` left."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_peer(folder), folder / ADAPTER, is_trainable=True).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def step(rows: Sequence[Row]) -> float:
        loss = model(**padded(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def load_peer(folder: Path) -> Any:
    """The dense folder in 4 bits, through transformers and bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / DENSE, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    return model


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels [B, T]; transformers shifts labels itself, so they are shifted back here."""
    longest = max(len(row["ids"]) for row in rows)
    fill = [longest - len(row["ids"]) for row in rows]
    ids = [row["ids"] + [0] * room for row, room in zip(rows, fill, strict=True)]
    labels = [[-100, *row["targets"][:-1]] + [-100] * room for row, room in zip(rows, fill, strict=True)]
    mask = [[1] * len(row["ids"]) + [0] * room for row, room in zip(rows, fill, strict=True)]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


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
            packed[f"{name}.weight"], packed[f"{name}.absmax"] = module.weight.data, state.absmax
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


def main() -> None:
    """`python -m benchmarks.sft_sides ours|peer|prepare FOLDER MODEL THREADS`."""
    side, folder, model_path, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not fall among the replies
    torch.set_num_threads(threads)
    if side == "prepare":
        prepare(folder, model_path)
        return
    step = {"ours": ours, "peer": peer}[side](folder, model_path)
    serve(step, json.loads((folder / BATCHES).read_text()), sys.stdin, replies)


if __name__ == "__main__":
    main()
