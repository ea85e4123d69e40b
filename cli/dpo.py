"""`fourbit dpo`: train an adapter on preferences, on the base or on top of an adapter that was trained before."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.forms import Kind
from ..models.protocol import CausalLM
from ..models.tokenizer import Tokenizer
from ..trainer.config import DPOConfig
from ..trainer.preference import DPOTrainer
from .load import refuse_reward_model
from .show import note
from .train import StartOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(DPOConfig, StartOptions):
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

    def settled(self, tokenizer: Tokenizer) -> "Options":
        if self.adapter is not None:
            refuse_reward_model(self.adapter)
        return self

    def trainer(self, model: CausalLM, tokenizer: Tokenizer, rows: Any, val: Any, **more: Any) -> Any:
        trainer = super().trainer(model, tokenizer, rows, val)
        if trainer.has_reference:
            base = trainer.config.reference == "base"
            note(f"reference: {'the base, adapter off' if base else 'the adapter as it is at the start'}")
        return trainer
