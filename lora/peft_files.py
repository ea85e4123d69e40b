"""Adapter files in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

What is read is untrusted: no pickle, no path out of the folder, keys and shapes checked before the model is touched.
What is written depends on the adapter and its base alone (sorted keys, no times), so equal ones give equal bytes.
"""

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import is_pruned

from ..errors import InputError
from ..files import COUNTS, disk_errors, float_tensors, misfits, read_json, regular_file, write_tensors, write_text
from ..outputs import check_apart
from ..settings import DType, floating
from .adalora import as_lora
from .adapter import Adapter, Whole
from .attach import LayerFactory, fresh, install, of_kind
from .config import LoRAConfig
from .dora import MAGNITUDE
from .identity import BaseIdentity, base_identity
from .init import Weights, started
from .layer import DEFAULT, adapters_of, carried, plain_name, refuse_left_out, replace_modules, unwrapped
from .linear4bit import Module4bit, NF4Linear, NF4LowRank
from .lora import OWN, LoRA, LoRAEmbedding, LoRAParameter, lora_kind
from .parameter4bit import StandIn
from .peft_config import kind_of, read_config, write_config
from .targets import Linear, adaptable_layers, base_modules, expose
from .tokens import TokenRows
from .vera import SHARED, join

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LOW_RANK = {"fourbit.part": "low-rank"}  # in the metadata of what belongs to the model beside it
PREFIX = "base_model.model."
LARGEST_CONFIG = 8 << 20  # bytes: room for the full paths of 100,000 layers


def adapter_state(model: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """All that the adapter trains under PEFT's keys, sorted: the live tensors, detached and not copied. Of one with a
    start A and B alone, without A0 and B0, where they began: both are in what `save_adapter` writes."""
    return _keyed(adapters_of(model, name))


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str = DEFAULT) -> None:
    """Copy `state` into the adapter of `model`, whose dtype and device stay. Keys with or without `base_model.model.`.

    Raises InputError, before anything is copied, for a key that is missing, unexpected or of another shape, naming it.
    """
    _copy_into(adapters_of(model, name), _canonical(state, _holders(model), "the adapter state"), "the adapter state")


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str = "", name: str = DEFAULT) -> None:
    """Write the adapter of `model` into `folder` in PEFT's format, with the identity of its base.

    `base_model` is recorded as the base's name, for PEFT: a folder by its whole path, a hub's name as it is, no file.
    Each file appears whole or not at all, in place of one that is there. Raises InputError for the folder of the model,
    or one in it, for a model without this adapter, with layers of several kinds in it, or with other parameters that
    train and would be left out (naming them); NumericError for NaN or infinity in it (naming the tensor; nothing is
    written); DiskError when the disk refuses. PEFT loads LoRA; an adapter of another kind it refuses."""
    parts = {path: part.plain() for path, part in carried(model, name).items()}
    refuse_left_out(model, name)
    check_apart(folder, f"the adapter's folder {folder}", [getattr(unwrapped(model), "source", "")], folder=True)
    folder, config = Path(folder), write_config(model, parts, base_model)
    write_tensors(folder / WEIGHTS, _keyed(parts), "the adapter", base_identity(model, parts).metadata())
    with disk_errors("the adapter", folder, len(config)):
        write_text(folder / CONFIG, config)


def save_low_rank(model: nn.Module, folder: Path) -> bool:
    """Whether NF4LowRank layers have low-rank parts; they are written into `folder`, as an adapter beside the codes."""
    layers = {path: layer for path, layer in base_modules(model).items() if isinstance(layer, NF4LowRank)}
    parts: dict[str, Adapter] = {}
    for path, layer in layers.items():
        part, pair = LoRA(layer, len(layer.A), len(layer.A)), (layer.A, layer.B)
        exact = all(torch.equal(factor.bfloat16(), factor) for factor in pair)  # as those that a merge has fitted
        parts[path] = part.of_factors(*pair).to(torch.bfloat16 if exact else layer.A.dtype)
    if parts:
        write_tensors(folder / WEIGHTS, _keyed(parts), "the low-rank parts", LOW_RANK)
        write_text(folder / CONFIG, write_config(model, parts, str(folder)))
    return bool(parts)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: DType | None = torch.float32,
    name: str = DEFAULT,
    layer: LayerFactory = of_kind,
    trainable: bool = True,
    force: bool = False,
    tell: Callable[[str], object] = warnings.warn,
    dense: Weights | None = None,
) -> list[str]:
    """Read a PEFT adapter folder into `model` under a name and return the paths of its layers in module order.

    A model without an adapter of this name gets it attached in `dtype`, or in the file's own dtype for None: as the
    active one, all else frozen, or, not `trainable`, frozen and inactive. A model that carries one keeps it, dtype
    included, and must have it on the same layers with the same rank and scale: the tensors are overwritten where they
    lie, so nothing compiles again. One that does not train (`train_only`) is a slot for plain LoRA: of its rank or less
    (the rest is zeros), of any scale (folded into B), on some of its layers. `layer`: as `attach` was given it.
    `tell` is given a sentence where the base is another 4-bit form of the one that the adapter was trained on, or has
    slightly other weights. An adapter of another base is refused unless `force`; one whose file does not say what it
    was trained on is taken, and by a model on meta each. One of 4-bit codes that its start made has them made again, of
    `dense`, as `attach` has it.
    Raises InputError, before the model is touched, for a file that is missing, broken or not plain LoRA, for keys that
    are missing, unexpected or misshaped, for NaN or infinity, and for another base."""
    label, parts, state = _read_adapter(model, Path(folder), None if dtype is None else floating(dtype), layer)
    trained, bases = trained_base(Path(folder)), base_modules(model)
    packed = [base for path in parts if isinstance(base := bases[path], NF4Linear) and not base.packed.is_meta]
    anew = trained is not None and trained.start and bool(packed)
    _check_base(model, parts, Path(folder), force, tell if not anew else lambda _: None)
    attached = adapters_of(model, name)
    if attached:
        state = _fitted(attached, parts, state, label)
    _check_finite(state, _keyed(attached or parts), label)
    _copy_into(attached or parts, state, label)
    if anew and trained is not None:
        parts, better = started(model, parts, trained.start, dense, lambda *_: None, saved=True)
        replace_modules(model, better)
        try:
            _check_base(model, parts, Path(folder), force, tell)
        except InputError:  # the dense weights are another model's
            replace_modules(model, {new: old for old, new in better.items()})
            raise
    if not attached:
        install(model, parts, name, trainable=trainable)
    return list(parts)


def trained_base(folder: Path) -> BaseIdentity | None:
    """The base that the adapter in `folder` was trained on; None where its file does not say. Errors as loading."""
    return BaseIdentity.read(adapter_file(folder, WEIGHTS))


def _check_base(
    model: nn.Module, parts: Mapping[str, Adapter], folder: Path, force: bool, tell: Callable[[str], object]
) -> None:
    """Tell how the model differs from the base of the adapter in `folder`; InputError for another base."""
    if (trained := trained_base(folder)) is None or any(p.is_meta for p in model.parameters()):
        return
    here, what = base_identity(model, parts), f"the adapter {folder}"
    if here.is_other_base(trained):
        what += " was trained on another base: this one has the same shapes and other weights"
        if not force:
            raise InputError(f"{what}. Give the base it was trained on, or force it (force=True)")
        tell(f"{what}; it goes on by force")
    elif difference := here.difference(trained):
        tell(f"{what} {difference}")


def _places(parts: Mapping[str, Any]) -> dict[str, str]:
    """Where PEFT has the parts, or those of these bases: at their paths, but of parameters at their module's, the last
    of those and each one before it within another `base_layer`."""
    places = {path: path for path in parts}
    parameters = {path: part.place for path, part in parts.items() if isinstance(part, StandIn | LoRAParameter)}
    for path, place in parameters.items():
        module = path.rpartition(".")[0]
        after = [1 for other, its in parameters.items() if other.rpartition(".")[0] == module and its > place]
        places[path] = module + ".base_layer" * len(after)
    return places


def _keyed(parts: Mapping[str, Adapter], places: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's keys, sorted."""
    state: dict[str, Tensor] = {}
    places = places or _places(parts)
    for own, part in parts.items():
        path = places[own]
        where = f"{PREFIX}{path}." if isinstance(part, Whole) else f"{PREFIX}{path}.base_layer."
        copies = part.copies.state_dict() if part.copies is not None else {}
        state |= {key if key in SHARED else f"{PREFIX}{path}.{key}": tensor for key, tensor in part.state().items()}
        state |= {where + key: tensor for key, tensor in copies.items()}
    return dict(sorted(state.items()))


@torch.no_grad()
def _copy_into(parts: Mapping[str, Adapter], state: Mapping[str, Tensor], label: str) -> None:
    """Copy tensors under PEFT's keys into an adapter; InputError, before that, unless they fit."""
    if any(is_parametrized(part) or is_pruned(part) for part in parts.values()):
        raise InputError(f"{label}: remove_parametrizations or prune.remove before loading: the adapter is computed")
    own = _keyed(parts)
    _compare({key: tensor.shape for key, tensor in own.items()}, state, label)
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _holders(model: nn.Module) -> set[str]:
    """Paths of what may carry a part of an adapter: modules with tensors of their own."""
    return {path for path, module in base_modules(model).items() if module._parameters}


def _read_adapter(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, layer: LayerFactory
) -> tuple[str, dict[str, Adapter], dict[str, Tensor]]:
    """What errors call the file, the adapter that it describes, its tensors by PEFT's key.

    Checked but for values and adapters the model carries; no more than a layer is made of what the config only claims.
    """
    file = adapter_file(folder, CONFIG)
    raw, weights = read_json(file, LARGEST_CONFIG), adapter_file(folder, WEIGHTS)
    label = f"'{weights}'"
    again = (".modules_to_save", ".original_module")  # PEFT's bias="all" puts what it saves whole there too
    read = float_tensors(weights, COUNTS)
    raw, read = as_lora(raw, read) if raw.get("peft_type") == "ADALORA" else (raw, read)
    config = read_config(raw, f"'{file}'")
    tensors = {key: tensor for key, tensor in read.items() if not key.rpartition(".")[0].endswith(again)}
    state = _canonical(tensors, _holders(model), label)
    names, parameters = config.targeted(model), expose(model, config.lora.target_parameters)
    if names is None:  # the file's own tensors say which layers are meant
        meant = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state}
        names = [name for name in adaptable_layers(model) if name in meant]
    if not (names := [*names, *parameters]):
        within = f" with layers_to_transform={[*config.layers_to_transform]}" if config.layers_to_transform else ""
        what = f"target_modules={config.lora.target!r}{within} names no layer of this model that takes LoRA"
        raise InputError(f"{label}: {what}")
    parts: dict[str, Adapter] = {}
    expected: dict[str, Sequence[int]] = {}
    modules = base_modules(model)
    places = {path: path for path in modules} | _places({path: modules[path] for path in names})
    where = {module: places[path] for path, module in modules.items()}

    def made(base: Linear, at: LoRAConfig) -> Adapter:
        kind = lora_kind(base) if config.kind in ("LORA", OWN) else None
        first = (kind.keys[0], kind.shapes(base, at.rank)[0]) if kind else ("vera_lambda_d", (at.rank,))
        if (kind or config.kind == "VERA") and at.rank > min(base.weight.shape):  # not as large as a config claims
            needed = {f"{PREFIX}{where[base]}.{first[0]}": first[1]}
            _compare(needed, {key: state[key] for key in needed.keys() & state.keys()}, label)
        return layer(base, at)

    for path, part in fresh(model, config.lora_for(model), names, made, 0, dtype or torch.float32):
        kinds = config.kind, "LORA" if config.kind == OWN else ""
        if not isinstance(part, Whole | TokenRows) and kind_of(part) not in kinds:
            if kind_of(part) == OWN:
                what = f"is PEFT's, which ignores the groups, dilation and padding mode that '{path}' has"
                raise InputError(f"'{file}' {what}: no weight of a base holds such a change, so train it anew here")
            what = f"holds an adapter of the kind {config.kind}, and layer= makes {kind_of(part)}"
            raise InputError(f"'{file}' {what}: give load_adapter the layer that it was attached with")
        shapes = {key: tensor.shape for key, tensor in _keyed({path: part}, places).items()}
        expected |= shapes
        if all(key in state and state[key].shape == shape for key, shape in shapes.items()):
            parts[path] = part
    join(parts)
    shared = {key: tensor for key, tensor in _keyed(parts, places).items() if key in SHARED}
    expected, state = expected | {key: t.shape for key, t in shared.items()}, shared | state  # or as its seed has it
    state = _without_base_copies(model, state, expected, label)
    _compare(expected, state, label)
    if dtype is None:
        dtypes = (tensor.dtype for key, tensor in state.items() if not key.endswith(MAGNITUDE))  # fp32 always
        dtype = functools.reduce(torch.promote_types, dtypes)
    return label, {path: part.to(dtype) for path, part in parts.items()}, state


def _without_base_copies(
    model: nn.Module, state: dict[str, Tensor], expected: Mapping[str, object], label: str
) -> dict[str, Tensor]:
    """Drop the whole base weights that PEFT saves beside adapters on an output head or of a resized vocabulary.

    InputError if one differs from the model's own: then it was trained or grown, and the adapter needs it."""
    modules = base_modules(model)
    adapter: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        path = path.removesuffix(".base_layer")
        if key in expected or name not in ("weight", "bias") or path not in modules:
            adapter[key] = tensor
            continue
        own, module = getattr(modules[path], name, None), modules[path]
        if isinstance(module, Module4bit) and name == "weight" and tensor.shape == module.shape:
            twin = module.empty(module.shape, module.quant_type, module.blocksize, module.double_quant)
            twin.quantize_weight_(tensor.to(module.dtype), name=key)
            tensor = twin.weight
        if not isinstance(own, Tensor) or not torch.equal(own, tensor.to(own)):
            raise InputError(
                f"{label}: the tensor '{key}' is a whole {name}, and it differs from this model's '{path}': it was "
                "trained or resized, or another base is meant. Merge the adapter into its own base with PEFT first."
            )
    return adapter


def adapter_file(folder: Path, name: str) -> Path:
    """The file `name` of an adapter in `folder`."""
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    return regular_file(folder, name, _instead(folder, name))


def _instead(folder: Path, name: str) -> str:
    """What lies there in place of the missing file, if a person can be told what to do about it."""
    pickled = folder / "adapter_model.bin"
    if name == WEIGHTS and pickled.exists():
        return (
            f" Its {pickled.name} is a pickle, which can run code and is never opened: load it with PEFT where you "
            "trust it, and save it again with save_pretrained(..., safe_serialization=True)."
        )
    inside = sorted(path.name for path in folder.iterdir() if (path / CONFIG).is_file())
    return f" PEFT puts an adapter that has a name into a subfolder: try {', '.join(inside[:8])}." if inside else ""


def _canonical(given: Mapping[str, Tensor], holders: Collection[str], label: str) -> dict[str, Tensor]:
    """The tensors by PEFT's keys. Those given may lack `base_model.model.`, and may have names of torch's wrappers (a
    model that was compiled, or trained in parallel); InputError if two mean the same."""
    plain = [plain_name(key) for key in given]
    ways = [[key.replace("module.", "", n).removeprefix(own) for key in plain] for n in (0, 1) for own in (PREFIX, "")]

    def known(names: Iterable[str]) -> int:  # a model may itself hold a path that starts like the prefix
        return len({key for key in names if any(key[:i] in holders for i, sign in enumerate(key) if sign == ".")})

    keys: dict[str, str] = {}
    for key, name in zip(given, max(ways, key=known), strict=True):
        if (own := key if key in SHARED else PREFIX + name) in keys:
            raise InputError(f"{label}: the keys '{keys[own]}' and '{key}' mean the same tensor")
        keys[own] = key
    return {own: given[key] for own, key in keys.items()}


def _compare(expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor], label: str) -> None:
    """InputError unless the tensors have these keys and shapes; it lists what is missing, unknown and misshaped."""
    if problems := misfits(expected, {key: tensor.shape for key, tensor in found.items()}):
        raise InputError(
            f"{label}: the adapter's tensors do not fit this model and its configuration. {problems} "
            "Is this the base model that the adapter was trained on?"
        )


def _fitted(
    attached: Mapping[str, Adapter], parts: Mapping[str, Adapter], state: Mapping[str, Tensor], label: str
) -> dict[str, Tensor]:
    """The file's tensors as the adapter on the model has them; InputError unless that has the layers, kinds, ranks and
    scales that the file says, or is a slot that they fit."""
    found, places = dict(state), _places(attached)
    trains = any(p.requires_grad for part in attached.values() for p in part.parameters())
    for path in parts.keys() | attached.keys():
        has, wants = attached.get(path), parts.get(path)
        if _described(has) == _described(wants):
            continue
        if trains or not _is_slot(has) or not (wants is None or (_is_slot(wants) and wants.rank <= has.rank)):
            raise InputError(
                f"{label}: on '{path}' the model has {_described(has)}, the file {_described(wants)}; load it into a "
                "fresh model instead, or into plain LoRA on all its layers, of that rank or more, that does not train "
                "(train_only)"
            )
        for key, tensor in has.state().items():
            full, padded = f"{PREFIX}{places[path]}.{key}", torch.zeros_like(tensor, dtype=torch.float32)
            if wants is not None:
                own = state[full].to(padded)
                padded[tuple(map(slice, own.shape))] = own if key == has.keys[0] else own * (wants.scale / has.scale)
            found[full] = padded
    return found


def _is_slot(part: Adapter | None) -> TypeGuard[LoRA]:
    if not isinstance(part, LoRA) or type(part) not in (LoRA, LoRAEmbedding):
        return False
    return part.copies is None and part.lora_A0 is None


def _described(part: Adapter | None) -> str:
    kind = f"rank {part.rank}, scale {part.scale:.9g}" if isinstance(part, LoRA) else f"a {type(part).__name__}"
    kind += " from a start of its own" if isinstance(part, LoRA) and part.lora_A0 is not None else ""
    kind += f" of {part.tokens}" if isinstance(part, TokenRows) else ""
    own = "" if part is None or part.copies is None else f" and its own {', '.join(part.copies.state_dict())}"
    return "no adapter" if part is None else kind + own


def _check_finite(state: Mapping[str, Tensor], own: Mapping[str, Tensor], label: str) -> None:
    for key, tensor in state.items():
        dtype = own[key].dtype
        if dtype.is_floating_point != tensor.is_floating_point() or not bool(torch.isfinite(tensor.to(dtype)).all()):
            raise InputError(f"{label}: the tensor '{key}' holds NaN, infinity or a number too large for {dtype}")
