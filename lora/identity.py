"""Which base an adapter was trained on: what its file says of it, and how far another base is from that.

Hashes are of 4-bit codes, and of all else rounded to bfloat16, as every dtype that trains holds it. So they depend
on the model's numbers and 4-bit form alone: not on device, dtype, compilation or adapters. They tell accidents apart,
and are no signature.
"""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, shown
from ..files import gathered, tensor_metadata
from ..kernels.dequantize4bit import dequantize
from ..kernels.weight4bit import BLOCKSIZES, Weight4bit
from .linear4bit import Module4bit, NF4LowRank, is_conv1d
from .parameter4bit import DenseParameter, NF4Parameter
from .targets import base_modules

KEY = "fourbit.base."  # in the metadata of a safetensors file, before the name of a field
CHUNK = 1 << 22  # values that are rounded, and brought from the device, at a time
SAMPLED, VALUES = 32, 32  # matrices, and values of each, whose signs are kept
_WRITTEN = re.compile(r"[\w ,-]{1,200}(\n([0-9a-f]{64})?){2}\n[+-]{0,4096}\n[a-z0-9-]{0,20}")  # the fields, one a line
ALIKE = 0.75  # of the signs: rounding a base to 4 bits leaves 0.9 and more, another base has half by chance
ROUNDED = 0.995  # of the signs, dense or 4-bit both: what rounding alone leaves (to float16, then bfloat16)


class BaseIdentity(NamedTuple):
    """A model without its adapters. A hash is "" for a float16 model, whose numbers may have been rounded twice."""

    quant: str  # 4-bit form of the linear layers: nf4, nf4-nodq, fp4, ...; none
    vectors: str  # hash of norms and biases, which no way of quantising a base changes
    weights: str  # hash of all other parameters, as they are kept
    signs: str  # of some weights, - or +: alike for every form of one base
    start: str = ""  # by which its 4-bit codes were made anew, for the adapter

    def metadata(self) -> dict[str, str]:
        """As a safetensors file keeps it."""
        return {KEY + name: value for name, value in self._asdict().items()}

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """What a file says; None where it says nothing. InputError for what `metadata` never gives."""
        metadata = tensor_metadata(file)
        found = [metadata.get(KEY + name, "") for name in cls._fields]
        if any(found) and not _WRITTEN.fullmatch("\n".join(found)):
            raise InputError(f"'{file}': what it says of its base ({KEY}*) is damaged: got {shown(found)}")
        return cls(*found) if any(found) else None

    def is_other_base(self, trained: "BaseIdentity") -> bool:
        """Whether the two are different models, and not forms of one."""
        alike = sum(a == b for a, b in zip(self.signs, trained.signs, strict=False))
        longest = max(len(self.signs), len(trained.signs))
        rounded = alike >= ROUNDED * longest
        return alike < ALIKE * longest or (_differ(self.vectors, trained.vectors) and not rounded)

    def difference(self, trained: "BaseIdentity") -> str:
        """What an adapter should know of this form of its base; "" where it is the one that it was trained on."""
        if self.quant != trained.quant:
            then, here = ("the dense base" if q == "none" else q for q in (trained.quant, self.quant))
            return f"was trained on {then}; on {here} it will be somewhat off"
        if _differ(self.weights, trained.weights) or _differ(self.vectors, trained.vectors):
            return "was trained on slightly other weights of this base: from a file that rounds otherwise, or changed"
        return ""


def base_identity(model: nn.Module, adapter: Mapping[str, nn.Module] | None = None) -> BaseIdentity:
    """The identity of `model`, without its adapters and what `adapter` has copies of; parameters are read once."""
    vectors, weights, named = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor | Module4bit]()
    forms, seen, exact = set[str](), set[nn.Parameter](), True
    for path, module in sorted(base_modules(model).items()):
        packed = module if isinstance(module, Module4bit) else None
        stored = packed.stored_parameters() if packed else {}
        forms |= {_quant(packed)} if packed else set()
        copies = getattr((adapter or {}).get(path), "copies", None) or nn.Module()  # as of a head that starts fresh
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or name in copies.state_dict():
                continue  # a tied weight counts once
            seen.add(parameter)
            exact = exact and parameter.dtype != torch.float16
            full = path if isinstance(module, DenseParameter) else f"{path}.{name}"
            (vectors if parameter.ndim < 2 and name not in stored else weights)[full] = parameter
            if packed and name == "packed":
                named[path if isinstance(module, NF4Parameter) else f"{path}.weight"] = packed
            elif parameter.ndim > 1 and name not in stored:
                named[full] = parameter.t() if is_conv1d(module) else parameter  # as 4 bits keep it: [out, in]
    signed = [named[name] for name in sorted(named)]
    some = [signed[i * len(signed) // SAMPLED] for i in range(SAMPLED)] if len(signed) > SAMPLED else signed
    hashes = (hashed(vectors, rounded=True), hashed(weights, rounded=True)) if exact else ("", "")
    start = max((getattr(part, "start", "") for part in (adapter or {}).values()), default="")
    return BaseIdentity(", ".join(sorted(forms)) or "none", *hashes, "".join(map(_signs, some)), start)


def _quant(layer: Module4bit) -> str:
    """A layer's 4-bit form in the words of `--quant`."""
    blocks = f" in blocks of {layer.blocksize}" if layer.blocksize != 64 else ""
    return layer.quant_type + ("" if layer.double_quant else "-nodq") + blocks


def _differ(a: str, b: str) -> bool:
    return bool(a and b) and a != b


def hashed(tensors: Mapping[str, Tensor], *, rounded: bool = False) -> str:
    """SHA-256 over names, shapes and values: exact ones and their dtypes, or as bfloat16 holds them."""

    def digest(named: tuple[str, Tensor]) -> bytes:
        name, tensor = named
        found = hashlib.sha256(f"{name} {'' if rounded else tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for chunk in gathered(tensor).reshape(-1).split(CHUNK):
            values = chunk.bfloat16() if rounded and chunk.is_floating_point() else chunk
            found.update(values.cpu().view(torch.uint8).numpy().data)
        return found.digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets other threads run
        ordered = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())  # ranks have to ask in one order
        return hashlib.sha256(b"".join((map if ordered else pool.map)(digest, sorted(tensors.items())))).hexdigest()


def _signs(weight: Tensor | Module4bit) -> str:
    """The signs of some values in the middle of a matrix."""
    layer = weight if isinstance(weight, Module4bit) else None
    flat = gathered(weight.packed if isinstance(weight, Module4bit) else weight).reshape(-1)
    size = flat.numel() if layer is None else prod(layer.shape)
    start = size // 2 // BLOCKSIZES[-1] * BLOCKSIZES[-1]  # where a block of any size begins
    values, count = flat[start : start + VALUES], min(VALUES, size - start)
    if isinstance(layer, NF4LowRank):
        rows = slice(start // layer.shape[1], -(-(start + count) // layer.shape[1]))
        values = layer.dequantize(torch.float32, rows).reshape(-1)[start % layer.shape[1] :][:count]
    elif layer is not None:
        codes = flat[start // 2 : (start + count + 1) // 2]
        one = torch.ones(1, dtype=torch.float32, device=flat.device)
        values = dequantize(Weight4bit(codes, one, None, None, (count,), layer.quant_type, layer.blocksize))
    return "".join("-" if value < 0 else "+" for value in values.tolist())
