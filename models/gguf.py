"""GGUF files read with limits: header, metadata and the place of every tensor.

The reader of the `gguf` package trusts the lengths that a file declares, so 51 bytes can hang it for hours. This one
treats a file as a stranger's: every length, count and product is a Python integer checked against a limit and against
the bytes that are really there, before anything is allocated or viewed. Tensor data stays mapped and is decoded one
tensor at a time (`gguf_tensors.py`); what the metadata say about the model is in `gguf_config.py`.

Layout: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian.
"""

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .gguf_config import hf_config
from .gguf_tensors import FORMATS, OTHER_FORMATS, decode, hf_name

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


@dataclass(frozen=True)
class TensorInfo:
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
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        header = _Header(self.path, self._data)
        self.metadata: dict[str, MetadataValue] = header.metadata
        self.tensors: dict[str, TensorInfo] = header.tensors

    def config(self) -> dict[str, Any]:
        """The model under the keys of Hugging Face's config.json; InputError where it is no Llama we know."""
        return hf_config(self.path, self.metadata, self._shapes(), self._rope_factors())

    def iter_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight as (Hugging Face name, tensor), decoded one at a time in the file's order.

        Block formats decode to fp32; F32, F16 and BF16 keep their dtype; `dtype` casts while decoding, so that no
        second copy is made. Rows of Q and K come back in Hugging Face's order (llama.cpp interleaves the rotary
        halves). `rope_freqs` is not a weight: `config()` holds what it says.
        """
        config = self.config()
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        for info in self.tensors.values():
            if info.name != "rope_freqs.weight":
                part = info.name.split(".")[-2]
                yield hf_name(self.path, info.name), self.tensor(info.name, dtype, interleaved_heads=heads.get(part))

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, *, interleaved_heads: int | None = None
    ) -> torch.Tensor:
        """One tensor by its GGUF name; `interleaved_heads` undoes llama.cpp's order of rotary rows in each head."""
        info = self.tensors[name]
        raw = self._data[info.start : info.start + info.nbytes]
        return decode(raw, info.format, info.shape, dtype=dtype, interleaved_heads=interleaved_heads)

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {info.name: info.shape for info in self.tensors.values()}

    def _rope_factors(self) -> list[float] | None:
        if "rope_freqs.weight" not in self.tensors:
            return None
        return self.tensor("rope_freqs.weight", torch.float32).flatten().tolist()


def _map(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The file's bytes as a read-only map; nothing is read yet. A FIFO or device would block or never end: refused."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file; give the path of a .gguf file.")
        if status.st_size < 24:
            raise InputError(f"{path} has {status.st_size} bytes; a GGUF header alone has 24. Download the file again.")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot open {path}: {error}. Check the path and the permissions.") from error


class _Header:
    """One pass over the header; `at` is the next byte to read."""

    def __init__(self, path: Path, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.path = path
        self.data = memoryview(data)
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
            raise self._fail(f"metadata key {key!r} occurs twice")
        kind = self._u32(f"the type of {key!r}")
        if kind == _STRING:
            self.metadata[key] = self._string(f"the value of {key!r}")
        elif kind == _ARRAY:
            self.metadata[key] = self._array(key)
        elif kind in _NUMBERS:
            self.metadata[key] = self._numbers(key, kind, 1)[0].item()
        else:
            raise self._fail(f"metadata key {key!r} has the unknown type {kind}")

    def _array(self, key: str) -> list[str] | np.ndarray[Any, Any]:
        kind = self._u32(f"the item type of {key!r}")
        length = self._count(f"the length of array {key!r}", MAX_ARRAY_LENGTH)
        if kind == _STRING:
            # Eight bytes an item at least: a declared length beyond the file ends here, not after 2^24 turns.
            if 8 * length > self.size - self.at:
                raise self._fail(f"array {key!r} of {length} strings does not fit into the rest of the file")
            what = f"an item of {key!r}"
            return [self._string(what) for _ in range(length)]
        if kind == _ARRAY:
            raise self._fail(f"metadata key {key!r} is an array of arrays, which no model needs")
        if kind not in _NUMBERS:
            raise self._fail(f"array {key!r} has the unknown item type {kind}")
        return self._numbers(key, kind, length)

    def _numbers(self, key: str, kind: int, length: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_NUMBERS[kind])
        start = self._take(length * dtype.itemsize, f"the value of {key!r}")
        values = np.frombuffer(self.data, dtype, length, start).copy()
        if kind == _BOOL:
            if values.size and values.max() > 1:
                raise self._fail(f"metadata key {key!r} is a truth value but holds {values.max()}; 0 and 1 are allowed")
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
                raise self._fail(f"tensor {info.name!r} occurs twice")
            relative[info.name] = info
        base = -(-self.at // self.alignment) * self.alignment
        placed = {
            name: TensorInfo(name, info.shape, info.format, base + info.start, info.nbytes)
            for name, info in relative.items()
        }
        self._check_places(placed)
        return placed

    def _read_tensor(self) -> TensorInfo:
        """One tensor's entry, its `start` still relative to the data section."""
        name = self._string("a tensor name", MAX_NAME_BYTES)
        n_dims = self._u32(f"the number of dimensions of tensor {name!r}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._fail(f"tensor {name!r} has {n_dims} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        dims = [self._u64(f"a dimension of tensor {name!r}") for _ in range(n_dims)]
        type_id = self._u32(f"the type of tensor {name!r}")
        offset = self._u64(f"the offset of tensor {name!r}")
        if type_id not in FORMATS:
            shown = OTHER_FORMATS.get(type_id, f"the unknown type {type_id}")
            known = ", ".join(kind.name for kind in FORMATS.values())
            raise InputError(
                f"{self.path}: tensor {name!r} is stored as {shown}; only {known} can be read. "
                "Take another quantisation of the model (Q8_0 is closest to full precision) or its Hugging Face folder."
            )
        kind = FORMATS[type_id]
        if min(dims) < 1 or dims[0] % kind.block_size:
            raise self._fail(
                f"tensor {name!r} has dimensions {dims}; rows of {kind.name} hold a multiple of {kind.block_size}"
            )
        if offset % self.alignment:
            raise self._fail(f"tensor {name!r} lies at offset {offset}, which is no multiple of {self.alignment}")
        elements = 1
        for dim in dims:
            elements *= dim
        return TensorInfo(
            name, tuple(reversed(dims)), kind.name, offset, elements // kind.block_size * kind.block_bytes
        )

    def _check_places(self, tensors: dict[str, TensorInfo]) -> None:
        """Every tensor inside the file, no two over each other."""
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.start):
            if info.start + info.nbytes > self.size:
                raise InputError(
                    f"{self.path}: tensor {info.name!r} {list(info.shape)} ends at byte {info.start + info.nbytes} "
                    f"but the file has {self.size}. The file is cut short or damaged: get it again."
                )
            if info.start < end:
                raise InputError(
                    f"{self.path}: tensors {before!r} and {info.name!r} overlap. The file is damaged: get it again."
                )
            end, before = info.start + info.nbytes, info.name
