"""AdaLoRA against LoRA with as many final parameters, on the ticket task.

`python -m benchmarks.adalora_tickets [--seeds 3] [--steps 80] [--batch-size 8] [--rank 4] [--val-rows 60]` fine-tunes
SmolLM2-135M (NF4) on the tickets with each kind, once a seed, and prints the validation loss of each run, means and
spread, and one JSON line. Adapters are on the feedforward layers, which all have as many inputs and outputs
together, so that equal total ranks are equal parameters; the saved files are counted to make sure.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import fourbit

from .turns import TICKETS, find_model

LR = {"lora": 2e-3, "adalora": 2e-3}


def run(kind: str, seed: int, options: argparse.Namespace, model_path: Path, out: Path) -> dict[str, Any]:
    """One run: its validation loss at the end, and what its file holds."""
    model, tokenizer = fourbit.load(model_path, quant_type="nf4")
    fourbit.attach(
        model, fourbit.LoRAConfig(kind=kind, rank=options.rank, alpha=2 * options.rank, target="mlp"), seed=seed
    )
    rows = (TICKETS.parent / "valid.jsonl").read_text("utf-8").splitlines()[: options.val_rows]
    valid = out / "valid.jsonl"
    valid.write_text("\n".join(rows) + "\n", "utf-8")
    config = fourbit.SFTConfig(
        out=str(out / "run"),
        steps=options.steps,
        batch_size=options.batch_size,
        lr=LR[kind],
        warmup=0.06,
        seed=seed,
        eval_every=options.steps,
    )
    trainer = fourbit.SFTTrainer(model, tokenizer, train=[str(TICKETS)], val=[str(valid)], config=config)
    result = trainer.train(display=None)
    tensors = load_file(out / "run" / "adapter_model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"kind": kind, "seed": seed, "val_loss": result.val_loss, "parameters": parameters}


def main() -> None:
    """Run all, print as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("seeds", 3), ("steps", 80), ("batch-size", 8), ("rank", 4), ("val-rows", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    model, found = options.model or find_model(), []
    for seed in range(options.seeds):
        for kind in ("lora", "adalora"):
            with tempfile.TemporaryDirectory() as folder:
                found.append(run(kind, seed, options, model, Path(folder)))
            print("{kind:8} seed {seed}: validation loss {val_loss:.4f}, {parameters:,} parameters".format(**found[-1]))
    losses = {kind: [one["val_loss"] for one in found if one["kind"] == kind] for kind in LR}
    spread = {kind: statistics.stdev(own) if len(own) > 1 else 0.0 for kind, own in losses.items()}
    for kind, own in losses.items():
        print(f"{kind:8} mean {statistics.mean(own):.4f}, standard deviation {spread[kind]:.4f} over {len(own)} seeds")
    settings = {name: value for name, value in vars(options).items() if name != "model"}
    print(json.dumps({"runs": found, "spread": spread, **settings}))


if __name__ == "__main__":
    main()
