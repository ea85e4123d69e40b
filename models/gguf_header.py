"""The header of a GGUF file, read as a stranger's: metadata and the place of every tensor.

A crafted file can declare an array of 2^63 items in 51 bytes, a tensor beyond the file's end or sizes whose product
overflows. So every length, count and product is a Python integer checked against a limit and against the bytes that
are really there, before anything is allocated or viewed.

Layout: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian.
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .gguf_tensors import FORMATS, OTHER_FORMATS, Bytes, Format

MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = (1 << 16) - 1
MAX_ARRAY_LENGTH = 1 << 24
MAX_DIMENSIONS = 4
MAX_METADATA = 100_000
MAX_TENSORS = 1_000_000

MetadataValue = int | float | bool | str | list[str] | np.ndarray[Any, Any]

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_KNOWN = tuple(kind.name for kind in FORMATS.values())


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` in torch's order (slowest first), `start` and `nbytes` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    start: int
    nbytes: int


def read_header(path: Path, data: Bytes) -> tuple[dict[str, MetadataValue], dict[str, TensorInfo]]:
    """Metadata and tensors of a mapped GGUF file; InputError names the byte, key or tensor that breaks a rule."""
    header = _Header(path, data)
    return header.metadata, header.tensors


def _shown(name: str) -> str:
    """A name from the file as a message shows it: escaped, and cut where it is long."""
    return repr(name) if len(name) <= 80 else f"{name[:77]!r}..."


class _Header:
    """One pass over the header; `at` is the next byte to read."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self.data = data.data
        self.size = len(self.data)
        self.at = 0
        self._check_magic()
        n_tensors = self._count("the number of tensors", MAX_TENSORS)
        n_metadata = self._count("the number of metadata keys", MAX_METADATA)
        self.metadata: dict[str, MetadataValue] = {}
        for _ in range(n_metadata):
            self._read_pair()
        self.alignment = self._alignment()
        self.tensors = self._read_tensors(n_tensors)

    def _fail(self, problem: str) -> InputError:
        return InputError(
            f"{self.path}: {problem}, near byte {self.at}. The file is damaged or no valid GGUF: get it again."
        )

    def _take(self, count: int, what: str) -> int:
        """Step over `count` bytes that must be there; returns where they begin."""
        if count > self.size - self.at:
            raise self._fail(f"{what} needs {count} bytes but the file ends after {self.size - self.at} more")
        start = self.at
        self.at += count
        return start

    def _u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self._take(8, what))[0]
        return value

    def _count(self, what: str, limit: int) -> int:
        value = self._u64(what)
        if value > limit:
            raise self._fail(f"{what} is {value}, more than the limit of {limit}")
        return value

    def _string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self._count(f"the length of {what}", limit)
        start = self._take(length, what)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{what} is not UTF-8 ({error.reason})") from error

    def _check_magic(self) -> None:
        magic = bytes(self.data[self._take(4, "the magic number") : self.at])
        if magic != b"GGUF":
            raise InputError(f"{self.path} is no GGUF file: it starts with {magic!r}, not with b'GGUF'.")
        version = self._u32("the version")
        if version in (2, 3):
            return
        if version & 0xFFFF == 0 and version:
            raise InputError(f"{self.path} is a big-endian GGUF; only little-endian files are read. Convert it again.")
        raise InputError(f"{self.path} is GGUF version {version}; versions 2 and 3 are read. Convert the model again.")

    def _read_pair(self) -> None:
        key = self._string("a metadata key", MAX_NAME_BYTES)
        if key in self.metadata:
            raise self._fail(f"metadata key {_shown(key)} occurs twice")
        kind = self._u32(f"the type of {_shown(key)}")
        if kind == _STRING:
            self.metadata[key] = self._string(f"the value of {_shown(key)}")
        elif kind == _ARRAY:
            self.metadata[key] = self._array(key)
        elif kind in _NUMBERS:
            self.metadata[key] = self._numbers(key, kind, 1)[0].item()
        else:
            raise self._fail(f"metadata key {_shown(key)} has the unknown type {kind}")

    def _array(self, key: str) -> list[str] | np.ndarray[Any, Any]:
        kind = self._u32(f"the item type of {_shown(key)}")
        length = self._count(f"the length of array {_shown(key)}", MAX_ARRAY_LENGTH)
        if kind == _STRING:
            # Eight bytes an item at least: a declared length beyond the file ends here, not after 2^24 turns.
            if 8 * length > self.size - self.at:
                raise self._fail(f"array {_shown(key)} of {length} strings does not fit into the rest of the file")
            what = f"an item of {_shown(key)}"
            return [self._string(what) for _ in range(length)]
        if kind == _ARRAY:
            raise self._fail(f"metadata key {_shown(key)} is an array of arrays, which no model needs")
        if kind not in _NUMBERS:
            raise self._fail(f"array {_shown(key)} has the unknown item type {kind}")
        return self._numbers(key, kind, length)

    def _numbers(self, key: str, kind: int, length: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_NUMBERS[kind])
        start = self._take(length * dtype.itemsize, f"the value of {_shown(key)}")
        values = np.frombuffer(self.data, dtype, length, start).copy()
        if kind == _BOOL:
            if values.size and values.max() > 1:
                raise self._fail(
                    f"metadata key {_shown(key)} is a truth value but holds {values.max()}; 0 and 1 are allowed"
                )
            return values.astype(np.bool_)
        return values

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1):
            raise self._fail(f"general.alignment is {value!r}; it must be a power of two")
        return value

    def _read_tensors(self, count: int) -> dict[str, TensorInfo]:
        relative: dict[str, TensorInfo] = {}
        for _ in range(count):
            info = self._read_tensor()
            if info.name in relative:
                raise self._fail(f"tensor {_shown(info.name)} occurs twice")
            relative[info.name] = info
        base = -(-self.at // self.alignment) * self.alignment
        placed = {name: replace(info, start=base + info.start) for name, info in relative.items()}
        self._check_places(placed)
        return placed

    def _read_tensor(self) -> TensorInfo:
        """One tensor's entry, its `start` still relative to the data section."""
        name = self._string("a tensor name", MAX_NAME_BYTES)
        n_dims = self._u32(f"the number of dimensions of tensor {_shown(name)}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._fail(f"tensor {_shown(name)} has {n_dims} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        dims = [self._u64(f"a dimension of tensor {_shown(name)}") for _ in range(n_dims)]
        type_id = self._u32(f"the type of tensor {_shown(name)}")
        offset = self._u64(f"the offset of tensor {_shown(name)}")
        kind = self._format(type_id, name)
        if min(dims) < 1 or dims[0] % kind.block_size:
            raise self._fail(
                f"tensor {_shown(name)} has dimensions {dims}; rows of {kind.name} hold a multiple of {kind.block_size}"
            )
        if offset % self.alignment:
            raise self._fail(f"tensor {_shown(name)} lies at offset {offset}, which is no multiple of {self.alignment}")
        nbytes = math.prod(dims) // kind.block_size * kind.block_bytes
        return TensorInfo(name, tuple(reversed(dims)), kind.name, offset, nbytes)

    def _format(self, type_id: int, name: str) -> Format:
        if type_id in FORMATS:
            return FORMATS[type_id]
        found = OTHER_FORMATS.get(type_id, f"the unknown type {type_id}")
        raise InputError(
            f"{self.path}: tensor {_shown(name)} is stored as {found}; only {', '.join(_KNOWN)} can be read. "
            "Take another quantisation of the model (Q8_0 is closest to full precision) or its Hugging Face folder."
        )

    def _check_places(self, tensors: dict[str, TensorInfo]) -> None:
        """Every tensor inside the file, no two over each other."""
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.start):
            stop = info.start + info.nbytes
            if stop > self.size:
                raise InputError(
                    f"{self.path}: tensor {_shown(info.name)} {list(info.shape)} ends at byte {stop}, but the file has "
                    f"{self.size}. It is cut short or damaged: get it again."
                )
            if info.start < end:
                raise InputError(
                    f"{self.path}: tensors {_shown(before)} and {_shown(info.name)} overlap. "
                    "The file is damaged: get it again."
                )
            end, before = stop, info.name
