"""Lion, and its names with 8-bit states."""

from typing import Any

from .optimizer import FlatOptimizer
from .update import LION


class Lion(FlatOptimizer):
    """Steps of one size in the direction of an interpolated momentum's sign (Chen et al., arXiv 2302.06675).

    One moment, so half of AdamW's state; a good learning rate is 3 to 10 times smaller than AdamW's, and weight decay
    as many times larger. The other options are AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, LION, **options)


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
