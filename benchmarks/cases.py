"""What a benchmark case is: a point, the work it is, and the variants that do it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .timing import LEAST_ROUNDS, Call

OURS = "ours"
GATE_SEED = 7  # of torch's generators before a call that is judged: dropout masks are made again from it

# What each op is timed as, in the order the table prints them.
OPS = {
    "quantize": "dense weight to NF4 with double quantisation",
    "dequantize": "NF4 with double quantisation to the activations' dtype",
    "linear": "4-bit linear, forward",
    "qlora": "4-bit linear with LoRA, forward and backward",
    "lora_cost": "4-bit linear with LoRA, forward, beside the frozen one",
    "grouped": "several LoRA projections of one input (q/k/v, gate/up), forward and backward",
    "memory": "device memory that stacked 4-bit linears with LoRA take, forward and backward",
    "adamw": "AdamW step, 32-bit state",
    "adamw8bit": "AdamW step, 8-bit state",
    "adamw_paged": "AdamW step, 32-bit state of which a quarter fits the budget",
    "layer": "a whole decoder layer with LoRA, forward and backward",
    "step": "a whole training step of the decoder on random weights",
}


@dataclass(frozen=True)
class Point:
    """Where a figure stands. N and K are 0 where an op has more than one matrix; M counts rows, that is, tokens."""

    op: str
    model: str
    projection: str
    N: int
    K: int
    M: int = 0
    rank: int = 0
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """Such as `linear Llama-3-8B q/o M=16`: what --only searches and the table prints."""
        parts = [self.op, self.model, self.projection] + [f"M={self.M}"] * (self.M > 0)
        parts += [f"r={self.rank}"] * (self.rank > 0) + [f"p={self.dropout:g}"] * (self.dropout > 0)
        return " ".join(part for part in parts if part)

    def fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One tool's way. `make` builds its buffers and returns its call; `judge` gives the error over the bound."""

    name: str
    make: Callable[[], Call]
    judge: Callable[[Any], float]
    own: bool = False  # ours: failing is an error of the run, not of a peer
    facts: Callable[[Any], dict[str, Any]] = lambda call: {}  # of its call, for its figure; taken after the timing


@dataclass(frozen=True)
class Work:
    """A built case. Floating-point operations and bytes are the least that the op must do and move."""

    variants: list[Variant]
    flops: float
    bytes: float
    sets: int = 1
    ways: tuple[str, ...] = ("queue",)  # of timing, the first one leading
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it cannot run here
    peak: bool = False  # take the memory of a call too
    least_rounds: int = LEAST_ROUNDS
    extra: dict[str, Any] = field(default_factory=dict)  # more fields for every figure


@dataclass(frozen=True)
class Case:
    """A point and how to build it. Lower priorities run first; what time does not allow for is left out by name."""

    point: Point
    priority: int
    build: Callable[[], Work]


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    cache_bytes: int  # of the last-level cache

    @property
    def small_way(self) -> tuple[str, ...]:
        """Ways for ops of a few microseconds: without launch cost and with it."""
        return ("graph", "wall") if self.device.type == "cuda" else ("wall",)

    @property
    def way(self) -> tuple[str, ...]:
        return ("queue",) if self.device.type == "cuda" else ("wall",)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values in the run's dtype; the same for the same seed."""
        values = torch.randn(*shape, device=self.device, generator=self.generator(seed))
        return (values * scale).to(self.dtype)


def present(missing: str | None, absent: dict[str, str], name: str) -> bool:
    """True where nothing is missing; otherwise the reason is noted under `name`."""
    if missing is not None:
        absent[name] = missing
    return missing is None
