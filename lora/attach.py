"""Attach LoRA adapters to the linear layers of any module, find them again, switch them off for a while."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from .config import LoRAConfig
from .linear import LoRALinear
from .targets import check_patterns_used, linear_layers, pattern_value, resolve


def attach(model: nn.Module, config: LoRAConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[str]:
    """Wrap the targeted layers of `model` in LoRALinear, in place; freeze all else; return their paths in module order.

    Each adapter starts from `seed` and its own path, so naming one more target leaves the other starts as they were,
    and the start is the same on every device. Adapters are fp32 masters unless `dtype` says otherwise.
    Raises InputError for an entry or a pattern that matches nothing, a rank larger than a layer allows, a model that
    carries adapters already; the model is left untouched then.
    """
    names = resolve(model, config)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        check_patterns_used(field, patterns, names)
    install(model, plan(model, config, names), config, seed=seed, dtype=dtype)
    return names


@dataclass(frozen=True)
class Slot:
    """The rank and alpha that one layer gets."""

    rank: int
    alpha: float


def plan(model: nn.Module, config: LoRAConfig, names: list[str]) -> dict[str, Slot]:
    """Rank and alpha of each named layer, patterns applied; InputError for a rank that a layer cannot hold."""
    if not names:
        raise InputError("an adapter needs at least one layer to sit on, got none")
    layers = linear_layers(model)
    slots: dict[str, Slot] = {}
    for name in names:
        rank = pattern_value(config.rank_pattern, name, config.rank)
        layer, largest = layers[name], min(layers[name].in_features, layers[name].out_features)
        if rank > largest:
            raise InputError(
                f"rank {rank} is too large for '{name}' ({layer.out_features}x{layer.in_features}, out x in): at most "
                f"{largest}. Lower rank, give this layer its own in rank_pattern, or exclude it."
            )
        slots[name] = Slot(rank, pattern_value(config.alpha_pattern, name, float(config.alpha)))
    return slots


def install(model: nn.Module, slots: dict[str, Slot], config: LoRAConfig, *, seed: int, dtype: torch.dtype) -> None:
    """Wrap each planned layer wherever the model holds it, then leave only the adapters trainable."""
    if lora_modules(model):
        raise InputError(
            "this model already carries LoRA adapters, and a second set would sit on top of the first. "
            "Load a fresh model, or continue training the adapters it has."
        )
    if "" in slots:
        raise InputError(
            f"this {type(model).__name__} is itself a linear layer, which cannot be replaced in place: wrap it"
        )
    layers = linear_layers(model)
    wrapped: dict[int, LoRALinear] = {}
    for name, slot in slots.items():
        wrapped[id(layers[name])] = LoRALinear(
            layers[name],
            slot.rank,
            slot.alpha,
            config.dropout,
            config.rslora,
            dtype=dtype,
            generator=named_generator(seed, name),
        )
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # a layer used twice is wrapped in both places
            if id(child) in wrapped:
                setattr(parent, attribute, wrapped[id(child)])


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU random stream that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> LoRALinear, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every A and B in module order: what an optimizer trains."""
    return [parameter for module in lora_modules(model).values() for parameter in (module.lora_A, module.lora_B)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what its base computes; after it, each adapter is as it was, on or off."""
    before = [(module, module.enabled) for module in lora_modules(model).values()]
    try:
        for module, _ in before:
            module.enabled = False
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled
