"""What a step of fake tensors makes and lets go: storages by part, at the highest point of each phase.

A dispatch mode hears every op. Of what computes it gives tensors that hold nothing; a few numbers that are known (ids,
places, tables) are computed, as what shapes depend on. On "meta" attention takes CUDA's path.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import compute_elementwise_output_strides
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..lora.adapter import Adapter
from ..lora.linear4bit import Module4bit
from ..models.decoder import Decoder

# Of blocks that glibc keeps in its heap (below MAPPED, as `cli.main.give_memory_back` has it; the second where layers
# run again) a share of holes: an aligned block does not fit where one of its size was. Fitted, on cases that the log
# of 2026-11-30 names; they cannot be exact.
MAPPED, HOLES = (8 << 20, 1 << 20), 1.6
FEW_NUMBERS = 1 << 16  # of an op that computes: ids, places, tables
JOINS = torch.ops.aten.cat.default, torch.ops.aten.stack.default
NORM = torch.ops.aten.linalg_vector_norm.default
LIKE = torch.ops.aten.empty_like, torch.ops.aten.zeros_like, torch.ops.aten.ones_like
MADE: dict[Any, Any] = {}  # by op and shapes: what it returns, on meta, as each layer makes the same
MANY = 1 << 13  # of these, and they are forgotten
PARTS = ("base", "scales", "adapter", "gradients", "optimizer", "activations", "logits", "framework")
Bytes = dict[str, int]  # by part


class Storages(TorchDispatchMode):
    """Which storages live, by part, and how many there were of each at the highest point of each phase."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles a forecast, and what would skip it is torch._dynamo

    def __init__(self, vocabulary: int, meta: bool, mapped: int) -> None:
        super().__init__()
        self.meta, self.mapped, self.heap = meta, mapped, 0  # for a GPU; glibc's threshold; a measure of its heap
        self.vocabulary, self.part, self.phase, self.left, self.heads = vocabulary, "", "forward", 0, 0
        self.again = ""  # of passes after the first
        self.alive: dict[Any, tuple[str, int]] = {}
        self.unknown = set[Any]()  # those of `alive` that hold no numbers
        self.now, self.most, self.flops = Counter[str](), dict[str, Bytes](), 0.0

    def gradient(self, p: Any) -> None:
        """Called as a parameter has its gradient; from half of them on it is backward's end."""
        if (key := p.grad.untyped_storage()._cdata) in self.alive:
            part, size = self.alive[key]
            self.alive[key] = "gradients", size
            self.now.update({"gradients": size, part: -size} if part != "gradients" else {})
        self.left -= 1
        self.phase = f"backward{self.again}" if self.left > 0 else f"backward's end{self.again}"

    def add(self, tensor: Tensor, part: str, unknown: bool = True) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self.alive or tensor.is_meta != self.meta:
            return  # the latter is in the host's memory
        self.alive[key] = part, storage.nbytes()
        self.unknown |= {key} if unknown else set()
        self._count(part, storage.nbytes(), 1)
        finalize(storage, self._gone, key).atexit = False
        holes = round(HOLES * self.heap)
        if self.now.total() + holes > sum(self.most.get(self.phase, {}).values()):
            self.most[self.phase] = dict(self.now) | {"framework": holes}

    def _count(self, part: str, size: int, sign: int) -> None:
        self.now[part] += sign * size
        if not self.meta and size < self.mapped and part not in PARTS[:3]:
            self.heap += sign * (size * size // MAPPED[0])

    def _gone(self, key: Any) -> None:
        part, size = self.alive.pop(key)
        self._count(part, size, -1)
        if part == "logits" and not self.now[part] and self.phase.startswith("forward"):
            self.heads += 1  # what comes then, another pass perhaps, has a highest moment of its own
            self.phase = f"forward {self.heads}"
        self.unknown.discard(key)

    def _known(self, x: Tensor) -> bool:
        return not x.is_meta and x.untyped_storage()._cdata not in self.unknown

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What func returns: of views, and of a few numbers that are known, as it is; else a tensor without numbers.
        What it would write into has none from then on."""
        given = [*_tensors((*args, *kwargs.values()))]
        few = all(map(self._known, given)) and sum(x.numel() for x in given) <= FEW_NUMBERS
        if func is torch.ops.aten._local_scalar_dense.default and not few:
            return 1  # whether to skip an update, say: its state is made by then
        writes, views, returns = _said_of(func)
        written = [*_tensors(kwargs.get(name, args[i] if i < len(args) else None) for i, name in writes)]
        if views or returns < 0:
            made = func(*args, **kwargs)
            if views and isinstance(made, Tensor) and made.untyped_storage().nbytes() > 8 * FEW_NUMBERS:
                self.add(made, self.part or "activations")  # of memory that no op has made, as numpy's
            return made
        if written:
            if few:
                return func(*args, **kwargs)
            self.unknown |= self.alive.keys() & {x.untyped_storage()._cdata for x in written}
            return (written[0] if returns == 1 else tuple(written)) if returns else None
        where = kwargs.get("device") or ("meta" if any(x.is_meta for x in given) else "cpu")
        if func is torch.ops.aten.bincount.default and not few:  # of experts that nobody knows: each has as many
            size, n = kwargs.get("minlength", args[2] if len(args) > 2 else 0), given[0].numel()
            made = torch.full((size,), n // size, device=where)
            self.add(made, "activations", unknown=where == "meta")
            return made
        how = {n: "meta" if n == "device" else x for n, x in kwargs.items() if n not in ("generator", "pin_memory")}
        key = func, torch.get_default_dtype(), _described(args), _described([*how.items()])
        if key not in MADE:
            if len(MADE) > MANY:
                MADE.clear()
            MADE[key] = on_meta(func, *_mapped(partial(_like, device="meta"), (args, how)))
        few = few and sum(x.numel() for x in _tensors((MADE[key],))) <= FEW_NUMBERS
        made = func(*args, **kwargs) if few else _mapped(partial(_like, device=where), MADE[key])
        for x in _tensors((made,)):
            part = self.part or ("logits" if x.shape[-1:] == (self.vocabulary,) else "activations")
            self.add(x, part, unknown=not few)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::").rstrip("_") in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.flops += 2.0 * a.numel() * b.shape[-1]
        return self._made(func, args, kwargs or {})


@cache
def _said_of(func: Any) -> tuple[list[tuple[int, str]], bool, int]:
    """What an op's schema says: (place, name) of what it writes into, whether it gives views or changes a tensor's
    own shape, and how many tensors it returns; -1 where it returns anything else."""
    alias = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments) if a.alias_info]
    writes, returns = [(i, name) for i, name, info in alias if info.is_write], func._schema.returns
    views = bool(alias and not writes) or torch.Tag.inplace_view in func.tags
    return writes, views, len(returns) if all("Tensor" in str(r.type) for r in returns) else -1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the values, and in lists of them. (torch's trees take most of a forecast's time.)"""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with its tensors changed, as those of lists and dicts of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(change, one) for name, one in value.items()}
    return type(value)([_mapped(change, one) for one in value]) if isinstance(value, (list, tuple)) else value


def _described(value: Any) -> Any:
    """A key for a value: of tensors what can be known on meta."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return (*map(_described, value),) if isinstance(value, (list, tuple)) else (type(value), value)


def _like(x: Tensor, device: Any) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """func(*args, **kwargs) on meta tensors. torch's rules for elementwise ops, `cat`, `stack` and norms are Python
    that imports torch._dynamo, seconds and 43 MiB that training has no use for: shapes and strides answer for these."""
    given, strides = [*_tensors((*args, *kwargs.values()))], None
    pointwise = torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1
    if func in JOINS:
        some = [x for x in given if x.shape != (0,)] or given  # `cat` passes over the others
        shape, at = [*some[0].shape], [*args[1:], *kwargs.values(), 0][0]
        if func is JOINS[0]:
            shape[at] = sum(x.shape[at] for x in some)
        else:
            shape.insert(at % (len(shape) + 1), len(given))
    elif func is NORM:
        shape = [*given[0].sum(*args[2:4]).shape]
    elif given and (pointwise or func.overloadpacket in LIKE) and "memory_format" not in kwargs:
        shape = [*torch.broadcast_shapes(*(x.shape for x in given))]
        strides = compute_elementwise_output_strides(*(x.expand(shape) for x in given))
    else:
        return func(*args, **kwargs)
    alone = {n: "cpu" if n == "device" else x for n, x in kwargs.items()}
    dtype = func(*_mapped(_one, args), **_mapped(_one, alone)).dtype
    made = torch.empty(shape, dtype=dtype, device="meta")
    return made if strides is None else made.as_strided(shape, strides)


def _one(x: Tensor) -> Tensor:
    return torch.ones([min(1, n) for n in x.shape], dtype=x.dtype)


class Flash(TorchFunctionMode):
    """Attention as CUDA does it: meta tensors would take the definition, with a matrix of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args[:3], 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]
        if func is Tensor.backward:  # layers run again in it, and what a mode hears runs without the mode
            with self:
                ones = (torch.ones_like(args[0]),)
                return _engine_run_backward(
                    args[:1], ones, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        return func(*args, **(kwargs or {}))


def parts_of(model: nn.Module) -> dict[int, str]:
    """Which part of the bytes each parameter and buffer is, by identity."""
    own = {id(t): "base" for t in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        if isinstance(module, Module4bit):
            own |= {id(p): "base" if n == "packed" else "scales" for n, p in module.stored_parameters().items()}
        if isinstance(module, Adapter):
            own |= {id(t): "adapter" for t in [*module.parameters(), *module.buffers()]}
    return own


def fake_model(model: nn.Module, device: str, layers: int | None = None) -> Any:
    """The model of tensors that nobody has filled, with its first so many layers."""
    memo = dict[int, Any]()
    every = model.model.layers if layers is not None and isinstance(model, Decoder) else nn.ModuleList()
    kept = {id(module) for layer in every[:layers] for module in layer.modules()}  # which layers may share
    left = {id(module) for layer in every[layers:] for module in layer.modules()} - kept
    for module in model.modules():
        for own in [*module.parameters(recurse=False), *module.buffers(recurse=False)] * (id(module) not in left):
            if id(own) not in memo:
                fake = torch.empty(own.shape, dtype=own.dtype, device=device)
                memo[id(own)] = nn.Parameter(fake, own.requires_grad) if isinstance(own, nn.Parameter) else fake
    if every:
        memo[id(every)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in every[:layers])
    return copy.deepcopy(model, memo)
