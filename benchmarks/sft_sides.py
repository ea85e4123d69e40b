"""One side of `benchmarks.sft_cpu` in its own process: our training step, or transformers + peft + bitsandbytes.

Both sides get the same token ids, targets, 4-bit weights (see `sides`), adapter start, threads, learning rate, clipping
and optimizer (torch's fused AdamW). The peer is what its users run, at its best: NF4 with double quantisation, no
gradient checkpointing, scaled-dot-product attention, right padding, its own loss. In bfloat16 everything that is dense
is in it, the peer's adapter too, which is quicker than the fp32 masters that ours keeps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .sides import ADAPTER, CLIP, Row, Step, load_ours, load_peer, main

RATE = 2e-4

# A row has "ids" and "targets", which are ids shifted by one, or -100. The loss is the mean of a trained token.


def ours(folder: Path, model_path: str, dtype: str) -> Step:
    """fourbit as its trainer runs it: packed micro-batches, head on trained positions only."""
    return our_step(load_ours(folder, model_path, dtype)[0])


def our_step(model: Any) -> Step:
    """The step of our model, whatever adapter it trains."""
    from fourbit.data.batch import micro_batches
    from fourbit.lora.layer import adapter_parameters
    from fourbit.trainer.config import TrainingConfig
    from fourbit.trainer.loop import Run
    from fourbit.trainer.step import make_optimizer
    from fourbit.trainer.trainer import TOKEN_BUDGET

    parameters = adapter_parameters(model.train())
    config = TrainingConfig(out="none", weight_decay=0.0, max_grad_norm=CLIP)
    run = Run(model, parameters=parameters, optimizer=make_optimizer(parameters, config))

    def step(rows: Sequence[Row]) -> float:
        batches = micro_batches(
            [(i, encoded(row)) for i, row in enumerate(rows)],
            packing=True,
            micro_batch="auto",
            token_budget=TOKEN_BUDGET["cpu"],
            pad_id=0,
        )
        run.forward_backward(*batches)
        return run.optim_step(RATE).loss.item()

    return step


def encoded(row: Row) -> Any:
    """The row as fourbit's data layer gives it."""
    from fourbit.data.batch import Encoded, Example

    return Example((Encoded(row["ids"], [False] + [target >= 0 for target in row["targets"][:-1]], "", ""),))


def peer(folder: Path, model_path: str, dtype: str) -> Step:
    """transformers + peft + bitsandbytes on the dense weights that `prepare` left."""
    return peer_step(load_peer(folder, dtype), folder / ADAPTER)


def peer_step(base: Any, adapter: Path) -> Step:
    """The step of a model of transformers with that adapter, in the model's dtype."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(base.dtype)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def step(rows: Sequence[Row]) -> float:
        loss = model(**padded(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


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


if __name__ == "__main__":
    main({"ours": ours, "peer": peer})
