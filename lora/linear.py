"""LoRALinear: a frozen base layer plus a trainable low-rank update.

It wraps the base layer and does not subclass it, so dense and 4-bit layers look alike to other code. Over a dense base
the update is added to what the base returns (`kernels.lora.lora_update`); over a 4-bit base both are one op, which can
serve several layers of one input (`kernels.lora.lora_linears4bit`, `project`).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.lora import lora_linears4bit, lora_update
from .linear4bit import NF4Linear, autocast_input


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRALinear(nn.Module):
    """y = base(x) + scale * B A dropout(x), training only A and B (Hu et al. 2021, "LoRA", equation 3).

    scale = alpha / rank, or alpha / sqrt(rank) with rslora. `lora_A` [r, in] starts uniform in +-1/sqrt(in), `lora_B`
    [out, r] starts at zero, so a fresh adapter changes nothing. Both are fp32 masters unless `dtype` says otherwise;
    the sum is computed in the dtype of x. `enabled` switches the update off.
    Raises InputError for a rank outside 1..min(in, out).
    """

    def __init__(
        self,
        base: nn.Linear | NF4Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,  # a CPU generator: the same start on every device
    ) -> None:
        super().__init__()
        largest = min(base.in_features, base.out_features)
        if not 1 <= rank <= largest:
            raise InputError(
                f"rank must be in 1..{largest} for a {base.out_features}x{base.in_features} (out x in) layer, "
                f"got {rank}"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.enabled = True
        device, bound = base.weight.device, 1 / math.sqrt(base.in_features)
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=dtype))
        self.train(base.training)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)

    @property
    def joint(self) -> bool:
        """Whether base and update are made by one op: a 4-bit base with nothing hooked to it, and the update on."""
        base = self.base
        return self.enabled and type(base) is NF4Linear and not (base._forward_hooks or base._forward_pre_hooks)

    @property
    def drop(self) -> float:
        """The dropout of this mode: none outside training."""
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if self.joint and x.is_floating_point():
            return joint_forward(x, [self])[0]
        x = autocast_input(x)
        y = self.base(x)
        if not self.enabled:
            return y
        h = F.dropout(x, self.drop) if self.drop else x
        return lora_update(y, h, self.lora_A, self.lora_B, self.scale)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The dense weight update scale * B A [out, in], in fp32 (float64 for a float64 adapter)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scale * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    # What other code reads from a linear layer is passed through; `weight` is the frozen base's and may be packed.

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"


def joint_forward(x: Tensor, modules: Sequence[LoRALinear], keep: bool = False) -> list[Tensor]:
    """The outputs of joint LoRALinears of one input, 4-bit format and dropout rate; `keep` as in lora_linears4bit."""
    bases = [module.base for module in modules if isinstance(module.base, NF4Linear)]
    return lora_linears4bit(
        autocast_input(x),
        [base.stored for base in bases],
        [base.bias for base in bases],
        [module.lora_A for module in modules],
        [module.lora_B for module in modules],
        [module.scale for module in modules],
        dropout=modules[0].drop,
        keep=keep,
    )
