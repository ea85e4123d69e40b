"""`fourbit sft`: fine-tune a model on chat rows, with LoRA on a 4-bit base unless told otherwise."""

from dataclasses import dataclass
from typing import ClassVar

from ..trainer.config import SFTConfig
from ..trainer.sft import SFTTrainer
from .train import TrainOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(SFTConfig, TrainOptions):
    """Fine-tune a model on chat rows and save a LoRA adapter (with --full: the model).

      fourbit sft --model M --data train.jsonl --val 5% --out runs/first
      fourbit sft run.yaml --lr 1e-4

    With --adapter training goes on from that adapter.
    A YAML file holds the same settings, `micro_batch: 4` for `--micro-batch 4`;
    flags win over the file. The folder --out gets the adapter, config.yaml (all
    settings and where each came from), metrics.jsonl, loss.png and checkpoints.
    """

    config_type: ClassVar = SFTConfig
    trainer_type: ClassVar = SFTTrainer
