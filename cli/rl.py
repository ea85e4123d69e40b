"""`fourbit rl`: train an adapter by rewards for its own answers, computed by a program or given by a reward model."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.sample import Kind
from ..errors import InputError
from ..lora.layer import adapters_of
from ..models.protocol import CausalLM
from ..text.tokenizer import Tokenizer
from ..trainer.policy import PolicyTrainer
from ..trainer.rl_config import RLConfig
from .load import rewards_for
from .options import RewardOptions
from .show import note
from .train import TrainOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(RLConfig, RewardOptions, TrainOptions):
    """Train an adapter by rewards for its own answers (GRPO, RLOO and others, by --loss).

      fourbit rl --model M --adapter runs/sft --data prompts.jsonl --reward number --out runs/rl
      fourbit rl --model M --data prompts.jsonl --reward rewards.py:score --reward words:1-50=0.1 --out runs/rl

    Rows are {"prompt": ...} or {"messages": [...]}; their other fields go to the
    rewards. An answer in the row (answer, completion, output, expected, solution,
    or the last assistant turn) is not shown to the model: checks compare with it.
    With --val the validation prompts are answered greedily, and the adapter of the
    highest reward is kept.
    """

    config_type: ClassVar = RLConfig
    trainer_type: ClassVar = PolicyTrainer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward:
            raise InputError("reinforcement needs to know what an answer earns: give a reward, such as number")
        if self.fresh and self.dropout:
            raise InputError(
                f"dropout is off where the policy that answers is trained, got {self.dropout}: leave it out"
            )

    def kind_of_rows(self) -> Kind:
        return "prompts"

    def extras(self, model: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
        if any(adapter.dropout for adapter in adapters_of(model).values()):
            note("note: the adapter's dropout is off in reinforcement: the policy that answers is trained")
        return {"rewards": rewards_for(self, model, failed=self.failed_reward)}
