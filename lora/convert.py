"""Layers in other forms, in place: dense again, bitsandbytes' and back, in memory and in files.

Each function of a module changes what that holds and returns it; of a bare layer it returns what stands for it.
"""

import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import gathered
from ..kernels.blockwise import NESTED_BLOCKSIZE
from ..kernels.codes import code_for, dynamic_code
from ..kernels.weight4bit import Weight4bit
from ..settings import DType, floating
from .layer import replace_modules
from .linear4bit import Module4bit, NF4Linear, NF4LowRank
from .parameter4bit import DenseParameter, NF4Parameter, StandIn

FORM = ".quant_state.bitsandbytes__"  # between a weight's name and its code's, in the name of the text


def dequantize(module: nn.Module, dtype: DType | None = None) -> nn.Module:
    """Make 4-bit layers nn.Linear and nn.Embedding again, and experts dense, in place: frozen, rounded once to `dtype`.

    dtype: by default that of the weight which the layer was made from. What shared its bytes shares its dense weight.
    Adapters stay, and work on the dense layers.
    Raises InputError where there is no 4-bit layer."""

    weights: dict[int, nn.Parameter] = {}

    def dense(layer: Module4bit) -> nn.Module:
        if (key := id(layer.packed)) not in weights:
            weights[key] = nn.Parameter(layer.dequantize(dtype or layer.dtype), requires_grad=False)
        return dense_twin(layer, weights[key])

    return _swapped(module, dense, Module4bit)


def dense_twin(layer: Module4bit, weight: nn.Parameter) -> nn.Module:
    """The dense module of that weight that does what a 4-bit one does; its bias and hooks are the same."""
    new: Any = DenseParameter(weight)
    if not isinstance(layer, NF4Parameter):
        rows, columns = layer.shape
        linear = isinstance(layer, NF4Linear)
        new = nn.Linear(columns, rows, False, "meta") if linear else nn.Embedding(rows, columns, device="meta")
        new.weight, new.bias = weight, layer.bias
        new.conv1d = layer.conv1d  # so that it is saved as its class has it
    kept = {name: held for name, held in vars(layer).items() if "hook" in name or name in StandIn.__annotations__}
    vars(new).update(kept)
    return cast(nn.Module, new.train(layer.training))


def packed_tensors(name: str, layer: Module4bit) -> dict[str, Tensor]:
    """The weight of a 4-bit module as the tensors of a file, by name: the bytes that the layer computes with."""
    packed, absmax, *nested = (gathered(tensor) for tensor in layer.stored[:4] if tensor is not None)
    kind, dtype = layer.quant_type, str(layer.dtype).removeprefix("torch.")
    form = {"quant_type": kind, "blocksize": layer.blocksize, "dtype": dtype, "shape": list(layer.shape)}
    found = {"": packed.view(-1, 1), ".absmax": absmax.view(-1), ".quant_map": code_for(kind).clone()}
    if nested:
        found |= {".nested_absmax": nested[0], ".nested_quant_map": dynamic_code().clone()}
        form |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": nested[1].item()}
    found[FORM + kind] = torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)
    return {name + piece: tensor for piece, tensor in found.items()}


def packed_layer(pieces: Mapping[str, Tensor], what: str) -> Module4bit:
    """The layer, less its bias, of those tensors by what follows the weight's name; it keeps their memory. What is
    no matrix is an NF4Parameter.
    Raises InputError, saying `what` they are, for some that miss, do not fit the text, or are of other codes."""
    try:
        (text,) = (tensor for piece, tensor in pieces.items() if piece.startswith(FORM))
        form = json.loads(bytes(text[:4096].tolist()))
        kind, shape, double_quant = form["quant_type"], tuple(form["shape"]), "nested_offset" in form
        codes = {".quant_map": code_for(kind)} | ({".nested_quant_map": dynamic_code()} if double_quant else {})
        wanted = {"", ".absmax", FORM + kind, *codes, *([".nested_absmax"] if double_quant else [])}
        ours = wanted == pieces.keys() and all(torch.equal(pieces[piece].cpu(), code) for piece, code in codes.items())
        if not ours or form.get("nested_blocksize", NESTED_BLOCKSIZE) != NESTED_BLOCKSIZE:
            raise ValueError(f"it must come with {', '.join(sorted(wanted - {''}))}, of the codes of {kind}")
        packed, absmax, blocksize = pieces[""].view(torch.uint8), pieces[".absmax"], form["blocksize"]
        offset = pieces[".nested_absmax"].new_tensor([form["nested_offset"]]) if double_quant else None
        stored = Weight4bit(packed, absmax, pieces.get(".nested_absmax"), offset, shape, kind, blocksize).check()
        kind_of: type[Module4bit] = NF4Linear if len(shape) == 2 else NF4Parameter
        layer = kind_of.of(stored, floating(form["dtype"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as problem:
        raise InputError(f"{what} is no 4-bit weight as bitsandbytes writes it: {problem}") from None
    return layer


def from_bitsandbytes(module: nn.Module) -> nn.Module:
    """Make bitsandbytes' Linear4bit layers NF4Linear, in place; packed bytes and scales are the same tensors.

    Ours compute in the dtype of their input, whatever `compute_dtype` said. Raises InputError where there is no such
    layer, and for one that bitsandbytes has repacked for its CPU kernel, whose scales are rounded to bfloat16."""

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
        if isinstance(layer, NF4LowRank):
            raise InputError("a layer is 4 bits and a low-rank part, which bitsandbytes has not: save the adapter")
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
