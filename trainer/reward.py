"""A reward model from preference pairs: the loop and the data of preference training, another head and another loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..models.protocol import CausalLM
from .config import RewardConfig
from .losses.reward import reward_loss
from .preference import PreferenceTrainer, reward_metrics
from .reward_model import KEY, RewardModel, fresh_head
from .step import Sums
from .trainer import Weights


class RewardTrainer(PreferenceTrainer):
    """Trains an adapter and a head that gives the preferred one of two answers the higher reward.
    model: from `fourbit.load`, with an adapter, fresh or trained before. train: a JSONL file of pairs, several, or a
    dataset of them. val: the same, or a fraction. head: [1, hidden_size] to go on from (`read_head`); by default zeros,
    so the loss starts at ln 2. `reward_model` scores with what is being trained. Raises InputError for rows, options or
    a model that cannot be trained on."""

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

    def sums(self, batch: Batch) -> Sums:
        chosen, rejected = self.reward_model.rewards(batch)
        losses = reward_loss(chosen, rejected, center=self.config.center)
        return Sums(losses.sum(dtype=torch.float64), reward_metrics(chosen, rejected))

    def save(self, out: Path) -> None:
        self.reward_model.save(out)

    def weights(self) -> Weights:
        return super().weights() | {KEY: self.reward_model.head.detach()}

    def load_weights(self, state: Weights) -> None:
        super().load_weights({name: tensor for name, tensor in state.items() if name != KEY})
        self.reward_model.head.data.copy_(state[KEY])

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        head = self.reward_model.head
        assert isinstance(head, nn.Parameter)
        return super().trained_parameters() | {KEY: head}
