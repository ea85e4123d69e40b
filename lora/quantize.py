"""quantize_: swap every nn.Linear of a module for its 4-bit twin, in place.

Only exact nn.Linear layers are swapped: a subclass may read its own weight (nn.MultiheadAttention does so with its
output projection) and would misread packed bytes.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import InputError
from ..kernels.weight4bit import check_format
from .adapter import replace_modules
from .config import checked_names
from .linear4bit import NF4Linear
from .targets import linear_layers, listed, matcher


def quantize_(
    module: nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: str | Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Replace the linear layers of `module` by NF4Linear, one at a time, and return it; of a bare nn.Linear, its twin.

    `skip` names layers to leave dense as LoRAConfig's `target` does: full paths or their ends in a list, or one regular
    expression; each must match a layer, but for "lm_head" in a list, which not every model has. A weight that anything
    but a linear layer also holds, such as that of a tied output head, stays dense too. Layers that share one weight
    share one set of packed bytes. Layers on the meta device become empty 4-bit layers on meta.
    Raises InputError when nothing is left to quantise, and when a weight holds NaN or infinity (naming the tensor).
    """
    skip = checked_names("skip", skip)
    try:
        check_format(quant_type, blocksize)
    except ValueError as problem:
        raise InputError(f"quantize_: {problem}") from None
    if type(module) is nn.Linear:
        return _quantized(module, "weight", quant_type, blocksize, double_quant)
    layers = linear_layers(module)
    listed(module, "skip", skip if isinstance(skip, str) else [name for name in skip if name != "lm_head"], [*layers])
    skipped = matcher(skip)
    dense = {
        path: layer for path, layer in layers.items() if type(layer) is nn.Linear and "weight" in layer._parameters
    }
    layers.clear()
    wanted = {path: layer for path, layer in dense.items() if not skipped(path)}
    held_elsewhere = _parameters_outside(module, wanted.values())
    wanted = {path: layer for path, layer in wanted.items() if id(layer.weight) not in held_elsewhere}
    if not wanted:
        raise InputError(_nothing_to_quantize(module, list(dense), skip))
    dense.clear()
    twins: dict[int, NF4Linear] = {}  # id of a dense weight -> the first layer made from it
    for path in list(wanted):
        layer = wanted.pop(path)  # so that each dense weight is freed before the next one is quantised
        first = twins.get(id(layer.weight))
        twin = _quantized(layer, f"{path}.weight", quant_type, blocksize, double_quant, first)
        twins.setdefault(id(layer.weight), twin)
        replace_modules(module, {layer: twin})
    return module


def _quantized(
    layer: nn.Linear, name: str, quant_type: str, blocksize: int, double_quant: bool, twin: NF4Linear | None = None
) -> NF4Linear:
    """The 4-bit form of `layer`; with `twin`, one that shares the twin's weight."""
    new = NF4Linear(layer.in_features, layer.out_features, False, quant_type, blocksize, double_quant, device="meta")
    if twin is not None:
        for parameter, value in twin.stored_parameters().items():
            setattr(new, parameter, value)
    elif not layer.weight.is_meta:
        new.quantize_weight_(layer.weight.detach(), name=name)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    new.dtype = layer.weight.dtype
    vars(new).update({name: held for name, held in vars(layer).items() if "hook" in name})
    return new.train(layer.training)


def _parameters_outside(module: nn.Module, wanted: Iterable[nn.Module]) -> set[int]:
    """Ids of the parameters that a module other than the wanted linear layers holds itself."""
    outside = set(module.modules()) - set(wanted)
    return {id(parameter) for holder in outside for parameter in holder.parameters(recurse=False)}


def _nothing_to_quantize(module: nn.Module, names: list[str], skip: str | Sequence[str]) -> str:
    """Why `quantize_` found no work, and what to do about it."""
    if any(isinstance(layer, NF4Linear) for layer in module.modules()):
        return "quantize_ found no dense nn.Linear to quantise: the 4-bit layers of this model are already in place"
    if names:
        return (
            f"quantize_ found only layers it must leave dense ({', '.join(names[:8])}): they are named in "
            f"skip={skip!r} or share their weight with another module. Pass skip=() or untie the weight to "
            "quantise them."
        )
    return f"quantize_ replaces nn.Linear layers, and this {type(module).__name__} has none"
