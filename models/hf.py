"""A Hugging Face model folder: `config.json` and safetensors weights, one file or shards with an index.

The folder is untrusted. Only safetensors are read (pickle-based files can run code), a shard's name cannot lead outside
the folder, and tensors are handed out one at a time as views of the mapped file, so reading costs no memory of its own.
"""

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".h5", ".msgpack"}
CONFIG_BYTES = 4 << 20
INDEX_BYTES = 64 << 20
DTYPES = {"F64", "F32", "F16", "BF16"}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json` as a dict; InputError where it is missing, too large or no JSON object."""
    return read_json(folder, "config.json", CONFIG_BYTES)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the files' headers alone. Raises InputError as `iter_tensors` does."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, names in _shards(folder):
        with _open(path) as file:
            for name in _checked_names(path, file, names):
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise InputError(
                        f"{path}: tensor {name!r} has dtype {part.get_dtype()}; weights must be F64, F32, F16 or BF16. "
                        "Load the unquantised model and let fourbit quantise it."
                    )
                if name in shapes:
                    raise InputError(
                        f"{path}: tensor {name!r} is also in another shard; every tensor must be in one file."
                    )
                shapes[name] = tuple(part.get_shape())
    return shapes


def iter_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, one shard open at a time.

    Each tensor is a view of the mapped file in the file's own dtype: copy what must outlive the file. Raises InputError
    naming the file (and tensor) where a file is missing, malformed, outside the folder, or disagrees with the index.
    """
    for path, names in _shards(folder):
        with _open(path) as file:
            for name in _checked_names(path, file, names):
                yield name, file.get_tensor(name)


def _shards(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """Weight files with the tensors that the index promises in each (None: no index, whatever the file holds)."""
    if (folder / SINGLE).exists():
        return [(_inside(folder, SINGLE), None)]
    if not (folder / INDEX).exists():
        raise InputError(_no_weights(folder))
    weight_map = read_json(folder, INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX}: weight_map must be a non-empty object from tensor names to file names.")
    names_by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise InputError(f"{folder / INDEX}: weight_map[{name!r}] must be a file name, got {_cut(file)}.")
        names_by_file.setdefault(file, set()).add(name)
    return [(_inside(folder, file), names_by_file[file]) for file in sorted(names_by_file)]


def _inside(folder: Path, name: str) -> Path:
    """The path of a file named by a checkpoint: a plain name, a regular file, in the folder itself after links are
    followed.
    """
    rule = "a weight file must be a plain name ending in .safetensors"
    if not name.endswith(".safetensors") or name.startswith(".") or any(c in '/\\:"' or ord(c) < 32 for c in name):
        raise InputError(f"{folder}: {rule}, got {_cut(name)}.")
    if len(name.encode("utf-8", "surrogatepass")) > 255:
        raise InputError(f"{folder}: {rule} of at most 255 bytes, got {_cut(name)}.")
    try:
        path = (folder / name).resolve(strict=True)
        regular = stat.S_ISREG(path.stat().st_mode)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a missing file, a loop of links, a name the system cannot hold
        raise InputError(f"{folder}: weight file {_cut(name)} cannot be read: {error}.") from None
    if not regular:
        raise InputError(f"{folder}: weight file {_cut(name)} must be a regular file.")
    if path.parent not in _homes(folder):
        raise InputError(
            f"{folder}: weight file {_cut(name)} leads outside the folder, to {path}. Copy the file into the folder."
        )
    return folder / name


def _homes(folder: Path) -> set[Path]:
    """Where a folder's files may lie: in itself, or in the blob store of a Hugging Face cache whose snapshot it is."""
    home = folder.resolve()
    homes = {home}
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.add(home.parent.parent / "blobs")
    return homes


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return (
            f"{folder}: holds {', '.join(pickled[:3])} but no safetensors. Such files can run code when read, so they "
            "never are; convert them with transformers: from_pretrained(folder), then save_pretrained(another_folder)."
        )
    return f"{folder}: needs {SINGLE}, or shards with {INDEX}; found neither."


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}.") from None


def _checked_names(path: Path, file: Any, promised: set[str] | None) -> list[str]:
    """The file's tensor names in file order, after a comparison with the index."""
    names: list[str] = list(file.offset_keys())
    if promised is None:
        return names
    missing, extra = sorted(promised - set(names)), sorted(set(names) - promised)
    if missing:
        raise InputError(f"{path}: lacks {len(missing)} tensor(s) that {INDEX} places there: {_listed(missing)}.")
    if extra:
        raise InputError(f"{path}: holds {len(extra)} tensor(s) that {INDEX} does not place there: {_listed(extra)}.")
    return names


def read_json(folder: Path, name: str, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; InputError names the file and what is wrong with it."""
    path = folder / name
    try:
        if not path.is_file():
            raise InputError(f"{folder}: needs the file {name}, which is not there.")
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    if len(raw) > limit:
        raise InputError(f"{path}: must be at most {limit} bytes, got {path.stat().st_size}.")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=lambda _: math.nan)
    except (
        ValueError,
        RecursionError,
    ) as error:  # bad UTF-8, bad JSON, numbers of thousands of digits, nesting without end
        raise InputError(f"{path}: must be JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(value).__name__}.")
    return value


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
