"""AdamW, and its names with 8-bit states."""

from typing import Any

from .optimizer import FlatOptimizer
from .paging import Budget
from .update import ADAMW


class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay: torch.optim.AdamW's update, in fp32 whatever the parameters' dtype (or fp64).

    bits: 8 keeps both moments as 8-bit codes with a scale for every 256 elements, for parameters of at least
        `min_8bit_size` elements (smaller ones, and fp64, keep full moments: they cost nothing and matter more).
    stochastic_rounding: bf16 parameters are rounded up or down at random so that the mean is exact, and small updates
        are not lost. The draw depends on parameter, step and element alone. Other dtypes are rounded to nearest.
    max_grad_norm: gradients count scaled down to this norm over all groups (they are not changed themselves), and a
        step whose norm is not finite is skipped. math.inf only measures and skips. None: no norm is taken.
    budget: None keeps all state on the parameters' device. "auto" keeps there what fits beside the model, a number what
        fits in so many bytes; the rest is paged in and out of pinned host memory during a step (docs/paging.md).
    lr may be a 0-d tensor. Sparse or complex parameters and two devices are refused with ValueError.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        min_8bit_size: int = 4096,
        budget: Budget | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            ADAMW,
            bits=bits,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
            min_8bit_size=min_8bit_size,
            budget=budget,
        )


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
