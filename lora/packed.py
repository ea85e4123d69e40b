"""A 4-bit weight as the tensors of a file that bitsandbytes writes: bytes, scales, and a text of the form."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..files import gathered
from ..kernels.blockwise import NESTED_BLOCKSIZE
from ..kernels.codes import code_for, dynamic_code
from ..kernels.weight4bit import Weight4bit
from ..settings import floating
from .linear4bit import Module4bit, NF4Linear
from .parameter4bit import NF4Parameter

FORM = ".quant_state.bitsandbytes__"  # between a weight's name and its code's, in the name of the text


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
        offset = torch.tensor([form["nested_offset"]], device=absmax.device) if double_quant else None
        stored = Weight4bit(packed, absmax, pieces.get(".nested_absmax"), offset, shape, kind, blocksize).check()
        kind_of: type[Module4bit] = NF4Linear if len(shape) == 2 else NF4Parameter
        layer = kind_of.of(stored, floating(form["dtype"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as problem:
        raise InputError(f"{what} is no 4-bit weight as bitsandbytes writes it: {problem}") from None
    return layer
