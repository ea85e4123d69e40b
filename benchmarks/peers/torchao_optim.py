"""torchao's AdamW with 8-bit state: a tensor subclass, and one compiled graph that unrolls every parameter."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from . import import_problem

NAME = "torchao 8-bit AdamW"
PLACES = ("torchao.optim", "torchao.prototype.low_bit_optim")  # the second before 0.11


def missing() -> str | None:
    problems = [import_problem(place) for place in PLACES]
    return None if None in problems else problems[0]


def adamw(parameters: Sequence[nn.Parameter], **settings: Any) -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        from torchao.prototype.low_bit_optim import AdamW8bit
    return AdamW8bit(parameters, **settings)
