"""The kinds of adapters; attach them to layers of any module, with copies of what else is trained of their modules."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ..errors import InputError
from ..settings import DType, floating
from .active import train_only, use
from .adalora import AdaLoRA
from .adapter import Adapter, Copies, Course, Whole
from .config import LoRAConfig
from .dora import DoRA
from .ia3 import IA3
from .init import Tell, Weights, eva, started
from .layer import DEFAULT, AdapterLayer, adapter_layers, adapters_of, refuse_second, replace_modules
from .linear4bit import Module4bit, NF4Embedding, NF4Linear
from .lora import LoRA, LoRAFA, is_linear
from .parameter4bit import StandIn
from .peft_config import PeftConfig, PeftLike, from_peft
from .targets import base_modules, check_patterns_used, expose, matcher, nearest, resolve
from .tokens import token_rows
from .vera import VeRA, join

LayerFactory = Callable[[nn.Linear | NF4Linear, LoRAConfig], Adapter]
KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "dora": DoRA, "lora-fa": LoRAFA, "ia3": IA3, "adalora": AdaLoRA,
                                   "vera": VeRA}  # fmt: skip
UNCOPIED: dict[type | tuple[type, ...], str] = {  # what modules_to_save cannot train -> why, and what to do
    Module4bit: "are in 4 bits and cannot be trained: leave them dense (skip in quantize_)",
    (nn.ParameterList, nn.ParameterDict): "are read, not called: register their parameters in the module around",
}


def of_kind(base: nn.Module, config: LoRAConfig) -> Adapter:
    """An adapter of the kind that `config` says, for that layer. InputError for one that no such kind changes."""
    if config.kind != "lora" and not is_linear(base):
        raise InputError(f"kind={config.kind!r} changes linear layers, and target names a {type(base).__name__} too")
    return KINDS[config.kind].of(base, config)


def courses(model: nn.Module, trained: Iterable[nn.Parameter], steps: int | None) -> list[Course]:
    """What a run of `steps` does with each adapter that holds some of these parameters, besides moving them."""
    ids, names = {id(p) for p in trained}, {n for layer in adapter_layers(model).values() for n in layer.adapters}
    found: list[Course | None] = []
    for parts in (adapters_of(model, name).values() for name in sorted(names)):
        own = [part for part in parts if any(id(parameter) in ids for parameter in part.parameters())]
        kinds: dict[type[Adapter], None] = dict.fromkeys(map(type, own))
        found += [kind.course([part for part in own if type(part) is kind], steps) for kind in kinds]
    return [course for course in found if course is not None]


def attach(
    model: nn.Module,
    config: LoRAConfig | PeftLike | Mapping[str, object],
    name: str = DEFAULT,
    *,
    layer: LayerFactory = of_kind,
    seed: int | None = None,
    dtype: DType = torch.float32,
    dense: Weights | None = None,
    data: Iterable[object] | None = None,
    tell: Tell = lambda *_: None,
) -> list[str]:
    """Put an adapter on the targeted layers of `model`, in place; freeze all else; return their paths in module order,
    with those of what `modules_to_save`, `train_tokens` and `bias` train.

    config: ours, or peft's LoraConfig or a dict of it. layer: makes each layer's part of its base and the config of
    that layer (its rank and alpha), as a class of one's own does; by default of the kind that the config says.
    Each part starts from torch's generator or, with a `seed`, from that and its own path alone, on every device the
    same if it draws on the CPU. Adapters and copies are fp32 masters unless `dtype` says otherwise. The new one is
    active.
    For a start: dense: (name, dense weight) of 4-bit layers, as `read_weights` has them; tell: is given the path of
    each, |W - (W4 + s B A)| / |W|, and that before; data: for "eva", unpadded batches that the model is called with.
    Raises InputError for an entry or a pattern that matches nothing, a tied or 4-bit weight or a ParameterList in
    `modules_to_save`, an embedding that another is tied to (a tied head keeps the base's weight), a model that carries
    an adapter of this name already; the model is left untouched then."""
    read = PeftConfig(config) if isinstance(config, LoRAConfig) else from_peft(config)
    lora = read.lora_for(model)
    found = resolve(model, lora)
    paths = [path for path in found if read.in_layers(path)] + expose(model, lora.target_parameters)
    if found and not paths:
        what = f"layers_to_transform={[*read.layers_to_transform]} leaves none of {', '.join(found[:4])} ({len(found)})"
        raise InputError(f"{what}: give whole paths in target_modules in its place")
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        check_patterns_used(field, patterns, paths)
    for entry in [lora.feedforward] if isinstance(lora.feedforward, str) else lora.feedforward:
        if not any(map(matcher(entry if entry is lora.feedforward else [entry]), paths)):
            what = f"feedforward entry {entry!r} matches none of the {len(paths)} targeted layers"
            raise InputError(f"{what}, of which it scales the input.{nearest(entry, paths)}")
    tables = {path: m for path, m in base_modules(model).items() if isinstance(m, nn.Embedding | NF4Embedding)}
    _refuse_tied(tables, {path: ["weight", "packed"] for path in paths if path in tables})
    refuse_second(model, name)
    lora, first = eva(model, lora, paths, data) if lora.start == "eva" else (lora, {})
    paths = list(first) or paths
    parts = dict(fresh(model, lora, paths, layer, seed, floating(dtype)))
    join(parts)
    if wrong := [p for p in paths if lora.start != "default" and type(parts[p]) not in (LoRA, Whole)]:
        raise InputError(f"start={lora.start!r} is for LoRA on linear layers, and '{wrong[0]}' is none: exclude it")
    for path, A in first.items():
        cast(LoRA, parts[path]).lora_A.data.copy_(A)
    if lora.start not in ("default", "eva"):
        parts, bases = started(model, parts, lora.start, dense, tell)
        replace_modules(model, bases)
    install(model, parts, name)
    return list(parts)


def fresh(
    model: nn.Module, config: LoRAConfig, paths: list[str], layer: LayerFactory, seed: int | None, dtype: torch.dtype
) -> Iterator[tuple[str, Adapter]]:
    """What `config` describes, with adapters on these paths: layer by layer, in module order. Errors as `attach`."""
    modules = base_modules(model)
    copied = _whole(modules, config.modules_to_save)
    targeted = set(paths) - copied.keys()
    if not targeted:
        raise InputError(f"modules_to_save={config.modules_to_save!r} leaves nothing of target={config.target!r}")
    for path in modules.keys() - copied.keys() if config.bias != "none" else ():
        if modules[path]._parameters.get("bias") is not None and (config.bias == "all" or path in targeted):
            copied[path] = ["bias"]
    _refuse_tied(modules, copied)
    rows = token_rows(model, config.train_tokens) if config.train_tokens else {}
    if twice := [path for path in rows if path in targeted or copied.get(path, ["bias"]) != ["bias"]]:
        raise InputError(f"'{twice[0]}' is in target or modules_to_save too: train_tokens must have it alone")
    for path in [path for path in modules if path in targeted | copied.keys() | rows.keys()]:
        if any(parameter.is_complex() for parameter in modules[path].parameters(recurse=False)):
            raise InputError(f"'{path}' is complex, and adapters and their files are real: exclude it")
        at = replace(config, rank=config.rank_at(path), alpha=config.alpha_at(path), rank_pattern={}, alpha_pattern={})
        at = replace(at, feedforward=at.feedforward if matcher(at.feedforward)(path) else ())
        kind = LoRA.of if isinstance(modules[path], StandIn) and at.kind == "lora" else layer
        part = _made(kind, modules[path], at, path, seed) if path in targeted else rows.get(path) or Whole()
        part = part.to(dtype) if {p.dtype for p in part.parameters()} - {dtype} else part
        part.config, part.copies = at, Copies(modules[path], copied[path], dtype) if path in copied else None
        yield path, part


def _made(layer: LayerFactory, base: nn.Module, config: LoRAConfig, path: str, seed: int | None) -> Adapter:
    """One layer's part; with a seed, from a CPU random stream that depends on that and the path alone."""
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            digest = hashlib.sha256(f"{seed}\n{path}".encode()).hexdigest()
            torch.default_generator.manual_seed(int(digest[:16], 16) >> 1)
        return layer(base, config)  # type: ignore[arg-type]  # what is targeted is linear, mostly


def _whole(modules: Mapping[str, nn.Module], entries: Iterable[str]) -> dict[str, list[str]]:
    """Path -> names of its own tensors, for each module that `modules_to_save` means or that lies in one of those."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        tops = [f"{path}." for path in filter(matcher([entry]), modules)]
        inside = {path: module for path, module in modules.items() if f"{path}.".startswith((*tops,))}
        own = {path: [n for n in m.state_dict() if n in m._parameters | m._buffers] for path, m in inside.items()}
        if not any(own.values()):
            what = "names nothing that can be trained" if tops else "matches no module"
            raise InputError(f"modules_to_save entry {entry!r} {what}.{nearest(entry, filter(None, modules))}")
        for kinds, rule in UNCOPIED.items():
            if wrong := [path for path, module in inside.items() if isinstance(module, kinds)]:
                raise InputError(f"modules_to_save entry {entry!r}: {', '.join(wrong[:4])} {rule}")
        found |= {path: names for path, names in own.items() if names}
    return found


def _refuse_tied(modules: Mapping[str, nn.Module], copied: Mapping[str, Iterable[str]]) -> None:
    """InputError if a tensor to be trained has a second place, where it would stay what it is, or drift apart."""
    copies = {id(modules[path]._parameters.get(n)): f"{path}.{n}" for path, names in copied.items() for n in names}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and copies.get(id(parameter), own := f"{path}.{name}") != own:
                raise InputError(
                    f"'{copies[id(parameter)]}' and '{own}' are one tied tensor, and trained copies would drift apart: "
                    f"untie them before, with module.{name} = torch.nn.Parameter(module.{name}.detach().clone())"
                )


def install(model: nn.Module, adapters: Mapping[str, Adapter], name: str = DEFAULT, *, trainable: bool = True) -> None:
    """Put each adapter on the module of its path, wherever the model holds that.

    trainable: it becomes the active adapter, and all else is frozen; otherwise it is frozen itself and waits for `use`.
    InputError, before anything is changed, for a name that is taken or that no adapter can have, and for a model that
    is itself the layer."""
    refuse_second(model, name)
    if "" in adapters:
        raise InputError(f"this {type(model).__name__} is a layer itself, which cannot be replaced in place: wrap it")
    layers = base_modules(model)
    there = adapter_layers(model)
    new: dict[nn.Module, AdapterLayer] = {layers[p]: AdapterLayer(layers[p]) for p in adapters if p not in there}
    for path, adapter in adapters.items():
        layer = there.get(path) or new[layers[path]]
        layer.adapters[name] = (adapter if trainable else adapter.freeze()).train(layer.training)
    replace_modules(model, new)
    if trainable:
        train_only(model, name)
        use(model, name)
