"""One 4-bit matrix as every tool takes it: the same stored bytes, in as many copies as a variant rotates through.

Ours, bitsandbytes' nested and its plain form are made from one quantisation: the plain form's fp32 scales are what the
nested ones decode to. So all of them compute with one weight, and one float64 product judges them all.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fourbit import NF4Linear, nf4
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.weight4bit import Weight4bit

BYTES_PER_PARAMETER = 0.5 + 1 / 64 + 4 / (64 * 256)  # NF4 in blocks of 64, double quantised


@dataclass(frozen=True)
class Weights:
    """A random weight [N, K] of normal values, quantised to NF4 with double quantisation, with its copies."""

    N: int
    K: int
    copies: list[Weight4bit]

    @classmethod
    def random(cls, N: int, K: int, device: torch.device, sets: int, seed: int = 0) -> "Weights":
        generator = torch.Generator(device).manual_seed(seed)
        dense = torch.randn(N, K, device=device, generator=generator) * K**-0.5
        first = nf4.quantize(dense, double_quant=True)
        rest = [Weight4bit(*(tensor.clone() for tensor in first[:4]), first.shape) for _ in range(sets - 1)]
        return cls(N, K, [first, *rest])

    @cached_property
    def exact(self) -> Tensor:
        """The weight in float64, decoded by the reference: code times scale, not rounded further."""
        return self.decoded(torch.float32).double()

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The weight in float64, as rounded to `dtype`."""
        return self.decoded(dtype).double()

    def decoded(self, dtype: torch.dtype) -> Tensor:
        with force_path("reference"):
            return nf4.dequantize(self.copies[0], dtype)

    def layer(self, i: int, bias: Tensor | None = None) -> NF4Linear:
        """Our module over copy i."""
        layer = NF4Linear(self.K, self.N, bias=False, device="meta")
        layer.store(self.copies[i])
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        return layer
