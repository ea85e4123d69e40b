"""One side of `benchmarks.dpo_cpu` in its own process: our preference step, or TRL's with peft and bitsandbytes.

Both sides get the same pairs as token ids, the same 4-bit weights (see `sides`), adapter start, threads, learning rate,
clipping and optimizer (AdamW), and both compare with the base: the model itself with its adapter off.

The peer is `trl.DPOTrainer` on its own `training_step`, with what its users run, at its best on a CPU: NF4 with double
quantisation, scaled-dot-product attention, its collator, its chunked head. Gradient checkpointing, its default, is off,
which is quicker. In float32 bf16 autocast is off, and the adapter, which TRL turns into bf16 when the base has 4 bits,
is fp32 again, or the side would neither compute what the other one does nor be comparable; in bfloat16 both are TRL's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .sides import ADAPTER, BATCHES, CLIP, DENSE, Row, Step, load_ours, load_peer, main, prepare

RATE, BETA = 2e-4, 0.1

# A row has "number", "prompt", "chosen" and "rejected". The loss is the mean of a pair.


def padded(folder: Path, model_path: str, dtype: str) -> Step:
    """Ours with a padded row for each answer."""
    return ours(folder, model_path, dtype, packing=False)


def ours(folder: Path, model_path: str, dtype: str, packing: bool = True) -> Step:
    """fourbit's DPOTrainer, as its loop runs it: packed rows in which a pair's prompt stands once, live reference."""
    import json

    from fourbit.data.encode import Dataset, Report
    from fourbit.trainer.config import DPOConfig
    from fourbit.trainer.preference import DPOTrainer

    model, tokenizer = load_ours(folder, model_path, dtype)
    rows = [row for batch in json.loads((folder / BATCHES).read_text()) for row in batch]
    data = Dataset("pairs", [pair(row) for row in rows], report=Report(rows=len(rows)))
    options: dict[str, Any] = {"packing": packing, "beta": BETA, "reference": "base", "weight_decay": 0.0}
    config = DPOConfig(out=str(folder / "ours"), max_grad_norm=CLIP, **options)
    trainer = DPOTrainer(model, tokenizer, train=data, config=config)
    run = trainer.new_run()
    model.checkpointing = trainer.recomputes()
    model.train()

    def step(rows: Sequence[Row]) -> float:
        batches = trainer.micro_batches(trainer.train_set, [row["number"] for row in rows], config.micro_batch)
        trainer.begin(trainer.train_set, batches)
        run.forward_backward(*batches)
        result = run.optim_step(RATE)
        trainer.applied(result)
        result.read_metrics()  # what TRL's step reads, ours reads too
        return result.loss.item()

    return step


def pair(row: Row) -> Any:
    """The row as fourbit's data layer gives it."""
    from fourbit.data.batch import Encoded, Example

    prompt = row["prompt"]
    chosen, rejected = (
        Encoded(prompt + row[name], [False] * len(prompt) + [True] * len(row[name]), "", "")
        for name in ("chosen", "rejected")
    )
    return Example((chosen, rejected))


def peer(folder: Path, model_path: str, dtype: str) -> Step:
    """trl.DPOTrainer on the dense weights that `prepare` left, in 4 bits."""
    from transformers import AutoTokenizer

    trainer = trl_trainer(load_peer(folder, dtype), AutoTokenizer.from_pretrained(folder / DENSE), folder)
    model = trainer.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # its loop sets this

    def step(rows: Sequence[Row]) -> float:
        given = [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
        loss = trainer.training_step(model, trainer.data_collator(given))
        trainer.accelerator.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def trl_trainer(model: Any, tokenizer: Any, folder: Path) -> Any:
    """A trl.DPOTrainer for this model with the adapter that is in the folder.

    The adapter comes in as a configuration, so the reference is the base (of an adapter that is there already TRL would
    keep a copy), and its weights are put in afterwards. The dataset is one row that nothing is trained on: batches come
    as token ids.
    """
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from trl import DPOConfig, DPOTrainer

    narrow = model.dtype == torch.bfloat16
    adapter = LoraConfig.from_pretrained(folder / ADAPTER)
    adapter.inference_mode = False
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder / "peer"),
            use_cpu=True,
            bf16=narrow,
            gradient_checkpointing=False,
            learning_rate=RATE,
            beta=BETA,
            max_grad_norm=CLIP,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "a:", "chosen": " b", "rejected": " c"}]),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not narrow:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(trainer.model, load_file(folder / ADAPTER / "adapter_model.safetensors"))
    return trainer


def prepare_all(folder: Path, model_path: str) -> None:
    """What `sides.prepare` leaves, and the tokenizer, which TRL asks for."""
    from transformers import AutoTokenizer

    path = Path(model_path)
    prepare(folder, model_path)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder / DENSE)


if __name__ == "__main__":
    main({"ours": ours, "padded": padded, "peer": peer}, prepare_all)
