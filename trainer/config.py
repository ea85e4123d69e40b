"""What a fine-tuning run can be told: one flat, frozen dataclass that checks itself.

Every field carries its help text, so the command line and the docs print the same sentence. The defaults train an
adapter sensibly on a few hundred to a few thousand rows; nothing here needs a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError

Schedule = Literal["cosine", "linear", "constant"]
LossOn = Literal["assistant", "all", "last"]


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Options of supervised fine-tuning. Raises InputError for a value that cannot work, naming it."""

    out: str = field(metadata={"help": "folder for the adapter, checkpoints, metrics and the loss curve"})
    epochs: int = _option(1, "passes over the training rows (ignored when steps is given)")
    steps: int | None = _option(None, "optimizer steps in all; decides instead of epochs")
    batch_size: int = _option(8, "examples per optimizer step, over all micro-batches")
    micro_batch: int | Literal["auto"] = _option(
        "auto", "examples per forward pass; auto fills 512 tokens on CPU, 8192 on a GPU. Never changes the result"
    )
    packing: bool = _option(True, "lay a micro-batch's examples end to end in one row instead of padding them")
    max_length: int = _option(1024, "tokens an example may have; a longer one is a bad row")
    loss_on: LossOn = _option("assistant", "which tokens are trained: assistant turns, the last turn only, or all")
    on_bad_row: Literal["error", "skip"] = _option("error", "stop at bad rows, or leave them out and count them")
    template: str | None = _option(None, "chat template: a built-in's name or a .jinja file instead of the model's own")
    lr: float = _option(2e-4, "peak learning rate")
    schedule: Schedule = _option("cosine", "learning rate after warm-up: cosine or linear to zero, or constant")
    warmup: float = _option(0.03, "linear warm-up: a fraction of all steps below 1, a number of steps from 1 on")
    weight_decay: float = _option(0.0, "decoupled weight decay of matrices (never of norms and biases)")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this global norm; 0 turns clipping off")
    checkpointing: Literal["auto", "on", "off"] = _option(
        "auto", "recompute activations in backward; auto does so when they would fill half of the free memory"
    )
    full: bool = _option(False, "train all weights of a dense model instead of an adapter")
    seed: int = _option(0, "seed of the order of rows and of dropout")
    eval_every: int | None = _option(None, "steps between evaluations on the validation rows; default each epoch")
    patience: int | None = _option(None, "stop after this many evaluations without a better validation loss")
    keep_best: bool = _option(True, "save the weights of the best validation loss instead of the last")
    save_every: int | None = _option(None, "steps between training checkpoints; default each epoch")
    keep: int = _option(2, "training checkpoints kept")
    resume: str | None = _option(None, "auto: go on from the newest checkpoint in out, if any; or a checkpoint's path")
    log: tuple[str, ...] = _option((), "more places for metrics: tensorboard")

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "steps", "batch_size", "eval_every", "patience", "save_every", "keep")
        _at_least(self, 2, "max_length")  # one token to read, one to predict
        _at_least(self, 0, "warmup", "weight_decay", "max_grad_norm", "seed")
        if self.micro_batch != "auto":
            _at_least(self, 1, "micro_batch")
        if not self.lr > 0:
            raise InputError(f"lr must be above 0, got {self.lr}")
        _one_of(self, "schedule", "cosine", "linear", "constant")
        _one_of(self, "loss_on", "assistant", "all", "last")
        _one_of(self, "on_bad_row", "error", "skip")
        _one_of(self, "checkpointing", "auto", "on", "off")
        for name in self.log:
            if name != "tensorboard":
                raise InputError(f"log knows tensorboard (metrics.jsonl is always written), got {name!r}")

    def warmup_steps(self, total: int) -> int:
        """Steps of warm-up in a run of `total` steps."""
        return round(self.warmup * total) if self.warmup < 1 else int(self.warmup)


def _at_least(config: SFTConfig, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _one_of(config: SFTConfig, name: str, *allowed: str) -> None:
    if (value := getattr(config, name)) not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that differ between two runs and would make a resumed run another run, as `name: old -> new`."""
    harmless = {"out", "resume", "log", "keep", "save_every", "micro_batch", "packing", "checkpointing"}
    return [f"{k}: {old.get(k)!r} -> {v!r}" for k, v in new.items() if k not in harmless and old.get(k) != v]
