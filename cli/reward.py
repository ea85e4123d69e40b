"""`fourbit reward`: train a reward model on preference pairs, an adapter and a head that scores answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..data.forms import Kind
from ..models.protocol import CausalLM
from ..models.tokenizer import Tokenizer
from ..trainer.config import RewardConfig
from ..trainer.reward import RewardTrainer
from ..trainer.reward_model import HEAD, read_head
from .show import note
from .train import StartOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(RewardConfig, StartOptions):
    """Train a reward model on preference pairs: a LoRA adapter and a head that gives
    the preferred one of two answers the higher score.

      fourbit reward --model M --data pairs.jsonl --val 5% --out runs/reward

    Rows are those of fourbit dpo with two answers. The validation figures tell how
    often the preferred answer wins (reward accuracy). The folder --out gets the
    adapter and reward_head.safetensors; in Python fourbit.RewardModel.load(model,
    folder).score(tokenizer, rows) scores answers. With --adapter training goes on
    from that adapter, and from its head where it has one.
    """

    config_type: ClassVar = RewardConfig
    trainer_type: ClassVar = RewardTrainer

    def kind_of_rows(self) -> Kind:
        return "pairs"

    def trainer(self, model: CausalLM, tokenizer: Tokenizer, rows: Any, val: Any, **more: Any) -> Any:
        if self.adapter is None or not (Path(self.adapter) / HEAD).exists():
            return super().trainer(model, tokenizer, rows, val)
        note(f"head: goes on from {self.adapter}")
        return super().trainer(model, tokenizer, rows, val, head=read_head(model, self.adapter))
