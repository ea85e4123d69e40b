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
from .config import shown
from .gguf_tensors import FORMATS, OTHER_FORMATS, Bytes

MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = (1 << 16) - 1
MAX_ARRAY_LENGTH = 1 << 24
MAX_DIMENSIONS = 4
MAX_METADATA = 100_000
MAX_TENSORS = 1_000_000

MetadataValue = int | float | bool | str | list[str] | np.ndarray[Any, Any]

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = dict(enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "|u1"])) | {10: "<u8", 11: "<i8", 12: "<f8"}


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

    def _integer(self, what: str, format: str = "<I") -> int:
        """A number of 32 ("<I") or 64 ("<Q") bits."""
        value: int = struct.unpack_from(format, self.data, self._take(struct.calcsize(format), what))[0]
        return value

    def _count(self, what: str, limit: int) -> int:
        value = self._integer(what, "<Q")
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
        version = self._integer("the version")
        if version in (2, 3):
            return
        if version & 0xFFFF == 0 and version:
            raise InputError(f"{self.path} is a big-endian GGUF; only little-endian files are read. Convert it again.")
        raise InputError(f"{self.path} is GGUF version {version}; versions 2 and 3 are read. Convert the model again.")

    def _read_pair(self) -> None:
        key = self._string("a metadata key", MAX_NAME_BYTES)
        name = shown(key)
        if key in self.metadata:
            raise self._fail(f"metadata key {name} occurs twice")
        kind = self._integer(f"the type of {name}")
        if kind == _STRING:
            self.metadata[key] = self._string(f"the value of {name}")
        elif kind == _ARRAY:
            self.metadata[key] = self._array(name)
        elif kind in _NUMBERS:
            self.metadata[key] = self._numbers(name, kind, 1)[0].item()
        else:
            raise self._fail(f"metadata key {name} has the unknown type {kind}")

    def _array(self, name: str) -> list[str] | np.ndarray[Any, Any]:
        kind = self._integer(f"the item type of {name}")
        length = self._count(f"the length of array {name}", MAX_ARRAY_LENGTH)
        if kind == _ARRAY:
            raise self._fail(f"metadata key {name} is an array of arrays, which no model needs")
        if kind in _NUMBERS:
            return self._numbers(name, kind, length)
        if kind != _STRING:
            raise self._fail(f"array {name} has the unknown item type {kind}")
        # Eight bytes an item at least: a declared length beyond the file ends here, not after 2^24 turns.
        if 8 * length > self.size - self.at:
            raise self._fail(f"array {name} of {length} strings does not fit into the rest of the file")
        return [self._string(f"an item of {name}") for _ in range(length)]

    def _numbers(self, name: str, kind: int, length: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_NUMBERS[kind])
        start = self._take(length * dtype.itemsize, f"the value of {name}")
        values = np.frombuffer(self.data, dtype, length, start).copy()
        if kind != _BOOL:
            return values
        if values.size and values.max() > 1:
            raise self._fail(f"metadata key {name} is a truth value but holds {values.max()}; 0 and 1 are allowed")
        return values.astype(np.bool_)

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
                raise self._fail(f"tensor {shown(info.name)} occurs twice")
            relative[info.name] = info
        base = -(-self.at // self.alignment) * self.alignment
        placed = {name: replace(info, start=base + info.start) for name, info in relative.items()}
        self._check_places(placed)
        return placed

    def _read_tensor(self) -> TensorInfo:
        """One tensor's entry, its `start` still relative to the data section."""
        name = self._string("a tensor name", MAX_NAME_BYTES)
        what = f"tensor {shown(name)}"
        n_dims = self._integer(f"the number of dimensions of {what}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._fail(f"{what} has {n_dims} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        dims = [self._integer(f"a dimension of {what}", "<Q") for _ in range(n_dims)]
        kind = self._integer(f"the type of {what}")
        offset = self._integer(f"the offset of {what}", "<Q")
        if kind not in FORMATS:
            found = OTHER_FORMATS.get(kind, f"the unknown type {kind}")
            known = ", ".join(format.name for format in FORMATS.values())
            raise InputError(
                f"{self.path}: {what} is stored as {found}; only {known} can be read. Take another quantisation of "
                "the model (Q8_0 is closest to full precision) or its Hugging Face folder."
            )
        format, block, size = FORMATS[kind]
        if min(dims) < 1 or dims[0] % block:
            raise self._fail(f"{what} has dimensions {dims}; rows of {format} hold a multiple of {block}")
        if offset % self.alignment:
            raise self._fail(f"{what} lies at offset {offset}, which is no multiple of {self.alignment}")
        return TensorInfo(name, tuple(reversed(dims)), format, offset, math.prod(dims) // block * size)

    def _check_places(self, tensors: dict[str, TensorInfo]) -> None:
        """Every tensor inside the file, no two over each other."""
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.start):
            stop, name = info.start + info.nbytes, shown(info.name)
            if stop > self.size:
                raise InputError(
                    f"{self.path}: tensor {name} {list(info.shape)} ends at byte {stop}, but the file has "
                    f"{self.size}. It is cut short or damaged: get it again."
                )
            if info.start < end:
                raise InputError(
                    f"{self.path}: tensors {before} and {name} overlap. The file is damaged: get it again."
                )
            end, before = stop, name
