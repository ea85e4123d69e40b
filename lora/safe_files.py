"""Small safetensors files, read as what they are, untrusted, and written whole or not at all."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

FLOATS = ("F64", "F32", "F16", "BF16")


def regular_file(folder: Path, name: str, instead: str = "") -> Path:
    """The file `name` in `folder`; InputError if it is missing, a link out of the folder, a pipe or a device.

    instead: what the error for a missing file ends with.
    """
    file = folder / name
    if not file.exists():
        raise InputError(f"'{folder}' holds no {name}.{instead}")
    if file.resolve().parent != folder.resolve():
        raise InputError(f"'{file}' is a link out of its folder, which is not followed: copy the file itself there")
    if not stat.S_ISREG(file.stat().st_mode):
        raise InputError(f"'{file}' must be a regular file")
    return file


def float_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, still mapped from it. InputError for a broken file or one not of floats."""
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                kind = opened.get_slice(key).get_dtype()
                if kind not in FLOATS:
                    floats = ", ".join(FLOATS)
                    raise InputError(f"'{file}': the tensor '{key}' must hold floats ({floats}), got {kind}")
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as problem:
        raise InputError(f"'{file}' is no valid safetensors file: {problem}") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, flush to the disk, rename: a reader sees the old file or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
