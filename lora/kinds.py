"""The kinds of adapter: the word of LoRAConfig.kind for each, and its class."""

from collections.abc import Callable

from torch import nn

from .adapter import Adapter
from .config import LoRAConfig
from .dora import DoRA
from .linear4bit import NF4Linear
from .lora import LoRA

LayerFactory = Callable[[nn.Linear | NF4Linear, LoRAConfig], Adapter]
KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "dora": DoRA}


def of_kind(base: nn.Module, config: LoRAConfig) -> Adapter:
    """An adapter of the kind that `config` says, for that layer."""
    return KINDS[config.kind].of(base, config)
