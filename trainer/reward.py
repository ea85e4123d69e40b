"""A reward model from preference pairs: the loop and the data of preference training, another head and another loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..data.answer_batch import AnswerBatch
from ..models.protocol import CausalLM
from .dpo import PreferenceTrainer
from .loop import Weights
from .objective import Rewards
from .preference_config import RewardConfig
from .reward_model import KEY, RewardModel, fresh_head
from .step import Sums, summed


class RewardTrainer(PreferenceTrainer):
    """Trains an adapter and a head that gives the preferred one of two answers the higher reward.

    model: from `fourbit.load`, with an adapter, fresh or trained before. train: a JSONL file of pairs, several, or a
    dataset of `load_preferences`. val: the same, or a fraction. head: [1, hidden_size] to go on from (`read_head`); by
    default zeros, so the loss starts at ln 2. `reward_model` scores with what is being trained.
    Raises InputError for rows, options or a model that cannot be trained on.
    """

    config: RewardConfig

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        *,
        train: Any,
        config: RewardConfig,
        val: Any | float | None = None,
        head: Tensor | None = None,
    ) -> None:
        config = replace(config, lr_scale={KEY: config.head_lr / config.lr, **config.lr_scale})
        start = fresh_head(model)
        self.reward_model = RewardModel(model, nn.Parameter(start if head is None else head.detach().to(start).clone()))
        super().__init__(model, tokenizer, train=train, config=config, val=val)

    def sums(self, batch: AnswerBatch) -> Sums:
        chosen, rejected = self.reward_model.rewards(batch)
        losses = reward_loss(chosen, rejected, center=self.config.center)
        rewards = Rewards(chosen.detach(), rejected.detach())
        figures = {
            "reward_chosen": summed(rewards.chosen),
            "reward_rejected": summed(rewards.rejected),
            "reward_margin": summed(rewards.margin),
            "reward_accuracy": summed(rewards.accuracy),
        }
        return Sums(losses.sum(dtype=torch.float64), figures)

    def save(self, out: Path) -> None:
        self.reward_model.save(out)

    def weights(self) -> Weights:
        return super().weights() | {KEY: self.reward_model.head.detach()}

    def load_weights(self, state: Weights) -> None:
        super().load_weights({name: tensor for name, tensor in state.items() if name != KEY})
        self.reward_model.head.data.copy_(state[KEY])

    def _parameters(self) -> dict[str, nn.Parameter]:
        head = self.reward_model.head
        assert isinstance(head, nn.Parameter)
        return super()._parameters() | {KEY: head}


def reward_loss(chosen: Tensor, rejected: Tensor, *, center: float = 0.0) -> Tensor:
    """-log σ(r+ - r-) + center (r+ + r-)², for rewards [P] of preferred and other answers. Returns [P], not reduced.

    The first term is the negative log-likelihood of Bradley and Terry's model (1952) as Ouyang et al. 2022
    (arXiv 2203.02155, equation 1) use it. It sees differences only; the second (Eisenstein et al. 2023, arXiv
    2312.09244, equation 2) holds rewards around zero, so that those of different prompts compare better.
    """
    losses = -logsigmoid(chosen - rejected)
    return losses + center * (chosen + rejected).square() if center else losses
