"""A GGUF file: what it says about the model and its tensors, mapped and decoded one at a time.

The header is read by our own bounded reader (`gguf_header.py`), for the `gguf` package's trusts the lengths that a file
declares; that package only decodes blocks (`gguf_tensors.py`). The metadata become a Hugging Face config in
`gguf_config.py`.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .gguf_config import hf_config
from .gguf_header import MetadataValue, TensorInfo, read_header
from .gguf_tensors import Bytes, decode, hf_name

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

    def config(self) -> dict[str, Any]:
        """The model under the keys of Hugging Face's config.json; InputError where it is no Llama we know."""
        shapes = {info.name: info.shape for info in self.tensors.values()}
        return hf_config(self.path, self.metadata, shapes, self._rope_factors())

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

    def _rope_factors(self) -> list[float] | None:
        if "rope_freqs.weight" not in self.tensors:
            return None
        shape = self.tensors["rope_freqs.weight"].shape
        if len(shape) != 1 or shape[0] > MAX_ROPE_FACTORS:
            raise InputError(
                f"{self.path}: tensor 'rope_freqs.weight' has shape {list(shape)}; it must be a short vector."
            )
        return self.tensor("rope_freqs.weight", torch.float32).tolist()


def _map(path: Path) -> Bytes:
    """The file's bytes as a read-only map; nothing is read yet. A FIFO or device would block or never end: refused."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise InputError(f"cannot open {path}: {error}. Check the path.") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file; give the path of a .gguf file.")
    if status.st_size < 24:
        raise InputError(f"{path} has {status.st_size} bytes; a GGUF header alone has 24. Get the file again.")
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise InputError(f"cannot open {path}: {error}. Check the permissions.") from None
