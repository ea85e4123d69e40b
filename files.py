"""The one place that writes a file, or trusts one: whole-or-not-at-all writes, bounded reads.

Written: a file appears whole or not at all, and a name is on the disk only after its bytes are. Everything is plain
`os` calls, each of which may fail or be the process's last, so tests can trip every one of them. An fsync is a promise
of the operating system and the drive; we claim to survive a killed process and a torn file, not every loss of power.

Read: what lies in a folder may be a stranger's. No pickle, no link that leads elsewhere, no pipe or device, no JSON
larger than its reader expects, no key said twice.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import DiskError, InputError, NumericError, shown

FLOATS = ("F64", "F32", "F16", "BF16")
COUNTS = ("I64", "I32", "U8", "BOOL")  # what buffers may be besides
_TYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool
_KINDS = dict(zip(_TYPES, FLOATS + COUNTS, strict=True))
UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what a file system says to a call it lacks
_TEMPORARY = re.compile(r"\.fourbit-[0-9a-z]+-[0-9a-f]{16}")  # what a killed run may leave behind


def regular_file(folder: Path, name: str, instead: str = "") -> Path:
    """The file `name` in `folder`; InputError if it is missing, a link out of the folder (but into the blob store of a
    Hugging Face cache whose snapshot that is), a pipe or a device. instead: what the error for a missing file ends
    with."""
    file, home = folder / name, folder.resolve()
    cache = home.parent.parent if home.parent.name == "snapshots" else home
    try:
        if not file.exists():
            raise InputError(f"'{folder}' holds no {name}.{instead}")
        place = file.resolve().parent
    except OSError as error:  # a name that the system cannot hold
        raise InputError(f"'{folder}': {shown(name)} cannot be read: {error}") from None
    if place != home and not (cache.name.startswith("models--") and place == cache / "blobs"):
        raise InputError(f"'{file}' is a link out of its folder, which is not followed: copy the file itself there")
    if not file.is_file():
        raise InputError(f"'{file}' must be a regular file")
    return file


def read_bytes(file: Path, limit: int) -> bytes:
    """What a regular file of at most `limit` bytes holds; else InputError."""
    try:
        if not file.is_file():
            what = "no regular file" if file.exists() else "not there"
            raise InputError(f"{file.parent}: needs the file {file.name}, which is {what}.")
        with file.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}.") from None
    if len(raw) > limit:
        raise InputError(f"{file}: must be at most {limit:,} bytes, got {file.stat().st_size:,}.")
    return raw


def read_text(file: Path, limit: int) -> str:
    """A regular file of at most `limit` bytes as UTF-8 text, less a byte-order mark; else InputError."""
    raw = read_bytes(file, limit)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: must be UTF-8 text: {error}.") from None


def read_json(file: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file; NaN and infinity read as NaN. InputError as in `read_text`, or a key is said twice."""
    text = read_text(file, limit)
    try:
        value = json.loads(text, parse_constant=lambda _: math.nan, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # bad JSON, numbers of thousands of digits, deep nesting
        raise InputError(f"{file}: must be JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must be a JSON object, got {type(value).__name__}.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def opened_tensors(file: Path) -> Any:
    """A safetensors file as `safetensors.safe_open` opens it, whose library checks types, shapes, gaps and overlaps; a
    tensor that its header names twice, of which the library takes the last, is an InputError as all else is."""
    try:
        opened = safe_open(file, framework="pt")
        with file.open("rb") as stream:
            json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=_without_duplicates)
        return opened
    except (SafetensorError, OSError, ValueError) as problem:
        raise InputError(f"'{file}' is no valid safetensors file: {problem}") from None


def float_tensors(file: Path, besides: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file, still mapped from it; InputError if it is broken or has other kinds in it."""
    with opened_tensors(file) as opened:
        names = list(opened.keys())
        for name in names:
            kind = opened.get_slice(name).get_dtype()
            if kind not in (*FLOATS, *besides):
                floats = ", ".join(FLOATS)
                raise InputError(f"'{file}': the tensor '{name}' must hold floats ({floats}), got {kind}")
        return {name: opened.get_tensor(name) for name in names}


def tensor_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors. InputError for a broken file."""
    with opened_tensors(file) as opened:
        return opened.metadata() or {}


def misfits(wanted: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]) -> str:
    """Which tensors, by name and shape, are missing, unknown or of another shape: a sentence each, "" if all fit."""
    found = {
        "missing": [name for name in wanted if name not in given],
        "unknown": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} must be {list(wanted[name])}, got {list(shape)}"
            for name, shape in given.items()
            if name in wanted and list(wanted[name]) != list(shape)
        ],
    }
    return " ".join(
        f"{len(names)} {what}: {'; '.join(sorted(names)[:6])}{'; ...' if len(names) > 6 else ''}."
        for what, names in found.items()
        if names
    )


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """`write` beside `file`, flush to the disk, rename: a reader sees the old file or the whole new one.
    InputError where the name is that of a link (whose aim would stay as it was), a pipe, a device or a folder."""
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        raise InputError(f"{file} is a link, a pipe, a device or a folder, where a file is to be written: remove it")
    part = file.with_name(temporary_name("part"))
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))  # nobody else's
    try:
        write(part)
        sync(part)
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    sync(file.parent)


def write_text(file: Path, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8", newline=""))


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], what: str, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, whole or not at all, sorted by name; its folder is made. `what` is what errors call it.
    One tensor at a time is brought from its device, or made where it is made when it is read.
    Raises NumericError, before anything is written, for NaN or infinity, and DiskError when the disk refuses."""
    for name in sorted(tensors):
        check_finite(name, gathered(tensors[name]))
    with disk_errors(what, file.parent, sum(map(size_of, tensors.values()))):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda part: _save_sorted(tensors, part, {"format": "pt", **(metadata or {})}))


def _save_sorted(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, tensor by tensor: the library's writer copies all of them first, and writes metadata in an
    order of chance. Wide types come first, as it puts them, so that each tensor is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    raw, start = lambda name: gathered(tensors[name]).cpu().contiguous().reshape(-1).view(torch.uint8), 0
    for name in order:
        end = start + size_of(tensors[name])
        kind, shape = _KINDS[tensors[name].dtype], list(tensors[name].shape)
        header[name], start = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with file.open("wb") as stream:
        stream.write((len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8))
        for name in order:
            stream.write(raw(name).numpy().data)
    with opened_tensors(file) as opened:
        for name in order:
            if not torch.equal(opened.get_tensor(name).reshape(-1).view(torch.uint8), raw(name)):
                raise OSError(errno.EIO, f"the tensor '{name}' reads back other than it was written")


def size_of(tensor: Tensor) -> int:
    """Bytes of its values, known without making any."""
    return tensor.numel() * tensor.element_size()


def gathered(tensor: Any) -> Tensor:
    """The whole of it, detached: a DTensor's (FSDP2) comes from all ranks, each of which has to ask."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def check_finite(name: str, tensor: Tensor) -> None:
    """NumericError for a tensor that holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NumericError(f"the tensor '{name}' holds NaN or infinity, so it was not saved")


def size_and_sha256(file: Path) -> tuple[int, str]:
    """Bytes of a file, and their SHA-256 in hex."""
    with file.open("rb") as stream:
        return os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk (a rename is only safe after this), but where the
    file system says that it cannot, as some network ones do."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
    finally:
        os.close(descriptor)


def temporary_name(label: str) -> str:
    """A fresh name that `remove_stale` knows again."""
    return f".fourbit-{label}-{secrets.token_hex(8)}"


def remove_stale(folder: Path) -> None:
    """Remove what was left half-written in `folder`, which no other run may use (`outputs.lock_folder`)."""
    for entry in sorted(folder.iterdir()):
        if _TEMPORARY.fullmatch(entry.name):
            with contextlib.suppress(OSError):  # a leftover costs space, not correctness
                remove_flat(entry)


def remove_flat(path: Path) -> None:
    """Remove a file, or a folder that holds only files. A folder inside stops it: we never write one."""
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        os.unlink(entry)
    os.rmdir(path)


@contextlib.contextmanager
def disk_errors(what: str, folder: Path, needed: int) -> Iterator[None]:
    """Turn an OSError in the body into a `DiskError` that says how many bytes `what` needs and how many are free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = "an unknown number"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(folder).free:,}"
        raise DiskError(
            f"could not write {what} in {folder}: {getattr(error, 'strerror', None) or error}. It needs {needed:,} "
            f"bytes there and {free} are free. What was complete is untouched; free some space or make the folder "
            'writable, then try again (a run: with resume="auto").'
        ) from error
