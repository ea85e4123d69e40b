"""Adapter files in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

What is read is untrusted: no pickle, no path out of the folder, keys and shapes checked before the model is touched.
What is written depends on the adapter alone (sorted keys, no times), so equal adapters give equal bytes.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import DiskError, InputError, NumericError
from .attach import Slot, install, lora_modules, plan
from .config import LoRAConfig
from .linear import LoRALinear, scale_of
from .peft_config import PeftConfig, read_config, write_config
from .safe_files import float_tensors, regular_file, write_whole
from .snapshot import Factors, Snapshot
from .targets import Linear, base_modules, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_CONFIG = 8 << 20  # bytes: room for the full paths of 100,000 layers


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every A [r, in] and B [out, r] under PEFT's key, sorted: the live parameters, detached and not copied."""
    state = {}
    for name, module in sorted(lora_modules(model).items()):
        state[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.detach()
        state[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.detach()
    return state


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the adapters of `model`, whose dtype and device stay. Keys with or without `base_model.model.`.

    Raises InputError, before anything is copied, for a key that is missing, unexpected or of another shape, naming it.
    """
    parameters = adapter_state(model)
    keys = _canonical(state, linear_layers(model), "the adapter state")
    expected = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    _compare(expected, {key: tuple(state[given].shape) for key, given in keys.items()}, "the adapter state")
    for key, given in keys.items():
        parameters[key].copy_(state[given])


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str = "") -> None:
    """Write the adapters of `model` into `folder` in PEFT's format; `base_model` is recorded as the base's name.

    Each file appears whole or not at all. Raises InputError for a model without adapters, NumericError for NaN or
    infinity in an adapter (naming the tensor; nothing is written), DiskError when the disk refuses.
    """
    modules = lora_modules(model)
    if not modules:
        raise InputError("save_adapter found no adapter in this model: attach one first")
    state = {key: tensor.cpu().contiguous() for key, tensor in adapter_state(model).items()}
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(f"the adapter tensor '{key}' holds NaN or infinity, so it was not saved")
    config = write_config(model, modules, base_model).encode()
    size = sum(tensor.nbytes for tensor in state.values()) + len(config)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, lambda path: path.write_bytes(config))
    except (OSError, SafetensorError) as problem:
        raise DiskError(f"could not write the adapter ({size:,} bytes) to '{folder}': {problem}") from problem


def load_adapter(model: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> list[str]:
    """Read a PEFT adapter folder into `model` and return the paths of its layers in module order.

    A model without adapters gets them attached (all else is frozen), in `dtype`, or in the file's own dtype for None. A
    model that carries adapters keeps them, dtype included, and must have them on the same layers with the same rank and
    scale.
    Raises InputError, before the model is touched, for a file that is missing, broken or not plain LoRA, for keys that
    are missing, unexpected or misshaped, and for NaN or infinity.
    """
    file = _read_adapter(model, Path(folder))
    names = list(file.slots)
    attached = lora_modules(model)
    if attached:
        _check_same(attached, file.slots, file.config, file.label)
        dtype = attached[names[0]].lora_A.dtype
    dtype = dtype or functools.reduce(torch.promote_types, (tensor.dtype for tensor in file.state.values()))
    _check_finite(file.state, dtype, file.label)
    if not attached:
        install(model, file.slots, file.config, seed=0, dtype=dtype)
    load_adapter_state(model, file.state)
    return names


def read_snapshot(model: nn.Module, folder: str | Path) -> Snapshot:
    """Read a PEFT adapter folder for `adapter_swapped`: `model`, which carries another adapter, stays as it is.

    The factors take dtype and device of the model's own adapter; rank, scale and layers may differ from it.
    Raises InputError for whatever `load_adapter` refuses, and for layers on which the model carries no adapter: only
    there can another one take its place.
    """
    file = _read_adapter(model, Path(folder))
    attached = lora_modules(model)
    if bare := [name for name in file.slots if name not in attached]:
        targets = ",".join(dict.fromkeys(name.rpartition(".")[2] for name in file.slots))
        raise InputError(
            f"{file.label} adapts {len(bare)} layers on which the model carries no adapter of its own, such as "
            f"'{bare[0]}': give the model's adapter these targets as well: {targets}"
        )
    _check_finite(file.state, attached[next(iter(file.slots))].lora_A.dtype, file.label)
    return Snapshot({name: _factors(file, name, attached[name]) for name in file.slots})


@dataclass(frozen=True)
class _AdapterFile:
    """An adapter folder that fits a model: each layer's rank and alpha, the settings, the tensors as in the file."""

    label: str  # what errors call it
    slots: dict[str, Slot]  # in module order
    config: LoRAConfig
    state: dict[str, Tensor]  # by PEFT's key


def _read_adapter(model: nn.Module, folder: Path) -> _AdapterFile:
    """Everything that can be checked without regard to adapters the model carries; values are not looked at yet."""
    config = _read_config(folder)
    weights = _adapter_file(folder, WEIGHTS)
    label = f"'{weights}'"
    state = _without_base_copies(model, float_tensors(weights), label)
    layers = linear_layers(model)
    keys = _canonical(state, layers, label)
    names = config.targeted(model)
    if names is None:  # a pattern too costly to trust: the file's own tensors say which layers are meant
        meant = {_module_of(key) for key in keys}
        names = [name for name in layers if PREFIX + name in meant]
    if not names:
        raise InputError(f"{label}: target_modules={config.lora.target!r} names no linear layer of this model")
    slots = plan(model, config.lora, names)
    _compare(_shapes(slots, layers), {key: tuple(state[given].shape) for key, given in keys.items()}, label)
    return _AdapterFile(label, slots, config.lora, {key: state[given] for key, given in keys.items()})


def _factors(file: _AdapterFile, name: str, like: LoRALinear) -> Factors:
    """One layer of the file on the device and in the dtype of another adapter; a copy, apart from the file's map."""
    a, b = (
        file.state[f"{PREFIX}{name}.{half}.weight"].to(parameter.device, parameter.dtype, copy=True)
        for half, parameter in (("lora_A", like.lora_A), ("lora_B", like.lora_B))
    )
    return Factors(a, b, file.slots[name].alpha, file.config.rslora)


def _read_config(folder: Path) -> PeftConfig:
    file = _adapter_file(folder, CONFIG)
    if file.stat().st_size > LARGEST_CONFIG:
        raise InputError(
            f"'{file}' has {file.stat().st_size:,} bytes; an adapter config has at most {LARGEST_CONFIG:,}"
        )
    try:
        return read_config(file.read_text(encoding="utf-8"), f"'{file}'")
    except UnicodeDecodeError as problem:
        raise InputError(f"'{file}' is not UTF-8 text: {problem}") from None


def _without_base_copies(model: nn.Module, state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Drop the whole base weights that PEFT saves beside adapters on an output head or of a resized vocabulary.

    InputError if one differs from the model's own: then it was trained or grown, and the adapter needs it.
    """
    modules = base_modules(model)
    adapter: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        if not key.endswith(".weight") or ".lora_" in key or path not in modules:
            adapter[key] = tensor
            continue
        own = getattr(modules[path], "weight", None)
        if not isinstance(own, Tensor) or not torch.equal(own, tensor.to(own)):
            raise InputError(
                f"{label}: the tensor '{key}' is a whole weight, and it differs from this model's '{path}': it was "
                "trained or resized, or another base is meant. Merge the adapter into its own base with PEFT first."
            )
    return adapter


def _adapter_file(folder: Path, name: str) -> Path:
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


def _canonical(given: Iterable[str], layers: Mapping[str, object], label: str) -> dict[str, str]:
    """PEFT's key -> the key given, which may lack `base_model.model.`; InputError if two mean the same."""
    given = list(given)
    prefixed = all(key.startswith(PREFIX) and _module_of(key.removeprefix(PREFIX)) in layers for key in given)
    keys: dict[str, str] = {}
    for key in given:
        # a model may itself hold a path that starts like the prefix
        has_prefix = key.startswith(PREFIX) and (prefixed or _module_of(key) not in layers)
        canonical = key if has_prefix else PREFIX + key
        if canonical in keys:
            raise InputError(f"{label}: the keys '{keys[canonical]}' and '{key}' mean the same tensor")
        keys[canonical] = key
    return keys


def _module_of(key: str) -> str:
    """The path in front of the last `.lora_`; names that hold "lora" or "weight" themselves stay whole."""
    return key.rpartition(".lora_")[0]


def _shapes(slots: Mapping[str, Slot], layers: Mapping[str, Linear]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, slot in slots.items():
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (slot.rank, layers[name].in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (layers[name].out_features, slot.rank)
    return shapes


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], label: str) -> None:
    """InputError unless both have the same keys and shapes; it lists what is missing, unexpected and misshaped."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    wrong = [
        f"{key} must be {list(expected[key])}, got {list(found[key])}"
        for key in expected
        if key in found and expected[key] != found[key]
    ]
    lists = [(missing, "missing"), (extra, "without a place in this model"), (wrong, "of another shape")]
    if any(keys for keys, _ in lists):
        parts = [
            f"{len(keys)} {what}: {'; '.join(keys[:6])}{'; ...' if len(keys) > 6 else ''}"
            for keys, what in lists
            if keys
        ]
        raise InputError(
            f"{label}: the adapter's tensors do not fit this model and its configuration. {'. '.join(parts)}. "
            "Is this the base model that the adapter was trained on?"
        )


def _check_same(attached: Mapping[str, LoRALinear], slots: Mapping[str, Slot], config: LoRAConfig, label: str) -> None:
    """InputError unless the adapters on the model have the ranks and scales that the file says."""
    for name in slots.keys() | attached.keys():
        here = attached.get(name)
        there = scale_of(slots[name].alpha, slots[name].rank, config.rslora) if name in slots else None
        if (
            here is None
            or there is None
            or not math.isclose(here.scale, there, rel_tol=1e-9)
            or here.rank != slots[name].rank
        ):
            has = "no adapter" if here is None else f"rank {here.rank}, scale {here.scale:g}"
            wants = "no adapter" if there is None else f"rank {slots[name].rank}, scale {there:g}"
            raise InputError(
                f"{label}: on '{name}' the model has {has}, the file {wants}; load it into a fresh model instead"
            )


def _check_finite(state: Mapping[str, Tensor], dtype: torch.dtype, label: str) -> None:
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor.to(dtype)).all()):
            raise InputError(f"{label}: the tensor '{key}' holds NaN, infinity or a number too large for {dtype}")
