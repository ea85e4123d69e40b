"""One quantised weight as the tensors and numbers that make it, in the order every op takes them."""

from typing import NamedTuple

from torch import Tensor


class Weight4bit(NamedTuple):
    """A 4-bit matrix [rows, columns]: codes two a byte, a scale for each block of the flattened matrix."""

    packed: Tensor  # uint8, (rows * columns + 1) // 2 bytes in any shape
    absmax: Tensor  # fp32 [blocks]; with double quantisation uint8 codes of the scales
    nested_absmax: Tensor | None  # fp32 [ceil(blocks / 256)], with double quantisation
    offset: Tensor | None  # fp32 [], with double quantisation
    rows: int
    columns: int
    quant_type: str  # "nf4" or "fp4"
    blocksize: int
