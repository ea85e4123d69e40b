"""IA3 (Liu et al. 2022, arXiv 2205.05638, section 3.3): a learned vector scales keys, values and feedforward inputs."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.dispatch import autocast_input
from .adapter import Adapter
from .config import LoRAConfig
from .linear4bit import sizes


class IA3(Adapter):
    """base(x) * l, its bias scaled too, or base(x * l) where the layer's settings name `feedforward`; l starts at 1.

    As in PEFT `ia3_l` is [out, 1] or [1, in]. The paper's layers: target=["k_proj", "v_proj", "down_proj"],
    feedforward=["down_proj"], as a Llama calls them."""

    peft_type = "IA3"

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.on_input, (within, out) = bool(config.feedforward), sizes(cast(nn.Linear, base))
        shape = (1, within) if self.on_input else (out, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=next(base.parameters()).device))

    def over(self, x: Tensor, base: nn.Module) -> Tensor:
        x, factors = autocast_input(x), self.ia3_l.flatten()
        if self.on_input:
            return cast(Tensor, base((x * factors).to(x.dtype)))
        y = base(x)
        return cast(Tensor, (y * factors).to(y.dtype))

    def delta(self, weight: Tensor) -> Tensor:
        return (self.ia3_l.to(weight.dtype) - 1) * weight

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        return None if self.on_input else (self.ia3_l.flatten() - 1) * bias

    def is_idle(self) -> bool:
        return bool((self.ia3_l == 1).all())

    def peft_fields(self) -> dict[str, Any]:
        return {"feedforward_modules": self.on_input}
