"""One quantised weight, whole: what every op takes, and the one place that knows how it is laid out.

The bytes are bitsandbytes'. Codes lie two a byte in the order of the flattened values, the first in the high nibble; a
scale (absmax) belongs to each block of `blocksize` of them. Where a row is whole blocks, packed and absmax are matrices
with a row for each row of the weight, so that cutting one on rows cuts the other; elsewhere they are flat.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .blockwise import NESTED_BLOCKSIZE, dequantize_absmax

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SMALLEST_ABSMAX = 1e-38  # floor for what values are divided by, so that a block of zeros divides by something


class Weight4bit(NamedTuple):
    """A tensor of `shape` in 4 bits; kernels count on nothing but the number of bytes, whatever shapes they have."""

    packed: Tensor  # uint8 [..., out, in / 2] where a row is whole blocks; see stored_shapes
    absmax: Tensor  # fp32 [..., out, in / blocksize], likewise; with double quantisation uint8 codes of the scales
    nested_absmax: Tensor | None  # fp32 [ceil(blocks / 256)], with double quantisation
    nested_offset: Tensor | None  # fp32 [1], with double quantisation
    shape: tuple[int, ...]
    quant_type: str = "nf4"  # or "fp4"
    blocksize: int = 64

    @property
    def rows(self) -> int:
        """Of the matrix, for a linear layer its outputs; what is no matrix counts as one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        """Of the matrix, for a linear layer its inputs; of what is no matrix, all its values."""
        return self.shape[1] if len(self.shape) == 2 else prod(self.shape)

    @property
    def scales(self) -> Tensor:
        """The scales themselves, fp32 in the shape of absmax."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        return dequantize_absmax(self.absmax, self.nested_absmax, self.nested_offset)

    def to(self, device: torch.device | str) -> Self:
        """The same weight on `device`."""
        packed, absmax, nested, offset = (None if tensor is None else tensor.to(device) for tensor in self[:4])
        return self._replace(packed=packed, absmax=absmax, nested_absmax=nested, nested_offset=offset)  # type: ignore[arg-type]  # packed and absmax are never None

    def check(self) -> Self:
        """Itself. ValueError unless its tensors have the sizes, types and one device that its shape and format need.

        For weights that come from outside: kernels take what they are given."""
        check_format(self.quant_type, self.blocksize)
        n, doubled = prod(self.shape), self.nested_absmax is not None
        blocks = -(-n // self.blocksize)
        groups, bytes_ = -(-blocks // NESTED_BLOCKSIZE), (n + 1) // 2
        if doubled != (self.nested_offset is not None):
            raise ValueError("nested_absmax and nested_offset go together: give both (double quantisation) or neither")
        types = torch.uint8, torch.uint8 if doubled else torch.float32, torch.float32, torch.float32
        for i, (tensor, dtype, count) in enumerate(zip(self[:4], types, (bytes_, blocks, groups, 1), strict=True)):
            if tensor is not None and (tensor.numel() != count or tensor.dtype != dtype):
                kind = "uint8 codes of scales" if doubled else "fp32 scales"
                rule = (
                    f"{n} values of shape {tuple(self.shape)} need {bytes_} packed uint8 bytes",
                    f"{n} values in blocks of {self.blocksize} need {blocks} {kind}",
                    f"{blocks} codes in blocks of {NESTED_BLOCKSIZE} need {groups} scales in fp32",
                    "nested_offset must be one fp32 value",
                )[i]
                cast = "; scales must not be cast (FSDP2: param_dtype=None)" if tensor.is_floating_point() else ""
                raise ValueError(f"{rule}, got {tensor.numel()} of {tensor.dtype}{cast}")
        devices = {tensor.device for tensor in self[:4] if tensor is not None}
        if len(devices) > 1:
            raise ValueError(f"codes and scales must be on one device, got {', '.join(sorted(map(str, devices)))}")
        return self


def check_format(quant_type: str, blocksize: int) -> None:
    """ValueError unless the code and the block size are ones the format knows."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be a power of two from 32 to 4096, got {blocksize!r}")


def stored_shapes(shape: tuple[int, ...], blocksize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of packed and absmax for a weight of `shape`: with a row for each of its rows where those are whole
    blocks, else for each matrix of three dimensions or more where those are, else flat."""
    n = prod(shape)
    *rows, columns = shape if shape and shape[-1] % blocksize == 0 else (*shape[:1], prod(shape[1:]))
    if rows and columns % blocksize == 0:
        return (*rows, columns // 2), (*rows, columns // blocksize)
    return ((n + 1) // 2,), (-(-n // blocksize),)


# torch.library knows no objects: its ops take weights apart, and put them together again inside.


def flatten(weights: Sequence[Weight4bit]) -> tuple[list[Tensor], list[int], str, int]:
    """Weights of one format and number of columns: their tensors kind by kind, [*rows, columns], the format."""
    kinds = zip(*(weight[:4] for weight in weights), strict=True)
    stored = [tensor for kind in kinds for tensor in kind if tensor is not None]
    first = weights[0]
    return stored, [*(weight.rows for weight in weights), first.columns], first.quant_type, first.blocksize


def unflatten(stored: list[Tensor], sizes: list[int], quant_type: str, blocksize: int) -> list[Weight4bit]:
    """What `flatten` took apart; a tensor that was no matrix comes back as one row."""
    *rows, columns = sizes
    n = len(rows)
    packed, absmax, nested, offset = (list[Any](stored[i : i + n]) or [None] * n for i in range(0, 4 * n, n))
    each = zip(packed, absmax, nested, offset, rows, strict=True)
    return [Weight4bit(p, a, s, o, (size, columns), quant_type, blocksize) for p, a, s, o, size in each]
