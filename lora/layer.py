"""The seam of adapters: a linear layer, the named adapters on it, and which of them are active.

A layer wraps its base and does not subclass it, so dense and 4-bit layers look alike to other code. Attaching,
switching, copying, taking off and files are written once, here and beside this file, for all kinds of adapter.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from ..errors import InputError
from ..kernels.dispatch import autocast_input
from ..kernels.linear4bit import lora_linears4bit
from ..kernels.lora_paths import lora_update
from .adapter import Adapter, LowRank, Whole, is_hooked, wide
from .lazy_weight import LazyWeight
from .linear4bit import NF4Linear, NF4LowRank, is_conv1d, over_nested, sizes

DEFAULT = "default"
WRAPPED = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"  # what is inside torch's wrappers


class ByRows(dict[str, float]):
    """In the place of a layer's active adapters: those of a batch whose rows have different ones. See rows.py."""

    def output(self, layer: "AdapterLayer", *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computes then."""
        raise NotImplementedError


class AdapterLayer(nn.Module):
    """y = base(x), to which each active adapter adds its part times its weight, in the order of `active`; the base
    computes with the active adapters' copies of its tensors. Other attributes are the base's, and tensors those that it
    computes with.

    A 4-bit base under low-rank adapters is one op with them, unless a hook sits on one. The adapters given are
    active (change that with `use` and `using`); what trains, base included, is for others to say (`install`).
    """

    def __init__(self, base: nn.Module, /, **adapters: Adapter) -> None:  # one may be called "base"
        super().__init__()
        self.base = base
        if is_conv1d(base):
            self.in_features, self.out_features = sizes(cast(nn.Linear, base))
        self.adapters = nn.ModuleDict(adapters)
        self.active = dict.fromkeys(adapters, 1.0)
        self.train(base.training)

    def running(self) -> list[tuple[Adapter, float]]:
        """The active adapters with their weights, in order. InputError where each row has its own."""
        here = [(name, weight) for name, weight in self.active.items() if name in self.adapters]
        if here and isinstance(self.active, ByRows):
            raise InputError(
                "inside rows() a layer has no one weight that a module could read (fused experts, a head in chunks, a "
                "trained copy): call the layer itself, or leave its adapters out"
            )
        return [(cast(Adapter, self.adapters[name]), weight) for name, weight in here]

    def changing(self) -> list[tuple[Adapter, float]]:
        """Those of them that change what the base computes, and not its tensors alone."""
        return [(part, weight) for part, weight in self.running() if not isinstance(part, Whole)]

    def copied(self, merged: bool = False) -> dict[str, Tensor]:
        """The active adapters' copies of the base's tensors, by name, in its dtypes; `merged`: the bias as changed."""
        found: dict[str, Tensor] = {}
        for part, weight in self.running():
            copies = () if part.copies is None else (*part.copies.named_parameters(), *part.copies.named_buffers())
            for name, tensor in copies:
                own = getattr(self.base, name)
                mixed = weight != 1 and own.is_floating_point()
                found[name] = (own.to(tensor).lerp(tensor, weight) if mixed else tensor).to(own.dtype)
        bias: Any = found.get("bias", getattr(self.base, "bias", None))
        for part, weight in self.changing() if merged and bias is not None else ():
            if (change := part.delta_bias(bias)) is not None:
                found["bias"] = (found.get("bias", bias) + weight * change).to(bias.dtype)
        return found

    def forward(self, *args: object, **kwargs: object) -> Tensor:  # of a linear layer: [..., in] -> [..., out]
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and x.is_nested:
            return over_nested(self.forward, x)
        if isinstance(self.active, ByRows):
            return self.active.output(self, *args, **kwargs)
        if (joint := self.joint(x)) is not None:
            return self.finish(joint_forward(x, [joint])[0])
        own = self.copied()
        if not self.changing():
            return cast(Tensor, functional_call(self.base, own, args, kwargs) if own else self.base(*args, **kwargs))
        tensors = {f"base.{name}": tensor for name, tensor in own.items()}
        return cast(Tensor, functional_call(_Method(self.base, self._changed), tensors, x) if own else self._changed(x))

    def finish(self, y: Tensor) -> Tensor:
        """The output [..., out], of what one op made of `joint`."""
        for part, _ in self.changing():
            y = part.finish(y, self.base)
        return y

    def _changed(self, x: Tensor) -> Tensor:
        """The output under adapters that change it."""
        parts = self.changing()
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0].over(x, self.base)
        y = plain = self.base(x)
        if (update := self.low_rank()) is not None:
            y = y.clone() if is_hooked(self.base) else y
            return lora_update(y, autocast_input(x), update.A, update.B, update.scale)
        for part, weight in parts:
            if part.of_base:
                y = y + weight * (part.over(x, self.base) - plain)
            else:
                changed = part(x, y.clone())
                y = changed if weight == 1 else y.lerp(changed, weight)
        return y

    def low_rank(self, codes: bool = False) -> LowRank | None:
        """All active adapters' updates as one, A and B stacked, if low-rank, unhooked, undropped; codes: of one."""
        parts = self.changing()
        if codes and [weight for _, weight in parts] != [1]:
            return None
        updates = [None if is_hooked(part) else part.low_rank(codes) for part, _ in parts]
        found = [update for update in updates if update is not None]
        if not found or len(found) < len(parts):
            return None
        if len(parts) == 1 and parts[0][1] == 1:
            return found[0]
        if any(part.of_base for part, _ in parts):
            return None
        B = [(weight * update.scale) * update.B for update, (_, weight) in zip(found, parts, strict=True)]
        stacked = LowRank(torch.cat([update.A for update in found]), torch.cat(B, 1), 1.0, 0.0)
        return None if any(update.dropout for update in found) else stacked

    def joint(self, x: Tensor) -> tuple[NF4Linear, LowRank] | None:
        """Base and update if one op makes both for x [..., in]: 4 bits, low-rank adapters, nothing copied or hooked."""
        base = self.base if type(self.base) in (NF4Linear, NF4LowRank) else None
        if not isinstance(base, NF4Linear) or x.is_nested or not x.is_floating_point() or is_hooked(base):
            return None
        apart = isinstance(self.active, ByRows) or any(part.copies is not None for part, _ in self.running())
        update = None if apart else self.low_rank(isinstance(base, NF4LowRank))
        return None if update is None else (base, update)

    def frozen(self, active: Mapping[str, float]) -> nn.Module:
        """A layer on the same base with frozen copies of those of the adapters that are here, each with its weight;
        without any, the base."""
        twins = {n: cast(Adapter, copy.deepcopy(self.adapters[n])).freeze() for n in active if n in self.adapters}
        layer = AdapterLayer(self.base, **twins)
        layer.active = {name: active[name] for name in twins}
        return layer if twins else self.base

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that the layer computes with, active adapters included: see `LazyWeight`."""
        weight = cast(Tensor, self.copied().get("weight", self.base.weight))
        made = [(adapter.term(), weight) for adapter, weight in self.changing()]
        if terms := [(term[0] if w == 1 else w * term[0], term[1]) for term, w in made if term is not None]:
            decode = getattr(weight, "decode", None) or (lambda i, d: weight[... if i is None else i].detach().to(d))
            stored = weight.stored if isinstance(weight, LazyWeight) else [weight.detach()]
            return LazyWeight.decoded(decode, weight.shape, weight.dtype, weight, stored, terms)
        parts = [p for adapter, _ in self.changing() for p in adapter.parameters()]
        like = next((p for p in parts if p.requires_grad), weight)
        return LazyWeight.of(self._weight, weight.shape, weight.dtype, like) if parts else weight

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if any(adapter.training and adapter.dropout for adapter, _ in self.running()):
            raise InputError("where a module computes with a layer's weight, no input can be dropped: set dropout=0")
        return self.merged(dtype)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """The weight with the active adapters' changes, shaped as the base has it; summed wide, rounded once."""
        weight = cast(Tensor, self.copied().get("weight", self.base.weight))
        found = plain = wide(weight, self.base)
        for adapter, share in self.changing():
            found = found + share * adapter.delta(plain if adapter.of_base else found)
        return (found.t() if is_conv1d(self.base) else found).to(dtype)

    def __getattr__(self, name: str) -> Any:  # what this layer does not have itself
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):  # a parametrised base has a __deepcopy__ of its own
                raise
        found: Any = getattr(self.base, name)
        bound = getattr(found, "__self__", None) is self.base
        own = self.copied(merged=True) if bound or isinstance(found, Tensor) else {}
        if not own or not bound:
            return own.get(name, found)
        tensors, method = {f"base.{key}": tensor for key, tensor in own.items()}, _Method(self.base, found)
        return lambda *args, **kwargs: functional_call(method, tensors, args, kwargs)  # of the module, trained whole

    def extra_repr(self) -> str:
        active = [name if weight == 1 else f"{name} x {weight:g}" for name, weight in self.active.items()]
        return f"active={', '.join(active) or 'none'}"


class _Method(nn.Module):
    """A method of a module as a forward, which `functional_call` can give other tensors."""

    def __init__(self, base: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.base, self.forward = base, method


def joint_forward(
    x: Tensor,
    layers: Sequence[tuple[NF4Linear, LowRank]],
    keep: bool = False,
    up: Tensor | None = None,
    gelu: bool = False,
) -> list[Tensor]:
    """The outputs of what `joint` gave, for one input, 4-bit format and dropout; up, gelu: as `lora_linears4bit`."""
    bases, updates = zip(*layers, strict=True)
    A, B, scales, dropouts = zip(*updates, strict=True)
    stored, biases = [base.stored for base in bases], [base.bias for base in bases]
    return lora_linears4bit(autocast_input(x), stored, biases, A, B, scales, dropouts[0], None, keep, up, gelu)


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch's wrappers (torch.compile, DDP, FSDP, a checkpointed block) are around, or the module itself."""
    parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel)
    own = next((name for name in module._modules if name in WRAPPED or (parallel and name == "module")), None)
    return module if own is None else unwrapped(module.get_submodule(own))


def plain_name(name: str) -> str:
    """A module's or parameter's name as it is where nothing is wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module in module order, as if torch's wrappers were not there and layers did not wrap their bases."""
    found, left = dict[nn.Module, str](), [("", model)]
    while left:
        path, module = left.pop()
        if (inside := unwrapped(module)) not in found:
            found[inside] = path
            holder = unwrapped(inside.base) if isinstance(inside, AdapterLayer) else inside
            children = [(f"{path}.{name}".strip("."), child) for name, child in holder.named_children()]
            left += children[::-1]
    return {path: module for module, path in found.items()}


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Path -> layer that carries adapters, in module order."""
    return {path: module for path, module in plain_modules(model).items() if isinstance(module, AdapterLayer)}


def adapters_of(model: nn.Module, name: str = DEFAULT) -> dict[str, Adapter]:
    """Path of its layer -> part of the adapter `name`, in module order; empty if the model carries none."""
    layers = adapter_layers(model).items()
    return {path: cast(Adapter, layer.adapters[name]) for path, layer in layers if name in layer.adapters}


def adapter_parameters(model: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """What an optimizer trains: the adapter's parameters as `path.parameter`, in module order."""
    parts = adapters_of(model, name).items()
    found = [(p, f"{path}.{own}") for path, part in parts for own, p in part.named_parameters()]
    first = {p: own for p, own in reversed(found)}  # two parts may share one
    return {own: p for p, own in found if first[p] == own}


def carried(model: nn.Module, name: str) -> dict[str, Adapter]:
    """As `adapters_of`; InputError if the model carries no adapter of that name."""
    if found := adapters_of(model, name):
        return found
    there = sorted({other for layer in adapter_layers(model).values() for other in layer.adapters})
    raise InputError(f"this model carries no adapter '{name}'; it carries {', '.join(there) or 'none at all'}")


def delta(model: nn.Module, name: str = DEFAULT) -> Iterator[tuple[str, Tensor]]:
    """Path and change of each weight that the adapter makes, fp32 (fp64 of fp64), one at a time and detached.

    As `named_parameters`: `dict(delta(model))` has all. Copies (`modules_to_save`, biases) are no changes of this kind.
    Raises InputError where there is no such adapter, NotImplementedError for a kind that does not say its change.
    """
    layers = adapter_layers(model)
    for path, adapter in carried(model, name).items():
        if not isinstance(adapter, Whole):
            yield path, adapter.delta(wide(cast(Tensor, layers[path].base.weight), layers[path].base)).detach()


def refuse_left_out(model: nn.Module, name: str = DEFAULT) -> None:
    """InputError if anything trains that no adapter of `model` holds, so that no file of an adapter would hold it."""
    held = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    if left := [plain_name(n) for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
        raise InputError(
            f"the adapter '{name}' does not hold all that trains: {', '.join(left[:4])} ({len(left)}). Attach with "
            "their modules in modules_to_save, freeze them (requires_grad_(False)), or remove_adapter and save_model"
        )


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each module's replacement wherever the model holds it; a layer used twice is replaced in both places.

    One that is compiled by itself gives up its wrapper, which would go on calling what it wrapped at first.
    """
    places = holders(model)
    for module, other in new.items():
        for parent, attribute in places.get(id(module), ()):
            setattr(parent, attribute, other)


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of each module inside the model -> the modules that hold it, wrapped or not, and the attribute."""
    found = defaultdict[int, list[tuple[nn.Module, str]]](list)
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found[id(unwrapped(child))].append((parent, attribute))
    return found


def refuse_second(model: nn.Module, name: str) -> None:
    """InputError for a name that no adapter can have, or that one of the model's has already."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter's name must be a word without dots that nn.ModuleDict can hold, got {name!r}")
    if adapters_of(model, name):
        raise InputError(
            f"this model already carries an adapter '{name}': give the new one another name, take the old one off "
            "(remove_adapter), or continue training it"
        )
