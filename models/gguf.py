"""A GGUF file: what it says about the model and its tensors, mapped and decoded one at a time.

The header is read by our own bounded reader (`gguf_header.py`), for the `gguf` package's trusts the lengths that a file
declares; that package only decodes blocks (`gguf_tensors.py`). `gguf_config.py` makes the metadata a `Spec`.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import InputError
from .gguf_config import read
from .gguf_header import MetadataValue, TensorInfo, read_header
from .gguf_tensors import Bytes, decode, hf_name
from .spec import Spec

ROPE_FACTORS = "rope_freqs.weight"  # no weight: what it says is in the Spec
MAX_ROPE_FACTORS = 4096  # one for each pair of a head's elements


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
        self.metadata: dict[str, MetadataValue]
        self.tensors: dict[str, TensorInfo]
        self.metadata, self.tensors = read_header(self.path, self._data)

    def spec(self) -> Spec:
        """The model; InputError, by key, where it is no Llama we know."""
        return read(self.path, self.metadata, self.shapes(), self._rope_factors())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, under its name in a Hugging Face checkpoint, in the file's order."""
        return {hf_name(self.path, info.name): info.shape for info in self._weights()}

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its name in a Hugging Face checkpoint, decoded one at a time in the file's order.

        Block formats decode to fp32; F32, F16 and BF16 keep their dtype. Rows of Q and K come back in Hugging Face's
        order (llama.cpp interleaves the rotary halves).
        """
        spec = self.spec()
        heads = {"attn_q": spec.num_attention_heads, "attn_k": spec.num_key_value_heads}
        for info in self._weights():
            yield hf_name(self.path, info.name), self.tensor(info.name, heads.get(info.name.split(".")[-2]))

    def tensor(self, name: str, interleaved_heads: int | None = None) -> Tensor:
        """One tensor by its GGUF name; `interleaved_heads` undoes llama.cpp's order of rotary rows in each head."""
        info = self.tensors[name]
        raw = self._data[info.start : info.start + info.nbytes]
        return decode(raw, info.format, info.shape, interleaved_heads)

    def _weights(self) -> Iterator[TensorInfo]:
        return (info for info in self.tensors.values() if info.name != ROPE_FACTORS)

    def _rope_factors(self) -> list[float] | None:
        if ROPE_FACTORS not in self.tensors:
            return None
        shape = self.tensors[ROPE_FACTORS].shape
        if len(shape) != 1 or shape[0] > MAX_ROPE_FACTORS:
            raise InputError(f"{self.path}: tensor {ROPE_FACTORS!r} must be a short vector, got shape {list(shape)}.")
        return self.tensor(ROPE_FACTORS).tolist()


def _map(path: Path) -> Bytes:
    """The file's bytes as a read-only map; nothing is read yet. A FIFO or device would block or never end: refused."""
    try:
        status = os.stat(path)
        regular = stat.S_ISREG(status.st_mode)
        data = np.memmap(path, dtype=np.uint8, mode="r") if regular and status.st_size >= 24 else None
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise InputError(f"cannot open {path}: {error}. Check the path and its permissions.") from None
    if not regular:
        raise InputError(f"{path} is not a regular file; give the path of a .gguf file.")
    if data is None:
        raise InputError(f"{path} has {status.st_size} bytes; a GGUF header alone has 24. Get the file again.")
    return data
