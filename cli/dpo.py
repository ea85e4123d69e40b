"""`fourbit dpo`: train an adapter on preferences, on the base or on top of an adapter that was trained before."""

from dataclasses import dataclass
from typing import ClassVar

from ..data.sample import Kind
from ..trainer.config import DPOConfig
from ..trainer.preference import DPOTrainer
from .train import TrainOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(DPOConfig, TrainOptions):
    """Train an adapter on preference rows: DPO, and its relatives by --loss.

      fourbit dpo --model M --adapter runs/sft --data pairs.jsonl --val 5% --out runs/dpo

    Rows are {"prompt", "chosen", "rejected"}, as texts or messages, or another
    common form; {"prompt", "completion", "label"} for the losses kto, bco-unpaired
    and apo-zero-unpaired. With --adapter training goes on from that adapter, and
    the reference is what it was at the start; without, an adapter starts afresh
    and the reference is the base.
    """

    config_type: ClassVar = DPOConfig
    trainer_type: ClassVar = DPOTrainer

    def kind_of_rows(self) -> Kind:
        return "judged" if self.objective().unpaired else "pairs"
