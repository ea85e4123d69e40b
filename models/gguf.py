"""A GGUF file, read as a stranger's: its metadata, the place of every tensor, and their values, one at a time.

A crafted file can declare an array of 2^63 items in 51 bytes, a tensor beyond the file's end or sizes whose product
overflows, and the `gguf` package trusts what is declared. So the header is read here: every length, count and product
is a Python integer checked against a limit and against the bytes that are really there, before anything is allocated or
viewed. The package says how large a format's blocks are and decodes them, bit-exact with llama.cpp's own reference.

Layout: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian.
"""

import contextlib
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import EnvironmentProblem, InputError, shown

_BY_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # a name like Q4_K_M is a mixture of these
READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", *_BY_256)
MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = (1 << 16) - 1
MAX_ARRAY_LENGTH = 1 << 24
MAX_DIMENSIONS = 4
MAX_METADATA = 100_000
MAX_TENSORS = 1_000_000
CHUNK_ELEMENTS = 1 << 20  # decoded at once: 4 MB of fp32, with temporaries near 30 MB

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
MetadataValue = int | float | bool | str | list[str] | np.ndarray[Any, Any]

_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")  # of a string
_NUMBERS = dict(enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "|u1"])) | {10: "<u8", 11: "<i8", 12: "<f8"}


class TensorInfo(NamedTuple):
    """Where one tensor lies: `shape` in torch's order (slowest first), `start` and `nbytes` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file opened for reading.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str, list of str, or a NumPy array for arrays of numbers.
        tensors: GGUF name -> `TensorInfo`, in the file's order.

    Raises:
        InputError: the file is missing, no regular file, no little-endian GGUF of version 2 or 3, breaks a limit or
            points outside itself; the message names the byte, key or tensor.
        EnvironmentProblem: the package `gguf` is not installed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        header = _Header(self.path, self._data)
        self.metadata, self.tensors = header.metadata, header.tensors

    def tensor(self, which: str | TensorInfo) -> Tensor:
        """One tensor by its GGUF name, or what lies at a place, as `decode` gives it."""
        info = self.tensors[which] if isinstance(which, str) else which
        return decode(self._data[info.start : info.start + info.nbytes], info.format, info.shape)


def _map(path: Path) -> Bytes:
    """The file's bytes as a read-only map; nothing is read yet. A FIFO or device would block or never end: refused."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size >= 24:
            return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        why = getattr(error, "strerror", None) or error  # which would tell the path again
        raise InputError(f"cannot open {path}: {why}. Check the path and its permissions.") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file; give the path of a .gguf file.")
    raise InputError(f"{path} has {status.st_size} bytes; a GGUF header alone has 24. Get the file again.")


def package() -> Any:
    """The package `gguf`, which GGUF files alone need."""
    try:
        import gguf.quants
    except ModuleNotFoundError:
        raise EnvironmentProblem("GGUF files need the package gguf: pip install gguf") from None
    return gguf


class _Header:
    """One pass over the header; `at` is the next byte to read."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.size, self.at = path, data.data, len(data), 0
        self._check_magic()
        n_tensors = self._integer("the number of tensors", MAX_TENSORS)
        n_metadata = self._integer("the number of metadata keys", MAX_METADATA)
        self.metadata: dict[str, MetadataValue] = {}
        self.alignment = 32
        for _ in range(n_metadata):
            key = self._string("a metadata key", MAX_NAME_BYTES)
            if key in self.metadata:
                raise self._fail(f"metadata key {shown(key)} occurs twice")
            value = self.metadata[key] = self._value(shown(key))
            if key == "general.alignment":
                if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value.bit_count() > 1:
                    raise self._fail(f"general.alignment is {value!r}; it must be a power of two")
                self.alignment = value
        self.tensors: dict[str, TensorInfo] = {}  # each at its place in the data section
        for _ in range(n_tensors):
            info = self._tensor()
            if info.name in self.tensors:
                raise self._fail(f"tensor {shown(info.name)} occurs twice")
            self.tensors[info.name] = info
        self._place()

    def _fail(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}, near byte {self.at}. It is damaged or no valid GGUF: get it again.")

    def _take(self, count: int, what: str) -> int:
        """Step over `count` bytes that must be there; returns where they begin."""
        if count > self.size - self.at:
            raise self._fail(f"{what} needs {count} bytes but the file ends after {self.size - self.at} more")
        start = self.at
        self.at += count
        return start

    def _integer(self, what: str, limit: int | None = None) -> int:
        """A number of 32 bits, or with a limit of 64."""
        format = "<I" if limit is None else "<Q"
        value: int = struct.unpack_from(format, self.data, self._take(struct.calcsize(format), what))[0]
        if limit is not None and value > limit:
            raise self._fail(f"{what} is {value}, more than the limit of {limit}")
        return value

    def _string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self._integer(f"the length of {what}", limit)
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

    def _value(self, name: str) -> MetadataValue:
        """The value of a metadata key: a scalar, or an array of one type."""
        kind = self._integer(f"the type of {name}")
        if kind == _STRING:
            return self._string(f"the value of {name}")
        if kind != _ARRAY:
            value: MetadataValue = self._numbers(name, kind, 1)[0].item()
            return value
        kind = self._integer(f"the item type of {name}")
        length = self._integer(f"the length of array {name}", MAX_ARRAY_LENGTH)
        if kind != _STRING:
            return self._numbers(name, kind, length, "item ")
        # Eight bytes an item at least: a declared length beyond the file ends here, not after 2^24 turns.
        if 8 * length > self.size - self.at:
            raise self._fail(f"array {name} of {length} strings does not fit into the rest of the file")
        return self._strings(f"an item of {name}", length)

    def _strings(self, what: str, count: int) -> list[str]:
        """So many, as `_string` reads each, in a third of its time: a vocabulary has a hundred thousand."""
        found, data, at = list[str](), self.data, self.at
        with contextlib.suppress(struct.error, UnicodeDecodeError):
            while len(found) < count:
                end = at + 8 + _LENGTH.unpack_from(data, at)[0]
                if end > min(self.size, at + 8 + MAX_STRING_BYTES):
                    break
                found.append(str(data[at + 8 : end], "utf-8"))
                at = end
        self.at = at
        return found + [self._string(what) for _ in range(count - len(found))]  # the first says what is wrong

    def _numbers(self, name: str, kind: int, length: int, of: str = "") -> np.ndarray[Any, Any]:
        if kind not in _NUMBERS:
            what = "an array of arrays, which no model needs" if kind == _ARRAY else f"of the unknown {of}type {kind}"
            raise self._fail(f"metadata key {name} is {what}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self._take(length * dtype.itemsize, f"the value of {name}")
        values = np.frombuffer(self.data, dtype, length, start).copy()
        if kind != _BOOL:
            return values
        if values.size and values.max() > 1:
            raise self._fail(f"metadata key {name} is a truth value but holds {values.max()}; 0 and 1 are allowed")
        return values.astype(np.bool_)

    def _tensor(self) -> TensorInfo:
        """One tensor's entry, its `start` still relative to the data section."""
        gguf = package()
        name = self._string("a tensor name", MAX_NAME_BYTES)
        what = f"tensor {shown(name)}"
        n_dims = self._integer(f"the number of dimensions of {what}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._fail(f"{what} has {n_dims} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        dims = [self._integer(f"a dimension of {what}", (1 << 64) - 1) for _ in range(n_dims)]
        kind = self._integer(f"the type of {what}")
        offset = self._integer(f"the offset of {what}", (1 << 64) - 1)
        format = gguf.GGMLQuantizationType(kind).name if kind in gguf.GGML_QUANT_SIZES else f"the unknown type {kind}"
        if format not in READABLE:
            raise InputError(
                f"{self.path}: {what} is stored as {format}; only {', '.join(READABLE)} can be read. Take another "
                "quantisation of the model (Q8_0 is closest to full precision) or its Hugging Face folder."
            )
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if min(dims) < 1 or dims[0] % block:
            raise self._fail(f"{what} has dimensions {dims}; rows of {format} hold a multiple of {block}")
        if offset % self.alignment:
            raise self._fail(f"{what} lies at offset {offset}, which is no multiple of {self.alignment}")
        return TensorInfo(name, tuple(reversed(dims)), format, offset, math.prod(dims) // block * size)

    def _place(self) -> None:
        """Turn the tensors' starts into places in the file: inside it, no two over each other."""
        base = -(-self.at // self.alignment) * self.alignment
        self.tensors = {name: info._replace(start=base + info.start) for name, info in self.tensors.items()}
        end, before = 0, ""
        for info in sorted(self.tensors.values(), key=lambda info: info.start):
            stop, name = info.start + info.nbytes, shown(info.name)
            if stop > self.size:
                raise InputError(
                    f"{self.path}: tensor {name} {list(info.shape)} ends at byte {stop}, but the file has "
                    f"{self.size}. It is cut short or damaged: get it again."
                )
            if info.start < end:
                raise InputError(f"{self.path}: tensors {before} and {name} overlap. It is damaged: get it again.")
            end, before = stop, name


def decode(raw: Bytes, format: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor's bytes to a new tensor of `shape`, some rows at a time; peak memory is the output plus some 30 MB.

    F32, F16 and BF16 stay what they are, blocks become fp32."""
    rows = raw.reshape(math.prod(shape[:-1]), -1)  # [R, bytes]
    values = torch.empty(len(rows), shape[-1], dtype=_values(rows[:1], format).dtype, device="cpu")
    step = max(1, CHUNK_ELEMENTS // shape[-1])
    for start in range(0, len(rows), step):
        values[start : start + step] = _values(rows[start : start + step], format)
    return values.view(shape)


def _values(rows: Bytes, format: str) -> Tensor:
    """Rows of bytes [R, bytes] to values [R, in]; always a copy, never a view of the map."""
    plain = {"F32": "<f4", "F16": "<f2", "BF16": "<i2"}.get(format)
    if plain is not None:
        values = torch.from_numpy(rows.view(plain).copy())
        return values.view(torch.bfloat16) if format == "BF16" else values
    gguf = package()
    with np.errstate(all="ignore"):  # an infinite scale gives NaN; whoever uses the weight refuses it by name
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[format]))
