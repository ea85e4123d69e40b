"""Which of a model's adapters are active and how much each counts; copying one and taking one off."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..settings import checked
from .layer import AdapterLayer, adapter_layers, carried, refuse_second, replace_modules


def use(model: nn.Module, *names: str, weights: Sequence[float] | None = None) -> None:
    """Make the named adapters the active ones on every layer that carries them; none: the base alone.

    weights: by how much each counts, 1 if not given: weight times the change that it makes. What trains stays.
    InputError for a name that the model does not carry or that comes twice, for weights that are not one finite number
    for each name, and for two adapters with copies of one module.
    """
    shares = [1.0 for _ in names] if weights is None else [checked("weights", weight, float) for weight in weights]
    if len(shares) != len(names) or len({*names}) < len(names):
        raise InputError(f"the names must differ, with one weight for each; got {names} and weights={weights}")
    for name in names:
        carried(model, name)
    for path, layer in adapter_layers(model).items():
        copies = [name for name in names if name in layer.adapters and layer.adapters[name].copies is not None]
        if len(copies) > 1:
            raise InputError(f"{' and '.join(copies)} cannot be active together: each has its own copy of '{path}'")
    for layer in adapter_layers(model).values():
        layer.active = {name: share for name, share in zip(names, shares, strict=True) if name in layer.adapters}


@contextmanager
def using(model: nn.Module, *names: str, weights: Sequence[float] | None = None) -> Iterator[None]:
    """As `use`, inside the block; after it each layer's active adapters are what they were before."""
    with switched([(layer, layer.active) for layer in adapter_layers(model).values()]):
        use(model, *names, weights=weights)
        yield


@contextmanager
def switched(to: Sequence[tuple[AdapterLayer, dict[str, float]]]) -> Iterator[None]:
    """A block in which these are the layers' active adapters; after it they are what they were before."""
    before = [(layer, layer.active) for layer, _ in to]
    try:
        for layer, active in to:
            layer.active = active
        yield
    finally:
        for layer, active in before:
            layer.active = active


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; each module's mode before (a frozen norm's) is restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def checkpointed(module: nn.Module, function: Callable[..., Any], *args: Any, again: Any = None) -> Any:
    """function(*args), which runs `module`, as torch's activation checkpoint: backward computes it again, or `again` in
    its place, which saves the same tensors, with the adapters that are active now, whatever is switched until then."""
    ways = chain([function], repeat(again or function))
    run = as_now(module, lambda *args: next(ways)(*args))
    return checkpoint(function if torch.compiler.is_compiling() else run, *args, use_reentrant=False)


def as_now(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs `module`, with the adapters that are active now, whenever it is called."""
    now = [(layer, layer.active) for layer in module.modules() if isinstance(layer, AdapterLayer)]

    def run(*args: Any) -> Any:
        with switched(now):
            return function(*args)

    return run


def train_only(model: nn.Module, *names: str) -> None:
    """Let these adapters train, several together too, and freeze all else; what is active stays. Errors as `use`."""
    parts = [part for name in names for part in carried(model, name).values()]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_()


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """A block inside which the model computes what its base computes; after it, each adapter is on or off as before."""
    return using(model)


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Keep the adapter `source` as it is now under the name `target`: frozen, without dropout, not active.

    InputError if there is no such source, a `target` already, or a name that no adapter can have.
    """
    parts, layers = carried(model, source), adapter_layers(model)
    refuse_second(model, target)
    for path, part in copy.deepcopy(parts).items():  # at once, so that what they share is copied once
        layers[path].adapters[target] = part.freeze()


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter off; a layer that carries no other is its base again. InputError if there is none."""
    layers = adapter_layers(model)
    for path in carried(model, name):
        del layers[path].adapters[name]
        layers[path].active = {other: weight for other, weight in layers[path].active.items() if other != name}
    replace_modules(model, {layer: layer.base for layer in layers.values() if not layer.adapters})
