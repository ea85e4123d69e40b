"""quantize_: swap the linear layers of a module for their 4-bit twins, in place, and say what stays dense and why.

What stays dense is decided in one place (`_reasons`), before quantising and after: a model says at any time what it
keeps dense, and nothing needs to be remembered.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import InputError
from ..kernels.weight4bit import check_format
from .adapter import replace_modules
from .config import checked_names
from .linear4bit import NF4Linear, is_conv1d, sizes
from .targets import Linear, base_modules, linear_layers, listed, matcher, output_heads


def quantize_(
    module: nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: str | Sequence[str] | None = None,
) -> nn.Module:
    """Replace the linear layers of `module` by NF4Linear, one at a time, and return it; of a bare nn.Linear, its twin.

    Linear layers are nn.Linear, subclasses that keep its forward, and Conv1D of transformers. Those that others hold
    too, or that cannot or should not change stay dense, and all other parameters: `dense_weights` says which and why.
    `skip` names layers to leave dense as LoRAConfig's `target` does: full paths or their ends in a list, or one regular
    expression; each must match a layer. None: the output heads, of a vocabulary or of classes.
    Layers that share one weight share one set of packed bytes. Layers on the meta device become empty 4-bit layers.
    Raises InputError when nothing is left to quantise, and when a weight holds NaN or infinity (naming the tensor).
    """
    try:
        check_format(quant_type, blocksize)
    except ValueError as problem:
        raise InputError(f"quantize_: {problem}") from None
    layers = linear_layers(module)
    dense = _reasons(module, layers, skip)
    wanted = {path: layer for path, layer in layers.items() if path not in dense and not isinstance(layer, NF4Linear)}
    layers.clear()
    if not wanted:
        raise InputError(_nothing_to_quantize(module, skip))
    twins: dict[int, NF4Linear] = {}  # id of a dense weight -> the first layer made from it
    for path in list(wanted):
        layer = wanted.pop(path)  # so that each dense weight is freed before the next one is quantised
        first = twins.get(id(layer.weight))
        twin = _quantized(layer, f"{path}.weight".lstrip("."), quant_type, blocksize, double_quant, first)
        twins.setdefault(id(layer.weight), twin)
        if not path:
            return twin
        replace_modules(module, {layer: twin})
    return module


def dense_weights(model: nn.Module, skip: str | Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """Why `quantize_(model, skip=skip)` leaves matrices dense, or has left them -> their names and sizes in bytes.

    These are all parameters of two or more dimensions that are not in 4 bits then: linear layers that must or shall
    stay dense, embeddings, convolutions, experts that are one tensor. What is tied is counted under its first name.
    Raises InputError for an entry of `skip` that matches no linear layer.
    """
    layers = linear_layers(model)
    reasons, seen = _reasons(model, layers, skip), set[nn.Parameter]()
    dense: dict[str, dict[str, int]] = {}
    for path, module in base_modules(model).items():
        if path in layers and path not in reasons:
            continue
        own = "has a forward of its own: make it nn.Linear" if isinstance(module, nn.Linear) else "is no linear layer"
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                why = reasons.get(path.partition(".parametrizations")[0], f"{type(module).__name__} {own}")
                names = dense.setdefault(why, {})
                names[f"{path}.{name}".lstrip(".")] = 0 if weight in seen else weight.nbytes
                seen.add(weight)
    return dense


def _reasons(model: nn.Module, layers: Mapping[str, Linear], skip: str | Sequence[str] | None) -> dict[str, str]:
    """Path of each linear layer that stays dense -> why."""
    heads = output_heads(model) if skip is None else set[str]()
    skip = checked_names("skip", () if skip is None else skip)
    listed(model, "skip", skip, list(layers))
    skipped, fp32 = matcher(skip), _kept_in_fp32(model)
    holder = {
        tensor.untyped_storage()._cdata: f"{path}.{name}".lstrip(".")
        for path, module in reversed(base_modules(model).items())  # a tensor that is held twice has its first name
        if path not in layers
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    why: dict[str, str] = {}
    for path, layer in layers.items():
        if isinstance(layer, NF4Linear):
            continue
        if "weight" not in layer._parameters or "forward" in vars(layer):
            why[path] = "parametrised, pruned or with another forward: undo that first"
        elif (other := holder.get(layer.weight.untyped_storage()._cdata)) is not None:
            why[path] = f"shares its weight with {other}: untie the weight first"
        elif skipped(path):
            why[path] = "named in skip"
        elif path in heads:
            why[path] = "an output head: skip=() takes it too"
        elif any(f".{name}." in f".{path}.weight." for name in fp32):
            why[path] = "kept in float32 by the model (_keep_in_fp32_modules)"
    left = {layers[path]._parameters.get("weight"): path for path in why}
    twins = {path: left.get(layer._parameters.get("weight")) for path, layer in layers.items() if path not in why}
    return why | {path: f"shares its weight with {other}, which stays dense" for path, other in twins.items() if other}


def _quantized(
    layer: Linear, name: str, quant_type: str, blocksize: int, double_quant: bool, twin: NF4Linear | None = None
) -> NF4Linear:
    """The 4-bit form of `layer`; with `twin`, one that shares the twin's weight."""
    new = NF4Linear(*sizes(layer), False, quant_type, blocksize, double_quant, device="meta")
    if twin is not None:
        for parameter, value in twin.stored_parameters().items():
            setattr(new, parameter, value)
    elif not layer.weight.is_meta:
        weight = layer.weight.detach()
        new.quantize_weight_(weight.t().contiguous() if is_conv1d(layer) else weight, name=name)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    new.dtype = layer.weight.dtype
    vars(new).update({name: held for name, held in vars(layer).items() if "hook" in name})
    return new.train(layer.training)


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """Parts of paths that the models of transformers in `model` ask to keep in float32: 16 bits were too few."""
    fields = "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"
    return {name for module in model.modules() for field in fields for name in getattr(module, field, None) or ()}


def _nothing_to_quantize(module: nn.Module, skip: str | Sequence[str] | None) -> str:
    """Why `quantize_` found no work, and what to do about it."""
    if any(isinstance(layer, NF4Linear) for layer in module.modules()):
        return "quantize_ found no dense linear layer to quantise: the 4-bit layers of this model are already in place"
    dense = [f"{', '.join([*names][:8])} ({why})" for why, names in dense_weights(module, skip).items()]
    return f"quantize_ finds no layer of this {type(module).__name__} to quantise: {'; '.join(dense) or 'it has none'}"
