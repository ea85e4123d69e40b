"""Lion, and its names with 8-bit states."""

from typing import Any

from .optimizer import FlatOptimizer
from .paging import Budget
from .update import LION


class Lion(FlatOptimizer):
    """Steps of one size in the direction of an interpolated momentum's sign (Chen et al., arXiv 2302.06675).

    One moment, so half of AdamW's state; a good learning rate is 3 to 10 times smaller than AdamW's, and weight decay
    as many times larger. The other arguments are AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        min_8bit_size: int = 4096,
        budget: Budget | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            LION,
            bits=bits,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
            min_8bit_size=min_8bit_size,
            budget=budget,
        )


class Lion8bit(Lion):
    """Lion with bits=8."""

    def __init__(self, params: Any, lr: Any = 1e-4, **settings: Any) -> None:
        super().__init__(params, lr, **{"bits": 8, **settings})


class PagedLion(Lion):
    """Lion with budget="auto"."""

    def __init__(self, params: Any, lr: Any = 1e-4, **settings: Any) -> None:
        super().__init__(params, lr, **{"budget": "auto", **settings})


class PagedLion8bit(Lion):
    """Lion with bits=8 and budget="auto"."""

    def __init__(self, params: Any, lr: Any = 1e-4, **settings: Any) -> None:
        super().__init__(params, lr, **{"bits": 8, "budget": "auto", **settings})
