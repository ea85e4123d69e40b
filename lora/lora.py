"""LoRA, the plain kind of adapter: a trainable low-rank update beside a frozen layer."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.lora_paths import lora_update
from ..settings import checked
from .adapter import Adapter, LowRank
from .config import LoRAConfig
from .lazy_weight import autocast_input
from .linear4bit import NF4Linear, sizes


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRA(Adapter):
    """y + scale * B A dropout(x), training only A and B (Hu et al. 2021, "LoRA", equation 3).

    `lora_A` [r, in] starts uniform in +-1/sqrt(in), `lora_B` [out, r] at zero, so a fresh adapter changes nothing. Both
    are fp32 masters until cast; the sum is computed in the dtype of x. Of `base` only sizes and device are taken.
    Raises InputError for a rank below 1; one above min(in, out) is taken, as PEFT does, and wastes parameters alone.
    """

    def __init__(
        self, base: nn.Linear | NF4Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__()
        in_features, out_features = sizes(base)
        checked("rank", rank, int, {"least": 1})
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        device, bound = base.weight.device, 1 / math.sqrt(in_features)
        start = torch.empty(rank, in_features, device="cpu").uniform_(-bound, bound)  # one start on every device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))

    @classmethod
    def of(cls, base: nn.Linear | NF4Linear, config: LoRAConfig) -> Self:
        """The part that `config` describes."""
        return cls(base, config.rank, config.alpha, config.dropout, config.rslora)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale_of(self.alpha, self.rank, self.rslora)

    @property
    def drop(self) -> float:
        """The dropout of this mode: none outside training."""
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = autocast_input(x)
        h = F.dropout(x, self.drop) if self.drop else x
        return lora_update(y, h, self.lora_A, self.lora_B, self.scale)

    def low_rank(self) -> LowRank | None:
        # a subclass may compute something else
        return LowRank(self.lora_A, self.lora_B, self.scale, self.drop) if type(self) is LoRA else None

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype))

    def is_idle(self) -> bool:
        return not bool(self.lora_B.any())

    def state(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.lora_B.detach()}

    def peft_fields(self) -> dict[str, float]:
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "use_rslora": self.rslora}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"
