"""A Hugging Face model folder: `config.json` and safetensors weights, one file or shards with an index.

The folder is untrusted. Only safetensors are read (pickle-based files can run code), a shard's name cannot lead outside
the folder, and tensors are handed out one at a time as views of the mapped file, so reading costs no memory of its own.
"""

import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError, shown
from ..files import FLOATS, misfits, opened_tensors, read_json, regular_file
from ..lora.convert import FORM, packed_layer
from ..lora.linear4bit import Module4bit
from .float8 import FLOAT8, Header, check_quantization, decoded, scale_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".h5", ".msgpack"}
CONFIG_BYTES = 4 << 20
INDEX_BYTES = 64 << 20
_PLAIN_NAME = re.compile(r'[^./\\:"\x00-\x1f][^/\\:"\x00-\x1f]*\.safetensors')


def tensor_shapes(folder: Path, besides: Sequence[str] = (), skip: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Name and shape of all tensors but `skip` and the scales of 8-bit floats, from headers. InputError as in
    `iter_tensors`, and for other types."""
    headers = _headers(folder)
    beside = scale_names(headers)[1]
    for name, (path, kind, _) in headers.items():
        if kind not in (*FLOATS, *FLOAT8, *besides) and name not in skip and name not in beside:
            raise InputError(
                f"{path}: tensor {name!r} has dtype {kind}; weights must be {', '.join(FLOATS)}. "
                "Load the unquantised model and let fourbit quantise it."
            )
    return {name: shape for name, (_, _, shape) in headers.items() if name not in skip and name not in beside}


def _headers(folder: Path) -> dict[str, Header]:
    """File, type and shape of every tensor, by name."""
    return {
        name: (path, file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
        for path, file in _opened(folder)
        for name in file.offset_keys()
    }


def iter_tensors(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight but `skip`, one shard open at a time.

    Each tensor is a view of the mapped file in the file's own dtype: copy what must outlive the file. Those of 8-bit
    floats are decoded with their scales to fp32. Raises InputError naming the file (and tensor) where a file is
    missing, malformed, outside the folder, or disagrees with the index, and for scales that do not fit."""
    scales, beside, block = _float8(folder)
    for _, file in _opened(folder):
        for name in [name for name in file.offset_keys() if name not in skip and name not in beside]:
            tensor = file.get_tensor(name)
            scaled = name in scales
            yield name, decoded(tensor, scales[name], block, f"{folder}: {name!r}") if scaled else tensor


def _float8(folder: Path) -> tuple[dict[str, Tensor], set[str], Sequence[int]]:
    """Scales of the folder's 8-bit floats by the names of their weights, the names of all tensors that only go with
    these, and the rows and columns that one scale of a grid stands for. InputError for a weight without scales."""
    names, beside = scale_names(_headers(folder))
    if not names:
        return {}, set(), ()
    found = ((name, file) for _, file in _opened(folder) for name in names.keys() & {*file.offset_keys()})
    scales = {names[name]: file.get_tensor(name).clone() for name, file in found}
    config = read_json(folder / "config.json", CONFIG_BYTES) if (folder / "config.json").exists() else {}
    return scales, beside, check_quantization(config, f"{folder}: config.json")


def packed_layers(folder: Path) -> tuple[dict[str, Module4bit], set[str]]:
    """The folder's 4-bit layers, less their biases, by the names of their weights, on the CPU in memory of their own;
    and the names of all tensors that they are made of. InputError as `iter_tensors` and `packed_layer` raise it."""
    pieces = {name.partition(FORM)[0]: dict[str, Tensor]() for name in _headers(folder) if FORM in name}
    for name, tensor in iter_tensors(folder) if pieces else ():
        for weight in pieces.keys() & {name, name.rpartition(".")[0], name.partition(FORM)[0]}:
            pieces[weight][name.removeprefix(weight)] = tensor.clone()
    layers = {weight: packed_layer(found, f"{folder}: {weight!r}") for weight, found in pieces.items()}
    return layers, {weight + piece for weight, found in pieces.items() for piece in found}


def _opened(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Each weight file, open, after a comparison of its tensors with those that the index places there."""
    promised = weight_files(folder)
    for name in sorted(promised):
        if not _PLAIN_NAME.fullmatch(name):
            raise InputError(f"{folder}: weight file {shown(name)} must be a plain name ending in .safetensors.")
        path = regular_file(folder, name)
        with opened_tensors(path) as file:
            held = dict.fromkeys(file.offset_keys(), ())
            if wrong := misfits(dict.fromkeys(promised[name], ()) or held, held):
                raise InputError(f"{path}: its tensors are not those that {INDEX} places there. {wrong}")
            yield path, file


def weight_files(folder: Path) -> dict[str, set[str]]:
    """The files that hold the folder's weights, and the tensors that an index places in each; InputError for none."""
    if promised := {SINGLE: set[str]()} if (folder / SINGLE).exists() else indexed(folder):
        return promised
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED):
        raise InputError(
            f"{folder}: holds {', '.join(pickled[:3])} but no safetensors. Such files can run code when read, so they "
            "never are; convert them with transformers: from_pretrained(folder), then save_pretrained(another_folder)."
        )
    raise InputError(f"{folder}: needs {SINGLE}, or shards with {INDEX}; found neither.")


def indexed(folder: Path) -> dict[str, set[str]]:
    """The shards that the folder's index names, and the tensors it places in each; InputError for a broken index."""
    if not (folder / INDEX).exists():
        return {}
    weight_map = read_json(folder / INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: weight_map must be a non-empty object from tensor names to file names.")
    places: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise InputError(f"{folder / INDEX}: weight_map[{name!r}] must be a file name, got {shown(file)}.")
        places.setdefault(file, set()).add(name)
    return places
