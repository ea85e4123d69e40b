"""The kinds of adapter: the word of LoRAConfig.kind for each, and its class."""

from collections.abc import Callable, Iterable

from torch import nn

from ..errors import InputError
from .adalora import AdaLoRA
from .adapter import Adapter, Course
from .config import LoRAConfig
from .dora import DoRA
from .ia3 import IA3
from .layer import adapter_layers, adapters_of
from .linear4bit import NF4Linear
from .lora import LoRA, LoRAFA, is_linear
from .vera import VeRA

LayerFactory = Callable[[nn.Linear | NF4Linear, LoRAConfig], Adapter]
KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "dora": DoRA, "lora-fa": LoRAFA, "ia3": IA3, "adalora": AdaLoRA,
                                   "vera": VeRA}  # fmt: skip


def of_kind(base: nn.Module, config: LoRAConfig) -> Adapter:
    """An adapter of the kind that `config` says, for that layer. InputError for one that no such kind changes."""
    if config.kind != "lora" and not is_linear(base):
        raise InputError(f"kind={config.kind!r} changes linear layers, and target names a {type(base).__name__} too")
    return KINDS[config.kind].of(base, config)


def courses(model: nn.Module, trained: Iterable[nn.Parameter], steps: int | None) -> list[Course]:
    """What a run of `steps` does with each adapter that holds some of these parameters, besides moving them."""
    ids, names = {id(p) for p in trained}, {n for layer in adapter_layers(model).values() for n in layer.adapters}
    found: list[Course | None] = []
    for parts in (adapters_of(model, name).values() for name in sorted(names)):
        own = [part for part in parts if any(id(parameter) in ids for parameter in part.parameters())]
        kinds: dict[type[Adapter], None] = dict.fromkeys(map(type, own))
        found += [kind.course([part for part in own if type(part) is kind], steps) for kind in kinds]
    return [course for course in found if course is not None]
