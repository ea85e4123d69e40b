"""One side of `benchmarks.rl_cpu` in its own process: our reinforcement step, or TRL's with peft and bitsandbytes.

Both sides answer the same prompts with as many answers of the same greatest length at temperature 1, earn by the same
function, and make one GRPO update on them (no reference, groups' own mean and deviation), from the same 4-bit weights
and adapter start (see `sides`), with the same learning rate and clipping. What they draw differs, so losses do.

The peer is `trl.GRPOTrainer` on its own `training_step`, as `dpo_sides` drives its DPO: generation by transformers with
a cache, no gradient checkpointing, in float32 its adapter too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .dpo_sides import prepare_all
from .sides import ADAPTER, BATCHES, CLIP, DENSE, Row, Step, load_ours, load_peer, main

RATE, GROUP, NEW = 5e-5, 8, 15

# A row has "prompt", a text as the chat template writes it.


def vowels(answer: str) -> float:
    """What an answer earns: its share of vowels, which differs between any two."""
    return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))


def ours(folder: Path, model_path: str, dtype: str) -> Step:
    """fourbit's PolicyTrainer, as its loop runs it."""
    from fourbit.data.encode import load
    from fourbit.trainer.policy import PolicyTrainer
    from fourbit.trainer.rewards import Rewards, each
    from fourbit.trainer.rl_config import RLConfig

    model, tokenizer = load_ours(folder, model_path, dtype)
    batches = json.loads((folder / BATCHES).read_text())
    rows = [{"prompt": row["asked"]} for batch in batches for row in batch]
    rewards = Rewards({"vowels": (1.0, each(lambda prompt, answer, row: vowels(answer)))})
    how: dict[str, Any] = {"group_size": GROUP, "max_new_tokens": NEW, "batch_size": len(batches[0])}
    config = RLConfig(out=str(folder / "ours"), max_grad_norm=CLIP, weight_decay=0.0, lr=RATE, **how)
    data = load(rows, tokenizer, "prompts")
    trainer = PolicyTrainer(model, tokenizer, train=data, config=config, rewards=rewards)
    run = trainer.new_run()
    model.checkpointing = trainer.recomputes()
    model.train()
    steps = iter(range(10**6))

    def step(rows: Sequence[Row]) -> float:
        batches, _ = trainer.step_data(next(steps))
        run.forward_backward(*batches)
        result = run.optim_step(RATE)
        result.read_metrics()
        return result.loss.item()

    return step


def peer(folder: Path, model_path: str, dtype: str) -> Step:
    """trl.GRPOTrainer on the dense weights that `prepare` left, in 4 bits."""
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load_peer(folder, dtype), AutoTokenizer.from_pretrained(folder / DENSE)
    model.config.use_cache = True
    narrow, batches = model.dtype == torch.bfloat16, json.loads((folder / BATCHES).read_text())
    adapter = LoraConfig.from_pretrained(folder / ADAPTER)
    adapter.inference_mode = False
    size = GROUP * len(batches[0])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **more: [vowels(text) for text in completions],
        args=GRPOConfig(
            output_dir=str(folder / "peer"),
            use_cpu=True,
            bf16=narrow,
            gradient_checkpointing=False,
            learning_rate=RATE,
            max_grad_norm=CLIP,
            beta=0.0,
            loss_type="grpo",
            num_generations=GROUP,
            per_device_train_batch_size=size,
            max_completion_length=NEW,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for batch in batches for row in batch]),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not narrow:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(trainer.model, load_file(folder / ADAPTER / "adapter_model.safetensors"))
    model = trainer.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # its loop sets this

    def step(rows: Sequence[Row]) -> float:
        loss = trainer.training_step(model, [{"prompt": row["prompt"]} for row in rows for _ in range(GROUP)], size)
        trainer.accelerator.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


if __name__ == "__main__":
    main({"ours": ours, "peer": peer}, prepare_all)
