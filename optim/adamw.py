"""AdamW, and its names with 8-bit and paged states."""

from typing import Any

from .optimizer import FlatOptimizer
from .update import ADAMW


class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay: torch.optim.AdamW's update, in fp32 whatever the parameters' dtype (or fp64).

    options: `bits`, `stochastic_rounding`, `max_grad_norm`, `min_8bit_size` and `budget`, as FlatOptimizer has them.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, ADAMW, **options)


class AdamW8bit(AdamW):
    """AdamW with bits=8."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"bits": 8, **settings})


class PagedAdamW(AdamW):
    """AdamW with budget="auto"."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"budget": "auto", **settings})


class PagedAdamW8bit(AdamW):
    """AdamW with bits=8 and budget="auto"."""

    def __init__(self, params: Any, lr: Any = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"bits": 8, "budget": "auto", **settings})
