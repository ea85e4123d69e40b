"""A reward model from preference pairs: the loop and the data of preference training, another head and another loss."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor, nn

from ..data.batch import Batch
from ..data.protocol import AnyTokenizer
from ..models.protocol import CausalLM
from .callbacks import Options
from .config import RewardConfig
from .losses.pairs import reward_loss
from .preference import reward_metrics
from .reward_model import KEY, RewardModel, fresh_head
from .step import Sums, as_sums
from .trainer import Trainer


class RewardTrainer(Trainer):
    """Trains an adapter and a head that gives the preferred one of two answers the higher reward.
    model: from `fourbit.load`, with an adapter, fresh or trained before. train: a JSONL file of pairs, several, or a
    dataset of them. val: the same, or a fraction. head: [1, hidden_size] to go on from (`read_head`); by default zeros,
    so the loss starts at ln 2. `reward_model` scores with what is being trained. Raises InputError for rows, options or
    a model that cannot be trained on."""

    kind = "pairs"
    config: RewardConfig

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnyTokenizer,
        *,
        config: RewardConfig,
        head: Tensor | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if options.get("optimizer") is None:
            config = replace(config, lr_scale={KEY: config.head_lr / config.lr, **config.lr_scale})
        else:
            config.refuse(["head_lr"], "an optimizer of your own has its own")
        start = fresh_head(model)
        self.reward_model = RewardModel(model, nn.Parameter(start if head is None else head.detach().to(start).clone()))
        super().__init__(model, tokenizer, config=config, loss=loss, **options)

    def sums(self, batch: Batch) -> Sums:
        chosen, rejected = self.reward_model.rewards(batch)
        losses: Any = (self.loss or partial(reward_loss, center=self.config.center))(chosen, rejected)
        return as_sums(losses, batch)._replace(metrics=reward_metrics(chosen, rejected))

    def on(self, model: CausalLM) -> Self:
        other = super().on(model)
        other.reward_model = RewardModel(model, nn.Parameter(fresh_head(model)))
        return other

    def save(self, out: Path) -> None:
        self.reward_model.save(out, self.adapter)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        head = self.reward_model.head
        assert isinstance(head, nn.Parameter)
        return super().trained_parameters() | {KEY: head}
