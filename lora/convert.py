"""Layers in other forms, in place: dense again, merged with an adapter, bitsandbytes' and back.

Each function changes what `module` holds and returns it; of a bare layer it returns what stands for it.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..settings import DType
from .active import remove_adapter
from .adapter import DEFAULT, AdapterLayer, Whole, adapter_layers, carried, replace_modules, wide
from .linear4bit import Module4bit, NF4Linear, is_conv1d
from .packed import packed_layer, packed_tensors
from .parameter4bit import DenseParameter, NF4Parameter


def dequantize(module: nn.Module, dtype: DType | None = None) -> nn.Module:
    """Make 4-bit layers nn.Linear and nn.Embedding again, and experts dense, in place: frozen, rounded once to `dtype`.

    dtype: by default that of the weight which the layer was made from. What shared its bytes shares its dense weight.
    Adapters stay, and work on the dense layers.
    Raises InputError where there is no 4-bit layer.
    """

    weights: dict[int, nn.Parameter] = {}

    def dense(layer: Module4bit) -> nn.Module:
        if (key := id(layer.packed)) not in weights:
            weights[key] = nn.Parameter(layer.dequantize(dtype or layer.dtype), requires_grad=False)
        if isinstance(layer, NF4Parameter):
            return DenseParameter(weights[key])
        rows, columns = layer.shape
        linear = isinstance(layer, NF4Linear)
        new = nn.Linear(columns, rows, False, "meta") if linear else nn.Embedding(rows, columns, device="meta")
        new.weight = weights[key]
        if isinstance(layer, NF4Linear):
            new.register_parameter("bias", layer.bias)
            new.conv1d = layer.conv1d  # type: ignore[assignment]  # so that it is saved as its class has it
        return new

    return _swapped(module, dense, Module4bit)


def delta(model: nn.Module, name: str = DEFAULT) -> Iterator[tuple[str, Tensor]]:
    """Path and change of each weight that the adapter makes, fp32 (fp64 of fp64), one at a time and detached.

    As `named_parameters`: `dict(delta(model))` has all. Copies (`modules_to_save`, biases) are no changes of this kind.
    Raises InputError where there is no such adapter, NotImplementedError for a kind that does not say its change.
    """
    layers = adapter_layers(model)
    for path, adapter in carried(model, name).items():
        if not isinstance(adapter, Whole):
            yield path, adapter.delta(wide(cast(Tensor, layers[path].base.weight), layers[path].base)).detach()


@torch.no_grad()
def merge(model: nn.Module, name: str = DEFAULT) -> nn.Module:
    """Add the adapter's changes to the dense weights, W + delta in fp32 rounded once to W's dtype, put its copies in
    their modules' places, and take it off.

    A weight that others hold too, as a tied head's, is the layer's own afterwards. Raises InputError, before anything
    is changed, where there is no such adapter, and for 4-bit layers, which would round the change away.
    """
    layers, parts = adapter_layers(model), carried(model, name)
    if wrong := [p for p in parts if not isinstance(parts[p], Whole) and "weight" not in layers[p].base._parameters]:
        raise InputError(
            f"'{wrong[0]}' ({type(layers[wrong[0]].base).__name__}) has no dense weight of its own to take the "
            "change: keep the adapter or, of 4 bits, which would round it away, first fourbit.dequantize(model)"
        )
    for path, change in delta(model, name):
        base = cast(nn.Linear, layers[path].base)
        merged = (wide(base.weight, base) + change).to(base.weight.dtype)
        base.weight = nn.Parameter(merged.T.contiguous() if is_conv1d(base) else merged, base.weight.requires_grad)
    for path, part in parts.items():
        for own, tensor in () if part.copies is None else part.copies.state_dict().items():
            module, old = layers[path].base, getattr(layers[path].base, own)
            new = tensor.to(old.dtype, copy=True)
            setattr(module, own, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    remove_adapter(model, name)
    return model.base if isinstance(model, AdapterLayer) and not model.adapters else model


def from_bitsandbytes(module: nn.Module) -> nn.Module:
    """Make bitsandbytes' Linear4bit layers NF4Linear, in place; packed bytes and scales are the same tensors.

    Ours compute in the dtype of their input, whatever `compute_dtype` said. Raises InputError where there is no such
    layer, and for one that bitsandbytes has repacked for its CPU kernel, whose scales are rounded to bfloat16.
    """

    def ours(layer: Any) -> nn.Module | None:
        if (state := getattr(layer.weight, "quant_state", None)) is None:
            return None
        if getattr(state, "packing_format_for_cpu", False):
            raise InputError("a bitsandbytes layer was repacked when it ran on this CPU: convert it before it runs")
        pieces = {f".{piece}": tensor for piece, tensor in state.as_dict(packed=True).items()}
        new = packed_layer({"": layer.weight.detach().as_subclass(Tensor)} | pieces, f"this {type(layer).__name__}")
        new.bias = layer.bias
        return new

    return _swapped(module, ours, nn.Linear, "bitsandbytes layer in 4 bits")


def to_bitsandbytes(module: nn.Module, bitsandbytes: ModuleType) -> nn.Module:
    """The way back: NF4Linear layers become `bitsandbytes.nn.Linear4bit` (give the imported module), in place, of the
    same tensors. Raises InputError where there is no 4-bit layer."""

    def theirs(layer: NF4Linear) -> nn.Module:
        new: Any = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta")
        pieces, new.bias = packed_tensors("", layer), layer.bias
        how = {"device": layer.packed.device, "module": new}
        new.weight = bitsandbytes.nn.Params4bit.from_prequantized(pieces.pop(""), pieces, **how)
        return new

    return _swapped(module, theirs)


def _swapped(
    module: nn.Module, made: Callable[[Any], nn.Module | None], kind: type = NF4Linear, what: str = "layer in 4 bits"
) -> nn.Module:
    """`module` with what is made of each layer of that kind in its place; InputError where nothing is."""
    layers = [layer for layer in module.modules() if isinstance(layer, kind)]
    new = {layer: other.train(layer.training) for layer in layers if (other := made(layer)) is not None}
    if not new:
        raise InputError(f"this {type(module).__name__} holds no {what}")
    replace_modules(module, new)
    return new.get(module, module)
