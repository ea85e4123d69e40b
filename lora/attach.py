"""Attach adapters to the linear layers of any module."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import InputError
from .adapter import DEFAULT, Adapter, AdapterLayer, adapter_layers, refuse_second, replace_modules, use
from .config import LoRAConfig
from .lora import LoRA
from .targets import check_patterns_used, linear_layers, resolve


def attach(
    model: nn.Module, config: LoRAConfig, name: str = DEFAULT, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Put an adapter on the targeted layers of `model`, in place; freeze all else; return their paths in module order.

    Each layer's part starts from `seed` and its own path alone, on every device the same. Adapters are fp32 masters
    unless `dtype` says otherwise. The new adapter is the active one.
    Raises InputError for an entry or a pattern that matches nothing, a rank larger than a layer allows, a model that
    carries an adapter of this name already; the model is left untouched then.
    """
    paths = resolve(model, config)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        check_patterns_used(field, patterns, paths)
    install(model, fresh(model, config, paths, seed=seed, dtype=dtype), name)
    return paths


def fresh(
    model: nn.Module, config: LoRAConfig, paths: Iterable[str], *, seed: int, dtype: torch.dtype
) -> dict[str, LoRA]:
    """The adapter that `config` describes for each of these layers; InputError for a rank that a layer cannot hold."""
    layers = linear_layers(model)
    made: dict[str, LoRA] = {}
    for path in paths:
        rank, alpha, start = config.rank_at(path), config.alpha_at(path), named_generator(seed, path)
        try:
            made[path] = LoRA(layers[path], rank, alpha, config.dropout, config.rslora, dtype=dtype, generator=start)
        except InputError as problem:
            advice = "Lower rank, give this layer its own in rank_pattern, or exclude it."
            raise InputError(f"'{path}': {problem}. {advice}") from None
    return made


def install(model: nn.Module, adapters: Mapping[str, Adapter], name: str = DEFAULT, *, trainable: bool = True) -> None:
    """Put each adapter on the linear layer of its path, wherever the model holds that.

    trainable: it becomes the active adapter, and all else is frozen; otherwise it is frozen itself and waits for `use`.
    InputError, before anything is changed, for a name that is taken or that no adapter can have, and for a model that
    is itself the layer.
    """
    refuse_second(model, name)
    if "" in adapters:
        raise InputError(
            f"this {type(model).__name__} is itself a linear layer, which cannot be replaced in place: wrap it"
        )
    layers = linear_layers(model)
    there = adapter_layers(model)
    new: dict[nn.Module, AdapterLayer] = {layers[p]: AdapterLayer(layers[p]) for p in adapters if p not in there}
    for path, adapter in adapters.items():
        layer = there.get(path) or new[layers[path]]
        layer.adapters[name] = (adapter if trainable else adapter.freeze()).train(layer.training)
    replace_modules(model, new)
    if trainable:
        model.requires_grad_(False)
        for adapter in adapters.values():
            adapter.requires_grad_()
        use(model, name)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU random stream that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
