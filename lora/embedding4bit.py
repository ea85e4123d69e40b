"""NF4Embedding: a frozen table of embeddings in 4 bits, of which only the rows that are looked up are decoded.

A vocabulary of 128k tokens times 4,096 is 1 GB in bf16 and 0.27 GB here. Its bytes are those of an NF4Linear of the
same weight, so a head that is tied to it shares them. Layout and rounding are bitsandbytes'.
"""

from torch import Tensor, nn

from ..kernels.dequantize4bit import dequantize_rows
from .linear4bit import Module4bit


class NF4Embedding(Module4bit):
    """Rows of a frozen 4-bit table [tokens, columns], in `dtype`; arguments, parameters and errors are Module4bit's.

    Where a row is not whole blocks, the whole table is decoded for a lookup: take a blocksize that divides a row.
    """

    def forward(self, ids: Tensor) -> Tensor:  # int [...] -> [..., embedding_dim]
        found = dequantize_rows(self.stored, ids.reshape(-1), self.dtype)
        return found.view(*ids.shape, self.shape[1])


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks rows up and no more, as such a table does. A subclass with a forward of its own may do more."""
    plain = type(module).forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None
    return plain or isinstance(module, NF4Embedding)
