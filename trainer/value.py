"""The value function of PPO: what an answer is expected to earn from each of its tokens on."""

import copy
from typing import Self

from torch import Tensor, nn

from ..data.batch import Batch
from ..lora.active import train_only, using
from ..lora.attach import attach
from ..lora.config import LoRAConfig
from ..lora.layer import adapter_layers, adapter_parameters, adapters_of
from ..models.protocol import CausalLM
from .losses.tokens import by_answer, hidden_rows
from .reward_model import fresh_head
from .run import free_name

VALUE = "value"  # the name of its adapter, if it is free, and what those of its parameters begin with


class ValueFunction:
    """An adapter of its own on the policy's base, of rank 8, and a head that starts at 0. policy: the adapter that
    trains too; those that are active stay so. Its adapter stays on the model, under a name of its own."""

    def __init__(self, model: CausalLM, policy: str, seed: int) -> None:
        self.model, self.adapter = model, free_name(model, VALUE)
        active = {layer: layer.active for layer in adapter_layers(model).values()}
        attach(model, LoRAConfig(rank=8, alpha=16), self.adapter, seed=seed)
        for layer in adapter_layers(model).values():
            layer.active = active.get(layer, {})
        train_only(model, policy, self.adapter)
        self.head = nn.Parameter(fresh_head(model))

    def parameters(self) -> dict[str, nn.Parameter]:
        for adapter in adapters_of(self.model, self.adapter).values():  # another one's trainer may have frozen it
            adapter.requires_grad_()
        own = {f"{VALUE}.{name}": parameter for name, parameter in adapter_parameters(self.model, self.adapter).items()}
        return own | {f"{VALUE}.head": self.head}

    def on(self, model: CausalLM) -> Self:
        """The same for a forecast's model, which carries the adapter too."""
        other = copy.copy(self)
        other.model, other.head = model, nn.Parameter(fresh_head(model))
        return other

    def __call__(self, batch: Batch) -> Tensor:
        """[P, L] of the answers of a batch that is still on the CPU: before each token."""
        here = batch.to(self.head.device)
        assert here.slots is not None
        with using(self.model, self.adapter):
            hidden = hidden_rows(self.model, here, here.rows)
        values = (hidden.to(self.head.dtype) @ self.head.T).squeeze(1)
        return by_answer(values, here.slots)[0]
