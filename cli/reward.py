"""`fourbit reward`: train a reward model on preference pairs, an adapter and a head that scores answers."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.sample import Kind
from ..models.protocol import CausalLM
from ..text.tokenizer import Tokenizer
from ..trainer.config import RewardConfig
from ..trainer.reward import RewardTrainer
from ..trainer.reward_model import read_head
from .load import is_reward_model
from .show import note
from .train import TrainOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(RewardConfig, TrainOptions):
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
    writes: ClassVar = False

    def kind_of_rows(self) -> Kind:
        return "pairs"

    def extras(self, model: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
        if self.adapter is None or not is_reward_model(self.adapter):
            return {}
        note(f"head: goes on from {self.adapter}")
        return {"head": read_head(model, self.adapter)}
