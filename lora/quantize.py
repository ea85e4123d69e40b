"""quantize_: swap the linear layers of a module for their 4-bit twins, in place, and say what stays dense and why.

What stays dense is decided in one place (`_reasons`), before quantising and after: a model says at any time what it
keeps dense, and nothing needs to be remembered.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Self

from torch import nn

from ..errors import InputError
from ..kernels.blockwise import NESTED_BLOCKSIZE
from ..kernels.weight4bit import check_format
from .config import checked_names
from .layer import holders
from .linear4bit import Module4bit, NF4Embedding, NF4Linear, is_conv1d, is_embedding, sizes, weight_id
from .lora import is_linear
from .parameter4bit import DenseParameter, NF4Parameter, StandIn
from .targets import base_modules, expert_parameters, expose, linear_layers, listed, matcher, nearest, output_heads


class Form(NamedTuple):
    """How a weight is kept in 4 bits."""

    quant_type: str = "nf4"  # or "fp4"
    blocksize: int = 64
    double_quant: bool = True

    def checked(self) -> Self:
        """Itself; InputError for a type or block size that does not exist."""
        try:
            check_format(self.quant_type, self.blocksize)
        except ValueError as problem:
            raise InputError(str(problem)) from None
        return self

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in this form, without the tables and the text that a file has beside it."""
        blocks = -(-prod(shape) // self.blocksize)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) if self.double_quant else 4 * blocks
        return -(-prod(shape) // 2) + scales


def quantize_(
    module: nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: str | Sequence[str] | None = None,
    embeddings: bool = False,
) -> nn.Module:
    """Replace the linear layers of `module` by NF4Linear, one at a time, and return it; of a bare nn.Linear, its twin.

    Linear layers are nn.Linear, subclasses that keep its forward, and Conv1D of transformers. Experts that are one
    parameter [E, out, in] or [E, in, out] (see `expert_parameters`) become NF4Parameter: their module reads them as
    before, `parameter[e]` decodes one expert, and no product keeps a dense one. Weights that others hold too, or that
    cannot or should not change stay dense, and all other parameters: `dense_weights` says which and why.
    `skip` names what to leave dense as LoRAConfig's `target` does: full paths or their ends in a list, or one regular
    expression; each must match a layer or an expert parameter. None: the output heads, of a vocabulary or of classes.
    `embeddings`: each nn.Embedding becomes an NF4Embedding too, and the head that is tied to it an NF4Linear of the
    same bytes.
    What shares one weight shares one set of packed bytes. What is on the meta device becomes empty 4-bit weights.
    Raises InputError when nothing is left to quantise, and when a weight holds NaN or infinity (naming the tensor)."""
    form = Form(quant_type, blocksize, double_quant).checked()
    if not (plan := uniform_plan(module, form, skip, embeddings)):
        if any(isinstance(layer, Module4bit) for layer in module.modules()):
            what = "the 4-bit layers of this model are already in place"
            raise InputError(f"quantize_ found no dense linear layer to quantise: {what}")
        dense = [f"{', '.join([*names][:8])} ({why})" for why, names in dense_weights(module, skip).items()]
        found = "; ".join(dense) or "it has none"
        raise InputError(f"quantize_ finds no layer of this {type(module).__name__} to quantise: {found}")
    return quantize_by_plan_(module, plan)


def uniform_plan(
    module: nn.Module, form: Form, skip: str | Sequence[str] | None = None, embeddings: bool = False
) -> dict[str, Form]:
    """Path -> form of all that `quantize_` would put in 4 bits."""
    layers = quantizable(module, embeddings)
    dense = _reasons(module, layers, skip)
    return {path: form for path in layers if path not in dense and not isinstance(layers[path], Module4bit)}


def quantize_by_plan_(module: nn.Module, plan: Mapping[str, Form | None]) -> nn.Module:
    """As `quantize_`, each layer in the form that `plan` has for its path, or for a layer that shares its weight; those
    of None, or not in it, stay dense. An nn.Embedding in the plan becomes an NF4Embedding.

    Raises InputError besides for a path that is no such layer, or that cannot change, saying why."""
    layers, forms = quantizable(module, True), dict[int, Form]()
    for path, form in plan.items():
        if path not in layers:
            raise InputError(f"plan: {path!r} is no linear layer or embedding here.{nearest(path, layers)}")
        if form is not None and forms.setdefault(weight_id(layers[path]), form.checked()) != form:
            raise InputError(f"plan: {path!r} shares its weight with a layer of another form")
    wanted = {path: layer for path, layer in layers.items() if weight_id(layer) in forms}
    dense = _reasons(module, wanted | {path: layer for path, layer in layers.items() if is_linear(layer)}, ())
    dense |= {path: "it is so already" for path, layer in wanted.items() if isinstance(layer, Module4bit)}
    if wrong := next((path for path in wanted if path in dense), None):
        raise InputError(f"plan: {wrong!r} cannot be put in 4 bits: {dense[wrong]}")
    layers.clear()
    experts = expose(module, [path for path, layer in wanted.items() if isinstance(layer, DenseParameter)])
    wanted |= {path: part for path, part in base_modules(module).items() if path in experts and path in wanted}
    places = holders(module)
    twins: dict[int, Module4bit] = {}  # id of a dense weight -> the first layer made from it
    for path in list(wanted):
        layer = wanted.pop(path)  # so that each dense weight is freed before the next one is quantised
        key, name = weight_id(layer), path if path in experts else f"{path}.weight".lstrip(".")
        twin = _quantized(layer, name, forms[key], twins.get(key))
        twins.setdefault(key, twin)
        if not path:
            return twin
        for parent, attribute in places[id(layer)]:
            setattr(parent, attribute, twin)
    return module


def quantizable(module: nn.Module, embeddings: bool) -> dict[str, Any]:
    """Path -> layer of all that might be in 4 bits: linear layers, if asked embeddings that are plain tables, and
    expert parameters, as a DenseParameter of each."""
    modules = base_modules(module)
    tables = {path: part for path, part in modules.items() if embeddings and is_embedding(part)}
    experts = {path: modules.get(path) or DenseParameter(p) for path, p in expert_parameters(module).items()}
    return tables | linear_layers(module) | experts


def dense_weights(model: nn.Module, skip: str | Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """Why `quantize_(model, skip=skip)` leaves matrices dense, or has left them -> their names and sizes in bytes.

    These are all parameters of two or more dimensions that are not in 4 bits then: linear layers that must or shall
    stay dense, experts too, embeddings, convolutions. What is tied is counted under its first name.
    Raises InputError for an entry of `skip` that matches no linear layer and no expert parameter."""
    layers = quantizable(model, False)
    reasons, seen = _reasons(model, layers, skip), set[nn.Parameter]()
    dense: dict[str, dict[str, int]] = {}
    for path, module in base_modules(model).items():
        if (path in layers and path not in reasons) or isinstance(module, Module4bit):
            continue
        own = "has a forward of its own: make it nn.Linear" if isinstance(module, nn.Linear) else "is no linear layer"
        for name, weight in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if weight.ndim > 1 and (full not in layers or full in reasons):
                why = reasons.get(full) or reasons.get(path.partition(".parametrizations")[0])
                names = dense.setdefault(why or f"{type(module).__name__} {own}", {})
                names[full] = 0 if weight in seen else weight.nbytes
                seen.add(weight)
    return dense


def _reasons(model: nn.Module, layers: Mapping[str, Any], skip: str | Sequence[str] | None) -> dict[str, str]:
    """Path of each of these layers that stays dense -> why."""
    tables = {id(layer.weight) for layer in layers.values() if isinstance(layer, nn.Embedding)}
    heads = {p for p in output_heads(model) if id(layers[p].weight) not in tables} if skip is None else set[str]()
    skip = checked_names("skip", () if skip is None else skip)
    listed(model, "skip", skip, list(layers))
    # What the models of transformers in it ask to keep in float32: 16 bits were too few.
    skipped, fields = matcher(skip), ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    fp32 = {name for part in model.modules() for field in fields for name in getattr(part, field, None) or ()}
    holder = {
        tensor.untyped_storage()._cdata: f"{path}.{name}".lstrip(".")
        for path, module in reversed(base_modules(model).items())  # a tensor that is held twice has its first name
        if path not in layers
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if f"{path}.{name}".lstrip(".") not in layers
    }
    why: dict[str, str] = {}
    for path, layer in layers.items():
        if isinstance(layer, Module4bit):
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


def _quantized(layer: Any, name: str, form: Form, twin: Module4bit | None = None) -> Module4bit:
    """The 4-bit form of `layer`; with `twin`, one that shares the twin's weight."""
    own: type[Module4bit] = NF4Embedding if is_embedding(layer) else NF4Parameter
    kind, shape = (NF4Linear, sizes(layer)[::-1]) if is_linear(layer) else (own, tuple(layer.weight.shape))
    new = kind.empty(shape, *form)
    if twin is not None:
        new.share(twin)
    elif not layer.weight.is_meta:
        weight = layer.weight.detach()
        new.quantize_weight_(weight.t().contiguous() if is_conv1d(layer) else weight, name=name)
    if getattr(layer, "bias", None) is not None:
        new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    new.dtype, new.conv1d = layer.weight.dtype, is_conv1d(layer)
    vars(new).update({n: held for n, held in vars(layer).items() if "hook" in n or n in StandIn.__annotations__})
    return new.train(layer.training)
