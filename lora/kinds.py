"""The kinds of adapter: the word of LoRAConfig.kind for each, and its class."""

from collections.abc import Callable

from torch import nn

from ..errors import InputError
from .adapter import Adapter
from .config import LoRAConfig
from .dora import DoRA
from .ia3 import IA3
from .linear4bit import NF4Linear
from .lora import LoRA, LoRAFA, is_linear

LayerFactory = Callable[[nn.Linear | NF4Linear, LoRAConfig], Adapter]
KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "dora": DoRA, "lora-fa": LoRAFA, "ia3": IA3}


def of_kind(base: nn.Module, config: LoRAConfig) -> Adapter:
    """An adapter of the kind that `config` says, for that layer. InputError for one that no such kind changes."""
    if config.kind not in ("lora", "dora") and not is_linear(base):
        raise InputError(f"kind={config.kind!r} changes linear layers, and target names a {type(base).__name__} too")
    return KINDS[config.kind].of(base, config)
