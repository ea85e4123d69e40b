"""The parts of an optimizer step: what a loss gives, what a step leaves, the optimizer, and a backward that may fail.

A long sequence can need for one backward what a paged optimizer's pages take. Its micro-batch is then run again without
them: `backward_or_retry`, the one place that knows. What a micro-batch leaves behind is in its `Sums`, so the attempt
that failed leaves nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import optim
from ..errors import InputError
from ..optim.groups import parameter_groups
from ..optim.optimizer import FlatOptimizer
from .config import PAGED, TrainingConfig, size_in_bytes

Made = TypeVar("Made", bound=object)


class Sums(NamedTuple):
    """What a loss gives for a batch: sums, which add up over the batches of a step to one exact mean."""

    loss: Tensor  # 0-d: the sum over what `weight` counts (trained tokens, pairs); carries the gradient
    metrics: Mapping[str, Tensor] = MappingProxyType({})  # each [2]: a sum, and over how many things; no gradient
    carried: Mapping[str, Tensor] = MappingProxyType({})  # added up over a step's batches, for `Trainer.applied`
    weight: float | Tensor | None = None  # what a step's loss is divided by, summed over it; None: the batch's `weight`
    rest: Callable[[], "Sums"] | None = None  # more of the loss, of a pass that comes when this one's graph is gone


def as_sums(given: Tensor | Sums, batch: object) -> Sums:
    """What a loss gave for a batch, with its weight. Raises InputError for a mean, and for a grid, in which places may
    not count."""
    if isinstance(given, Sums):
        return given if given.weight is not None else given._replace(weight=getattr(batch, "weight", None))
    if given.ndim != 1:
        got = f"the shape {list(given.shape)}" if given.ndim else "one number"
        raise InputError(
            f"a loss gives the value of each token, row or pair that counts ([N]), or Sums with a weight, got {got}: "
            "means of micro-batches do not add up to the step's mean, and places that do not count add to no weight"
        )
    return Sums(given.sum(dtype=torch.float64), weight=given.numel())


def parts_of(given: Sums, backward: bool) -> list[Sums]:
    """A loss and the rest of it, without graphs; backward: each after its backward pass. What all weigh is what the
    first does. A part's graph is gone, with all it held, before the next is asked for."""
    found, weight, rest = list[Sums](), given.weight, given.rest
    while True:
        if backward:
            given.loss.backward()
        found.append(given._replace(loss=given.loss.detach(), weight=weight, rest=None))
        del given
        if rest is None:
            return found
        given, weight = rest(), 0
        rest = given.rest


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, still on the device: reading it waits for the step."""

    loss: Tensor  # 0-d float64: mean over the step's weight
    metrics: Mapping[str, Tensor]  # 0-d means over the whole step
    carried: Mapping[str, Tensor]  # sums over the whole step
    grad_norm: Tensor  # 0-d: global norm before clipping
    skipped: Tensor  # 0-d: 1 when loss or norm was not finite, so no weight moved; 0 otherwise
    optimizer: Mapping[str, int | float]  # bytes of its state, and what paging did in this step; known to the host

    def read_metrics(self) -> dict[str, float | None]:
        """The metrics on the host, in one copy; None for what is not finite."""
        if not self.metrics:
            return {}
        values = torch.stack([value.double() for value in self.metrics.values()]).tolist()
        return {n: v if math.isfinite(v) else None for n, v in zip(self.metrics, values, strict=True)}


def totals(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each entry added up over several batches."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}


def means(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each metric of several batches, [2] sum and number, as one 0-d mean."""
    return {name: both[0] / both[1] for name, both in totals(parts).items()}


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> FlatOptimizer:
    """An optimizer that measures the gradients' norm, clips it where max_grad_norm is above 0, and skips what is not
    finite. Its groups begin at their peak rates, and "lr_scale" of each is its factor on the rate of a step.

    Raises InputError for an lr_scale or lora_plus that matches nothing, or leaves nothing to train."""
    try:
        how: dict[str, Any] = {name: getattr(config, name) for name in ("lr", "weight_decay", "lora_plus", "lr_scale")}
        groups: list[dict[str, Any]] = parameter_groups(parameters.items(), **how)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not groups:
        raise InputError("lr_scale leaves nothing to train: the factor of every parameter is 0")
    kind = optim.Lion if "lion" in config.optimizer else optim.AdamW
    budget: Any = "auto" if config.optimizer_budget == "auto" else size_in_bytes(config.optimizer_budget)
    return kind(
        groups,
        lr=config.lr,
        bits=8 if config.optimizer.endswith("8bit") else 32,
        budget=budget if config.optimizer.startswith(PAGED) else None,
        max_grad_norm=config.max_grad_norm or math.inf,
        rounding=config.rounding,
        seed=config.seed,
    )


def backward_or_retry(
    parameters: Sequence[nn.Parameter], backward: Callable[[], Made], make_room: Callable[[], object]
) -> Made:
    """Run backward(), which leaves gradients in .grad. One OutOfMemoryError is answered by make_room() and a retry.

    All gradients of a micro-batch count, or none: those of earlier ones are set aside while it runs, and the new ones
    are added when it is through. These are the additions that autograd would have made, in the same order, so the sums
    are equal bit for bit. It costs no copy; from the second micro-batch of a step on, memory for one more set of
    gradients. The retry draws the same random numbers. Whatever backward or make_room raises, parameters' gradients
    then are as they were before."""
    device, made = parameters[0].device, None
    rng = rng_states(device)
    with gradients_apart(parameters) as new:
        with suppress(torch.OutOfMemoryError):
            made = backward()
        if made is None:  # and what it had taken is free again: no exception holds its frames
            make_room()
            set_rng_states(rng, device)
            put_gradients(parameters, [None] * len(parameters))
            made = backward()
    add_gradients(parameters, new)
    return made


@contextmanager
def gradients_apart(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """Inside, gradients begin at None; after it, those made there are in the list, and .grad is as it was before."""
    before, made = [p.grad for p in parameters], list[Tensor | None]()
    put_gradients(parameters, [None] * len(parameters))
    try:
        yield made
        made += [p.grad for p in parameters]
    finally:
        put_gradients(parameters, before)


def add_gradients(parameters: Sequence[nn.Parameter], more: Sequence[Tensor | None]) -> None:
    """Add to the parameters' gradients, in place where there is one."""
    both = [(p.grad, new) for p, new in zip(parameters, more, strict=True) if p.grad is not None and new is not None]
    if both:
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
    put_gradients(parameters, [new if p.grad is None else p.grad for p, new in zip(parameters, more, strict=True)])


def put_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Make these the parameters' gradients, one each."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Random generators' states, of the CPU and, where training runs on one, of that CUDA device; no waiting."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing where `rng_states` was taken."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
