"""Adapter files in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

What is read is untrusted: no pickle, no path out of the folder, keys and shapes checked before the model is touched.
What is written depends on the adapter and its base alone (sorted keys, no times), so equal ones give equal bytes.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import InputError
from ..files import (
    disk_errors,
    float_tensors,
    misfits,
    read_json,
    regular_file,
    tensor_metadata,
    write_tensors,
    write_text,
)
from ..outputs import check_apart
from .adapter import DEFAULT, Adapter, adapters_of, plain_name, unwrapped
from .attach import fresh, install
from .config import LoRAConfig
from .identity import BaseIdentity, base_identity
from .linear4bit import sizes
from .lora import LoRA, scale_of
from .peft_config import read_config, write_config
from .targets import base_modules, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_CONFIG = 8 << 20  # bytes: room for the full paths of 100,000 layers


def adapter_state(model: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, sorted: the live parameters, detached and not copied."""
    return _keyed(adapters_of(model, name))


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str = DEFAULT) -> None:
    """Copy `state` into the adapter of `model`, whose dtype and device stay. Keys with or without `base_model.model.`.

    Raises InputError, before anything is copied, for a key that is missing, unexpected or of another shape, naming it.
    """
    parameters = adapter_state(model, name)
    if any(is_parametrized(part) for part in adapters_of(model, name).values()):
        raise InputError(
            f"the adapter '{name}' is made of other tensors: remove_parametrizations before loading into it"
        )
    keys = _canonical(state, linear_layers(model), "the adapter state")
    shapes = {key: tensor.shape for key, tensor in parameters.items()}
    _compare(shapes, {key: state[given] for key, given in keys.items()}, "the adapter state")
    for key, given in keys.items():
        parameters[key].copy_(state[given])


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str = "", name: str = DEFAULT) -> None:
    """Write the adapter of `model` into `folder` in PEFT's format, with the identity of its base.

    `base_model` is recorded as the base's name, for PEFT: a folder by its whole path, a hub's name as it is, no file.
    Each file appears whole or not at all, in place of one that is there. Raises InputError for the folder of the model,
    or one in it, and for a model without this adapter or with one of a kind other than LoRA; NumericError for NaN or
    infinity in it (naming the tensor; nothing is written); DiskError when the disk refuses.
    """
    parts = adapters_of(model, name)
    if not parts:
        raise InputError(f"save_adapter found no adapter '{name}' in this model: attach one first")
    if kinds := sorted({type(part).__name__ for part in parts.values() if not isinstance(part, LoRA)}):
        what = f"the adapter '{name}' is of the kind {', '.join(kinds)}"
        raise InputError(f"an adapter file holds LoRA, and {what}: keep its tensors (adapter_state) instead")
    check_apart(folder, f"the adapter's folder {folder}", [getattr(unwrapped(model), "source", "")], folder=True)
    folder, config = Path(folder), write_config(model, parts, base_model)
    write_tensors(folder / WEIGHTS, _keyed(parts), "the adapter", base_identity(model).metadata())
    with disk_errors("the adapter", folder, len(config)):
        write_text(folder / CONFIG, config)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    name: str = DEFAULT,
    trainable: bool = True,
    force: bool = False,
    tell: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """Read a PEFT adapter folder into `model` under a name and return the paths of its layers in module order.

    A model without an adapter of this name gets it attached in `dtype`, or in the file's own dtype for None: as the
    active one, all else frozen, or, not `trainable`, frozen and inactive. A model that carries one keeps it, dtype
    included, and must have it on the same layers with the same rank and scale.
    `tell` is given a sentence where the base is another 4-bit form of the one that the adapter was trained on, or has
    slightly other weights. An adapter of another base is refused unless `force`; one whose file does not say what it
    was trained on is taken.
    Raises InputError, before the model is touched, for a file that is missing, broken or not plain LoRA, for keys that
    are missing, unexpected or misshaped, for NaN or infinity, and for another base.
    """
    label, config, paths, state = _read_adapter(model, Path(folder))
    _check_base(model, Path(folder), force, tell)
    attached = adapters_of(model, name)
    if attached:
        _check_same(attached, config, paths, label)
    dtype = next(iter(adapter_state(model, name).values())).dtype if attached else dtype
    dtype = dtype or functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    _check_finite(state, dtype, label)
    if not attached:
        install(model, fresh(model, config, paths, seed=0, dtype=dtype), name, trainable=trainable)
    load_adapter_state(model, state, name)
    return paths


def trained_base(folder: Path) -> BaseIdentity | None:
    """The base that the adapter in `folder` was trained on; None where its file does not say. Errors as loading."""
    file = _adapter_file(folder, WEIGHTS)
    try:
        return BaseIdentity.read(tensor_metadata(file))
    except InputError as problem:
        raise InputError(f"'{file}': {problem}") from None


def _check_base(model: nn.Module, folder: Path, force: bool, tell: Callable[[str], object]) -> None:
    """Tell how the model differs from the base of the adapter in `folder`; InputError for another base."""
    if (trained := trained_base(folder)) is None:
        return
    here, what = base_identity(model), f"the adapter {folder}"
    if here.is_other_base(trained):
        what += " was trained on another base: this one has the same shapes and other weights"
        if not force:
            raise InputError(f"{what}. Give the base it was trained on, or force it (--force, force=True)")
        tell(f"{what}; it goes on by force")
    elif difference := here.difference(trained):
        tell(f"{what} {difference}")


def _keyed(parts: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's keys, sorted."""
    state = {f"{PREFIX}{path}.{key}": tensor for path, part in parts.items() for key, tensor in part.state().items()}
    return dict(sorted(state.items()))


def _read_adapter(model: nn.Module, folder: Path) -> tuple[str, LoRAConfig, list[str], dict[str, Tensor]]:
    """What errors call the file, its settings, the paths of the layers it means, its tensors by PEFT's key.

    Checked but for values and adapters the model carries; nothing is made for what the config only claims.
    """
    file = _adapter_file(folder, CONFIG)
    config = read_config(read_json(file, LARGEST_CONFIG), f"'{file}'")
    weights = _adapter_file(folder, WEIGHTS)
    label = f"'{weights}'"
    state = _without_base_copies(model, float_tensors(weights), label)
    layers = linear_layers(model)
    keys = _canonical(state, layers, label)
    names = config.targeted(model)
    if names is None:  # the file's own tensors say which layers are meant
        meant = {_module_of(key) for key in keys}
        names = [name for name in layers if PREFIX + name in meant]
    if not names:
        raise InputError(f"{label}: target_modules={config.lora.target!r} names no linear layer of this model")
    expected: dict[str, Sequence[int]] = {}
    for path in names:
        rank, (in_features, out_features) = config.lora.rank_at(path), sizes(layers[path])
        expected[f"{PREFIX}{path}.lora_A.weight"] = (rank, in_features)
        expected[f"{PREFIX}{path}.lora_B.weight"] = (out_features, rank)
    found = {key: state[given] for key, given in keys.items()}
    _compare(expected, found, label)
    return label, config.lora, names, found


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
    """PEFT's key -> the key given, which may lack `base_model.model.`, and may have names of torch's wrappers (a model
    that was compiled, or trained in parallel); InputError if two mean the same."""
    plain = {key: _without_wrappers(key, layers) for key in given}
    prefixed = all(key.startswith(PREFIX) and _module_of(key.removeprefix(PREFIX)) in layers for key in plain.values())
    keys: dict[str, str] = {}
    for name, key in plain.items():
        # a model may itself hold a path that starts like the prefix
        has_prefix = key.startswith(PREFIX) and (prefixed or _module_of(key) not in layers)
        canonical = key if has_prefix else PREFIX + key
        if canonical in keys:
            raise InputError(f"{label}: the keys '{keys[canonical]}' and '{key}' mean the same tensor")
        keys[canonical] = name
    return keys


def _without_wrappers(key: str, layers: Mapping[str, object]) -> str:
    """The key less what torch.compile and DDP put into it, where it names no layer as it is."""
    plain = plain_name(key)
    without = plain.replace("module.", "", 1)
    names = [_module_of(name).removeprefix(PREFIX) for name in (plain, without)]
    return without if names[0] not in layers and names[1] in layers else plain


def _module_of(key: str) -> str:
    """The path in front of the last `.lora_`; names that hold "lora" or "weight" themselves stay whole."""
    return key.rpartition(".lora_")[0]


def _compare(expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor], label: str) -> None:
    """InputError unless the tensors have these keys and shapes; it lists what is missing, unknown and misshaped."""
    if problems := misfits(expected, {key: tensor.shape for key, tensor in found.items()}):
        raise InputError(
            f"{label}: the adapter's tensors do not fit this model and its configuration. {problems} "
            "Is this the base model that the adapter was trained on?"
        )


def _check_same(attached: Mapping[str, Adapter], config: LoRAConfig, paths: Sequence[str], label: str) -> None:
    """InputError unless the adapter on the model has the layers, ranks and scales that the file says."""
    file = {path: _of_rank(config.rank_at(path), config.alpha_at(path), config.rslora) for path in paths}
    for path in file.keys() | attached.keys():
        has, wants = _described(attached.get(path)), file.get(path, "no adapter")
        if has != wants:
            raise InputError(
                f"{label}: on '{path}' the model has {has}, the file {wants}; load it into a fresh model instead"
            )


def _described(part: Adapter | None) -> str:
    if part is None:
        return "no adapter"
    return _of_rank(part.rank, part.alpha, part.rslora) if isinstance(part, LoRA) else f"a {type(part).__name__}"


def _of_rank(rank: int, alpha: float, rslora: bool) -> str:
    return f"rank {rank}, scale {scale_of(alpha, rank, rslora):.9g}"


def _check_finite(state: Mapping[str, Tensor], dtype: torch.dtype, label: str) -> None:
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor.to(dtype)).all()):
            raise InputError(f"{label}: the tensor '{key}' holds NaN, infinity or a number too large for {dtype}")
