"""Adapters merged into the weights they change: as tensors made one at a time, or in place, for good or to be undone.

A merged weight is W + the active adapters' changes, in fp32, rounded once; W of a 4-bit layer is what its codes decode
to, which is what the adapter was trained on.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import disk_errors, tensor_metadata
from ..kernels.dequantize4bit import dequantize as decoded
from ..kernels.dispatch import trim_heap
from ..kernels.quantize4bit import quantize
from ..settings import DType, floating
from .active import remove_adapter, using
from .adapter import Adapter, Whole, is_hooked, wide
from .convert import dense_twin, dequantize
from .init import leading
from .layer import AdapterLayer, adapter_layers, plain_modules, replace_modules, unwrapped
from .lazy_weight import LazyWeight
from .linear4bit import Module4bit, NF4Linear, NF4LowRank, was_conv1d, weight_id
from .lora import LoRA, is_linear
from .packed import can_pack, packed
from .parameter4bit import StandIn
from .peft_files import CONFIG, LOW_RANK, WEIGHTS, load_adapter


def merged_state(model: nn.Module, dtype: DType | None = None) -> dict[str, Tensor]:
    """Name -> dense value of every parameter and saved buffer, as the model has them without adapters, with the active
    adapters' changes and copies in them, each with its weight; floating-point ones in `dtype`, by default their own.

    What is adapted, decoded or cast is made by each operation that takes it, and kept by none: shape and dtype are
    known at once, `value.cpu()` makes it, so a loop over the items holds one dense weight at a time. Tied weights are
    one object under each name; a layer whose weight an adapter changes has its own. Those of a transformers Conv1D are
    [in, out], in 4 bits too. Raises NotImplementedError, where it is made, for an adapter that does not say its change.
    """
    state, shared = dict[str, Tensor](), dict[int, Tensor]()
    for path, module in plain_modules(model).items():
        layer = module if isinstance(module, AdapterLayer) else None
        base, copied = (module, {}) if layer is None else (unwrapped(layer.base), layer.copied(merged=True))
        inside = base.stored_parameters() if isinstance(base, Module4bit) else {}
        kept = {name: tensor for name, tensor in base._buffers.items() if name not in base._non_persistent_buffers_set}
        tensors = {name: own for name, own in (base._parameters | kept | copied).items() if name not in inside}
        changed = layer is not None and bool(layer.changing())
        if inside or changed:
            tensors["weight"] = cast(Tensor, base.weight)
        for name, own in [(name, own) for name, own in tensors.items() if own is not None]:
            of = layer.merged if layer is not None and changed and name == "weight" else None
            key = id(layer) if of else weight_id(base) if name == "weight" and name not in copied else id(own)
            full = path if isinstance(base, StandIn) else f"{path}.{name}".strip(".")
            if key not in shared:
                shared[key] = _value(own, of, dtype, getattr(base, "conv1d", False) and name == "weight")
            state[full] = shared[key]
    return state


def _value(own: Tensor, of: Callable[[torch.dtype], Tensor] | None, dtype: DType | None, turned: bool) -> Tensor:
    """A tensor as it is, or in another dtype, or what `of` makes in its place; [in, out] where it is `turned`."""
    to = floating(dtype) if dtype is not None and own.is_floating_point() else own.dtype
    if of is None and to == own.dtype and not turned:
        return own.detach() if type(own) is nn.Parameter else own

    @torch.no_grad()
    def make(dtype: torch.dtype) -> Tensor:
        lazy = own.make if isinstance(own, LazyWeight) else own.detach().to
        made = (of or lazy)(dtype)
        return made.t() if turned else made

    like = own if isinstance(own, LazyWeight) else own.detach()
    return LazyWeight.of(make, own.shape[::-1] if turned else own.shape, to, like)


@torch.no_grad()
def merge(model: nn.Module, *names: str, keep: bool = False) -> nn.Module:
    """Put the adapters into the weights, in place: W + changes in W's dtype, and their copies in their modules' places.
    Those that are active, with their weights, or the named ones; they are taken off, and the model is plain again. A
    4-bit layer that they change becomes a dense one, of its decoded weight. Returns the model, or what stands for it.

    keep: `unmerge` brings back what was there, bit for bit, and the adapters. The layers as they were stay in memory
    for that: of a dense weight a second one, of a 4-bit one its half byte a value beside the dense weight. Without it
    no more than one weight is held twice. A weight that others hold too, as a tied head's, is the layer's own then.
    Raises InputError, before anything is changed, where no adapter is active, and for a layer that computes its weight;
    NotImplementedError for a kind that does not say its change.
    """
    with using(model, *names) if names else nullcontext():
        layers = {path: own for path, own in adapter_layers(model).items() if own.running()}
        new = dict[Any, nn.Module]()
        _refuse_unmergeable(layers)
        for layer in reversed(layers.values()):  # those within another come first
            new[layer] = _merged(layer, new, keep)
            if keep:
                vars(new[layer])["unmerged"] = layer  # not as a submodule
            else:  # at once, as what fails on the way must not leave a change there twice
                layer.base = new[layer]
                for name in layer.adapters.keys() & layer.active.keys():
                    del layer.adapters[name]
    for layer in () if keep else new:
        layer.active = {name: weight for name, weight in layer.active.items() if name in layer.adapters}
    new = {layer: twin for layer, twin in new.items() if keep or not layer.adapters}
    replace_modules(model, new)
    return new.get(model, model)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, keep=True)`: the layers that were there, their tensors untouched, with their adapters, active
    as they were. They are on the device and of the dtype that they had. Returns the model, or what stands for it.

    Raises InputError where nothing was merged so, and where adapters were attached since.
    """
    if any("unmerged" in vars(layer.base) for layer in adapter_layers(model).values()):
        raise InputError("adapters were attached to merged layers since: take them off first (remove_adapter)")
    if not any("unmerged" in vars(module) for module in model.modules()):
        raise InputError("nothing here can be unmerged: merge with keep=True for that")
    while old := {module: vars(module)["unmerged"] for module in model.modules() if "unmerged" in vars(module)}:
        for module, layer in old.items():  # those within another come back in the next round
            layer.train(module.training)
        replace_modules(model, old)
        model = old.get(model, model)
    return model


@contextmanager
def merging(model: nn.Module, within: float, adapters: bool = True, rows: int = 1) -> Iterator[int]:
    """A block, for generation, in which each linear layer that is in 4 bits, or that active adapters change, computes
    with one dense weight, as `merge` makes it. Yields the bytes of those weights; after it, or an exception in it, they
    are gone and the layers those that were there. Where they would take more than `within`, nothing changes.

    adapters=False: bases alone are decoded, adapters compute beside them and may be switched in the block (`using`,
    `rows`); else they are out of its reach. So it is for weights of 16 bits, in which small changes would be rounded
    away. Layers with hooks and kinds that do not say their change stay as they are, and so does a model where anything
    is wrapped (torch.compile, DDP, FSDP). Of a module that names layers as `together`, which share their input, the
    weights are one, and one product makes their outputs (`project`). rows: of these products; for more than one, those
    of fp32 on a CPU may have no gradient.
    """
    makes = _replaceable(model, adapters)
    total = _bytes_of(makes)
    if makes and total <= within:
        trim_heap()  # of a training's passes; below, of these weights: neither fits where the other was
    with torch.inference_mode(False), torch.no_grad():  # DoRA knows by their versions whether weights have changed
        new = _made(model, makes, rows) if total <= within else {}
    try:
        replace_modules(model, new)
        yield total if new else 0
    finally:
        replace_modules(model, {twin: own for own, twin in new.items()})
        for twin in new.values():
            vars(twin).pop("joined", None)  # they hold each other
        if new:
            new.clear()
            trim_heap()


def _replaceable(model: nn.Module, adapters: bool = True) -> dict[nn.Module, Callable[[], nn.Module]]:
    """The layers that `merging` replaces, and what makes the one in a layer's place."""
    makes = dict[nn.Module, Callable[[], nn.Module]]()
    wrapped = any(unwrapped(module) is not module or module._compiled_call_impl for module in model.modules())
    for module in () if wrapped else plain_modules(model).values():
        layer = module if isinstance(module, AdapterLayer) else None
        base = cast(nn.Linear, module if layer is None else layer.base)
        if not is_linear(base) or any(map(is_hooked, module.modules())):
            continue
        exact = adapters and base.weight.dtype.itemsize >= 4
        parts = layer.changing() if layer is not None and exact else []
        told = parts and all(type(part).delta is not Adapter.delta for part, _ in parts)
        if layer is not None and told and ("weight" in base._parameters or isinstance(base, NF4Linear)):
            makes[layer] = partial(_merged, layer, {}, True)
        elif isinstance(base, NF4Linear):
            makes[base] = partial(dequantize, base)
    return makes


def _bytes_of(layers: Iterable[nn.Module]) -> int:
    """What the dense weights of linear layers take."""
    return sum(cast(Tensor, own.weight).numel() * cast(Tensor, own.weight).dtype.itemsize for own in layers)


def merged_bytes(model: nn.Module) -> int:
    """The bytes that `merging` would hold, of a model on meta too."""
    return _bytes_of(_replaceable(model))


def _made(model: nn.Module, makes: dict[nn.Module, Callable[[], nn.Module]], rows: int) -> dict[nn.Module, nn.Module]:
    """Module -> what stands for it. Those of one input are made together, so that at any time one group lies twice."""
    new = dict[nn.Module, nn.Module]()
    for module in model.modules():
        layers = [vars(module)["_modules"][name] for name in vars(module).get("together", ())]
        owns = [layer if layer in makes else getattr(layer, "base", layer) for layer in layers]
        if owns and all(own in makes for own in owns):
            twins = [makes.pop(own)() for own in owns]
            if rows > 1 and owns == layers and can_pack(twins):
                twins = [*packed(twins)]
            else:
                _join(twins)
            new |= zip(owns, twins, strict=True)
    return new | {own: make() for own, make in makes.items()}


def _join(layers: Sequence[Any]) -> None:
    """Make the weights of these dense layers parts of one, and known to `project`. That lies as [in, out] in fp32 on a
    CPU: products with one row are made by its columns then, which is quicker."""
    if len({layer.bias is None for layer in layers}) != 1:
        return
    whole = nn.Linear(1, 1, layers[0].bias is not None, device="meta")
    for name in dict(whole.named_parameters()):
        parts = [getattr(layer, name).detach() for layer in layers]
        turned = name == "weight" and parts[0].dtype == torch.float32 and parts[0].device.type == "cpu"
        joined = torch.cat([part.t() for part in parts], 1).t() if turned else torch.cat(parts)
        setattr(whole, name, nn.Parameter(joined, False))
    for layer, part in zip(layers, whole.weight.split([layer.out_features for layer in layers]), strict=True):
        layer.weight, vars(layer)["joined"] = nn.Parameter(part, False), (whole, tuple(layers))


class Fidelity(NamedTuple):
    """What became of a change D when W' was written for W + D, W being the weight that D was trained on."""

    change: float  # |D|^2
    noise: float  # |W' - (W + D)|^2
    along: float  # <W' - W, D>

    @classmethod
    def of(cls, plain: Tensor, wanted: Tensor, written: Tensor) -> Self:
        """Of W, W + D and W'."""
        change, off = (wanted - plain).flatten().double(), (written - wanted).flatten().double()
        return cls(float(change @ change), float(off @ off), float(change @ (change + off)))

    @property
    def kept(self) -> float:
        """The share of D that W' has along D's own direction; 1 where there is no change."""
        return self.along / self.change if self.change else 1.0

    def __str__(self) -> str:
        over = math.sqrt(self.change / self.noise) if self.noise else math.inf
        return f"delta over noise {over:.3g}, kept {self.kept:.2%}"


@torch.no_grad()
def fidelity(model: nn.Module, written: Mapping[str, Tensor]) -> dict[str, Fidelity]:
    """Path -> what `written`, by the names of `merged_state`, has of the active adapters' change of each weight."""
    layers, found = adapter_layers(model), dict[str, Fidelity]()
    for path in [path for path, layer in layers.items() if layer.changing()]:
        base = layers[path].base
        got = written[path if isinstance(base, StandIn) else f"{path}.weight"].to(torch.float32)
        turned = got.t() if was_conv1d(base) else got
        weights = wide(cast(Tensor, base.weight), base), wide(layers[path].merged(torch.float32), base)
        found[path] = Fidelity.of(*weights, turned)
    return found


@torch.no_grad()
def requantize_(model: nn.Module, bits: float = 0.3) -> dict[str, Fidelity]:
    """Merge the active adapters in place, as `merge` does, but 4-bit linear layers stay so: NF4LowRank, of codes and of
    factors of at most `bits` a weight for what the codes leave out. Returns what both keep of each such change.

    They are fitted in turn, R = the best of its rank of W + D - Q, then Q = the codes of W + D - R, from the codes that
    are there on (Li et al. 2023, "LoftQ", algorithm 1), and the nearest pair of three stays: for a D of R's rank the
    old codes and D itself. Factors are of 16 bits, rank 1 at least. Raises InputError as `merge`, before any change.
    """
    found, layers = dict[str, Fidelity](), adapter_layers(model).values()
    _refuse_unmergeable({path: layer for path, layer in adapter_layers(model).items() if layer.active})
    if not any(isinstance(layer.base, NF4Linear) and layer.changing() for layer in layers):
        raise InputError("no layer in 4 bits is changed, so none could stay so: merge into the dense base")
    for path, layer in adapter_layers(model).items():
        if isinstance(base := layer.base, NF4Linear) and layer.changing():
            plain, wanted, nearest, stored = base.dequantize(), layer.merged(torch.float32), math.inf, base.stored
            rank = min(*wanted.shape, max(1, int(bits * wanted.numel() / 16 / sum(wanted.shape))))
            for _ in range(3):
                U, S, V = leading(wanted - decoded(stored), rank, 4)
                factors = [part.bfloat16().float() for part in (S.sqrt()[:, None] * V, U * S.sqrt())]
                rest = wanted - factors[1] @ factors[0]
                if (error := float((rest - decoded(stored)).norm())) < nearest:
                    nearest, new = error, NF4LowRank.beside(base, stored, *factors)
                stored = quantize(rest, base.quant_type, base.blocksize, base.double_quant)
            for name, tensor in layer.copied(merged=True).items():
                setattr(new, name, nn.Parameter(tensor.detach().clone(), False))
            layer.base, found[path] = new, Fidelity.of(plain, wanted, new.dequantize())
            layer.adapters.update(dict.fromkeys(layer.active, Whole()))  # they have nothing left to merge
            for part in layer.adapters.values():
                if isinstance(part, LoRA):
                    part.start = ""  # its A0 and B0 are no longer in the base
    merge(model)
    return found


def load_low_rank(model: nn.Module, folder: str | Path) -> None:
    """What `save_low_rank` wrote beside 4-bit layers becomes a part of them again. Errors as `load_adapter`."""
    load_adapter(model, folder, name="beside", trainable=False)
    for layer in adapter_layers(model).values():
        part, base = cast(LoRA, layer.adapters["beside"]), cast(NF4Linear, layer.base)
        A, B = part.factors()
        layer.base = NF4LowRank.beside(base, base.stored, A.detach(), part.scale * B.detach())
    remove_adapter(model, "beside")


def drop_low_rank(folder: Path) -> None:
    """Remove what `save_low_rank` wrote for a model before, as it would be read with the new one; nobody's else."""
    with suppress(InputError), disk_errors("the model", folder, 0):
        own = LOW_RANK.items() <= tensor_metadata(folder / WEIGHTS).items()
        for name in (CONFIG, WEIGHTS) if own else ():
            (folder / name).unlink(missing_ok=True)


def _refuse_unmergeable(layers: Mapping[str, AdapterLayer]) -> None:
    if not layers:
        raise InputError("no adapter is active on this model: use(model, name), or name it: merge(model, name)")
    for path, layer in layers.items():
        if layer.changing() and "weight" not in layer.base._parameters and not isinstance(layer.base, Module4bit):
            raise InputError(
                f"'{path}' ({type(layer.base).__name__}) has no dense weight of its own to take the "
                "change: keep the adapter"
            )
        for part, _ in layer.changing():
            if type(part).delta is Adapter.delta:
                part.delta(torch.empty(0))  # says that it has none


def _merged(layer: AdapterLayer, new: Mapping[Any, nn.Module], keep: bool) -> nn.Module:
    """The layer's base with all that is active in it; a module of its own, of what is `new`, if the base is kept."""
    base, tensors = cast(nn.Linear, layer.base), dict[str, Tensor]()  # any module with a weight
    for name, own in layer.copied(merged=True).items():
        old, copied = getattr(base, name), own.detach().clone()
        tensors[name] = nn.Parameter(copied, old.requires_grad) if isinstance(old, nn.Parameter) else copied
    if layer.changing():
        tensors["weight"] = nn.Parameter(layer.merged(base.weight.dtype).contiguous(), base.weight.requires_grad)
    if "weight" in tensors and isinstance(base, Module4bit):
        base = cast(nn.Linear, dense_twin(base, cast(nn.Parameter, tensors.pop("weight"))))
    elif keep:
        base = copy.copy(base)
        base._parameters, base._buffers = dict(base._parameters), dict(base._buffers)
        base._modules = {name: new.get(child, child) for name, child in base._modules.items()}
    for name, tensor in tensors.items():
        setattr(base, name, tensor)
    return base
