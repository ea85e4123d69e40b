"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): frozen random A and B for all layers, two trained vectors for each."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import dispatch
from ..kernels.dispatch import autocast_input
from .adapter import Adapter
from .config import LoRAConfig
from .linear4bit import sizes

SHARED = "base_model.vera_A", "base_model.vera_B"  # whole keys of files
WIDEST = 16  # times the widest layer: the largest rank, which no tensor of its size in a file vouches for


class VeRA(Adapter):
    """y + b * (B (d * (A dropout(x)))), training d [r] and b [out] (equation 2); d starts at 0.1, b at zero.

    A [r, in] and B [out, r] are the first columns and rows of matrices for the widest layer, which all parts of an
    adapter hold as one module (`projections`, from `join` on): moved, copied and saved once, and PEFT's of that seed.
    """

    peft_type = "VERA"
    projections: nn.Module | None

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.projections, self.dropout, self.seed = None, config.dropout, config.projection_seed
        self.sizes, device = sizes(cast(nn.Linear, base)), next(base.parameters()).device
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), 0.1, dtype=torch.float32, device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.sizes[1], dtype=torch.float32, device=device))

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of this layer."""
        A, B = cast(nn.Module, self.projections).buffers()
        return A[:, : self.sizes[0]].to(dtype), B[: self.sizes[1]].to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = autocast_input(x)
        A, B = self.matrices(dtype := dispatch.product_dtype(x))
        s = F.dropout(x, self.dropout, self.training).to(dtype) @ A.T  # [..., r]; x is not kept, as A is frozen
        return y + ((self.vera_lambda_d.to(dtype) * s) @ B.T * self.vera_lambda_b.to(dtype)).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        (A, B), d, b = self.matrices(weight.dtype), self.vera_lambda_d, self.vera_lambda_b
        return (b.to(B)[:, None] * B) @ (d.to(A)[:, None] * A)

    def is_idle(self) -> bool:
        return not bool(self.vera_lambda_b.any())

    def state(self) -> dict[str, Tensor]:
        both = () if self.projections is None else zip(SHARED, self.projections.buffers(), strict=True)
        return {name: getattr(self, name).detach() for name in self._parameters} | dict(both)

    def peft_fields(self) -> dict[str, Any]:
        fields = {"r": len(self.vera_lambda_d), "vera_dropout": self.dropout}
        return fields | {"projection_prng_key": self.seed, "save_projection": True}


def join(parts: Mapping[str, Adapter]) -> None:
    """Give the VeRA parts of a new adapter, by path, what they share. InputError for a rank above `WIDEST`."""
    if not (own := [part for part in parts.values() if isinstance(part, VeRA)]):
        return
    like, (within, out) = own[0].vera_lambda_d.detach(), [max(part.sizes[i] for part in own) for i in (0, 1)]
    if len(like) > WIDEST * max(within, out):
        raise InputError(f"VeRA's rank must be at most {WIDEST} times the widest layer's size, got {len(like)}")
    made, generator = nn.Module(), torch.Generator().manual_seed(own[0].seed)
    for name, shape in (("vera_A", (len(like), within)), ("vera_B", (out, len(like)))):
        bound = math.sqrt(6 / shape[1])  # Kaiming's uniform start
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        made.register_buffer(name, drawn.to(like))
    for part in own:
        part.projections = made
