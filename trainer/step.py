"""One optimizer step: gradients of all micro-batches, clipping, the non-finite guard, and the update.

Nothing here waits for the device. Whether a step may be applied is decided on the device by a flag that the optimizer's
kernel reads (the mechanism of loss scaling); the host looks at the flag of the step before while this one runs.

A long sequence can need for one backward what a paged optimizer's pages take. Its micro-batch is then run again without
them: `backward_or_retry`, the one place that knows. What a micro-batch leaves behind is in its `Sums`, so the attempt
that failed leaves nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import optim
from ..data.batch import Batch
from ..errors import InputError
from ..optim.groups import parameter_groups
from ..optim.optimizer import FlatOptimizer
from ..optim.unmoved import checksums, unmoved
from .config import PAGED, TrainingConfig, size_in_bytes

PAGE_COUNTERS = ("hits", "misses", "evictions", "bytes_in", "bytes_out", "stall_seconds")


class Sums(NamedTuple):
    """What a batch's forward pass gives: its loss, metrics to report, and what the kind of training carries on."""

    loss: Tensor  # 0-d: the sum over what the batch's weight counts (trained tokens, pairs); carries the gradient
    metrics: Mapping[str, Tensor]  # each [2]: a sum, and the number of things it is over; without gradient
    carried: Mapping[str, Tensor] = MappingProxyType({})  # added up over a step's batches, for `Trainer.applied`


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


class Stepper:
    """An optimizer over named parameters; a step's loss is the sum over its batches divided by their `weight`.
    parameters: name -> parameter to train. sums: a batch (still on the CPU) -> its loss and metrics. Raises InputError
    as `make_optimizer` does."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], sums: Callable[[Any], Sums], config: TrainingConfig
    ) -> None:
        self.parameters = dict(parameters)
        self.sums = sums
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(self.parameters, config)
        self.retries = 0  # micro-batches that ran out of memory and were run again
        self.updates, self.watched = 0, 0  # made by this object; after how many `unmoved` is known (0: never)
        self.unmoved: dict[str, str] = {}  # parameters that are as they were before the first update, and why
        self._checksums: dict[str, Tensor] = {}
        names = {parameter: name for name, parameter in self.parameters.items()}
        # In the order in which the optimizer numbers its parameters.
        self._names = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        self._paged: dict[str, int | float] = {}

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One update from the micro-batches of one step, at this learning rate."""
        if self.updates == 0 < self.watched:
            self._checksums = checksums(self.parameters)
        weight = sum(batch.weight for batch in batches)
        # Divided by the whole step's weight, so any split into micro-batches gives the same gradients.
        parts = [self._gradients(batch, weight) for batch in batches]
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        loss = torch.stack([part.loss.double() for part in parts]).sum()
        # Where it is 1, or the norm is not finite, weights, moments and step counts stay as they are.
        optimizer.found_inf = (~torch.isfinite(loss)).float()
        optimizer.step()
        self.updates += 1
        if self.updates == self.watched:  # here the host waits for the device, once
            self.unmoved = unmoved(self.parameters, self._checksums, optimizer)
        for parameter in self.parameters.values():  # those too that no group has
            parameter.grad = None
        assert optimizer.grad_norm is not None and optimizer.skipped is not None
        metrics, carried = means([part.metrics for part in parts]), totals([part.carried for part in parts])
        return StepResult(loss, metrics, carried, optimizer.grad_norm, optimizer.skipped, self._state_metrics())

    def _gradients(self, batch: Batch, weight: int) -> Sums:
        """Add a micro-batch's gradients; where memory runs out and pages can make room, on the second attempt."""

        def backward() -> Sums:
            sums = self.sums(batch)
            loss = sums.loss / weight
            loss.backward()
            return sums._replace(loss=loss.detach())

        if self.optimizer.budget is None:
            return backward()
        return backward_or_retry(list(self.parameters.values()), backward, self._make_room)

    def _make_room(self) -> None:
        self.retries += 1
        self.optimizer.evict_all()

    def _state_metrics(self) -> dict[str, int | float]:
        device, host = self.optimizer.state_bytes()
        if self.optimizer.pager is None:
            return {"optimizer_bytes": device}
        paged = {f"page_{name}": getattr(self.optimizer.pager.counters, name) for name in PAGE_COUNTERS}
        before, self._paged = self._paged, {**paged, "page_retries": self.retries}
        moved = {name: round(value - before.get(name, 0), 6) for name, value in self._paged.items()}
        return {"optimizer_bytes": device, "optimizer_host_bytes": host, **moved}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `parameter.field`; empty before the first step."""
        saved = self.optimizer.state_dict()["state"]
        return {f"{self._names[i]}.{field}": value for i, fields in saved.items() for field, value in fields.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises InputError when a name or a shape does not fit these parameters."""
        numbers = {name: number for number, name in enumerate(self._names)}
        saved: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, field = key.rpartition(".")
            if name not in numbers:
                raise InputError(f"optimizer state {key!r} {tuple(value.shape)} fits no parameter trained here")
            saved.setdefault(numbers[name], {})[field] = value
        try:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": saved})
        except ValueError as error:
            raise InputError(f"the optimizer's state does not fit this run: {error}") from None
        self._paged, self.retries = {}, 0  # the pager starts anew


def totals(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each entry added up over several batches."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}


def means(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each metric of several batches, [2] sum and number, as one 0-d mean."""
    return {name: both[0] / both[1] for name, both in totals(parts).items()}


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> FlatOptimizer:
    """An optimizer that measures the gradients' norm, clips it where max_grad_norm is above 0, and skips what is not
    finite. Its groups' learning rates are 0, and "lr_scale" of each is the factor on the rate of a step.

    Raises InputError for patterns in lr_scale that match nothing, or leave nothing to train.
    """
    try:
        groups: list[dict[str, Any]] = parameter_groups(
            parameters.items(),
            lr=0.0,
            weight_decay=config.weight_decay,
            lora_plus=config.lora_plus,
            lr_scale=config.lr_scale,
        )
    except ValueError as error:
        raise InputError(f"lr_scale: {error}") from None
    if not groups:
        raise InputError("lr_scale leaves nothing to train: the factor of every parameter is 0")
    kind = optim.Lion if "lion" in config.optimizer else optim.AdamW
    budget: Any = "auto" if config.optimizer_budget == "auto" else size_in_bytes(config.optimizer_budget)
    return kind(
        groups,
        lr=0.0,
        bits=8 if config.optimizer.endswith("8bit") else 32,
        budget=budget if config.optimizer.startswith(PAGED) else None,
        max_grad_norm=config.max_grad_norm or math.inf,
        rounding=config.rounding,
        seed=config.seed,
    )


def backward_or_retry(
    parameters: Sequence[nn.Parameter], backward: Callable[[], Sums], make_room: Callable[[], object]
) -> Sums:
    """Run backward(), which leaves gradients in .grad. One OutOfMemoryError is answered by make_room() and a retry.

    All gradients of a micro-batch count, or none: those of earlier ones are set aside while it runs, and the new ones
    are added when it is through. These are the additions that autograd would have made, in the same order, so the sums
    are equal bit for bit. It costs no copy; from the second micro-batch of a step on, memory for one more set of
    gradients. The retry draws the same random numbers. Whatever backward or make_room raises, parameters' gradients
    then are as they were before.
    """
    device, nothing = parameters[0].device, [None] * len(parameters)
    rng, before, sums = rng_states(device), [p.grad for p in parameters], None
    try:
        _put(parameters, nothing)
        with suppress(torch.OutOfMemoryError):
            sums = backward()
        if sums is None:  # and what it had taken is free again: no exception holds its frames
            make_room()
            set_rng_states(rng, device)
            _put(parameters, nothing)
            sums = backward()
    except BaseException:
        _put(parameters, before)
        raise
    both = [(old, p.grad) for p, old in zip(parameters, before, strict=True) if old is not None and p.grad is not None]
    if both:
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
    _put(parameters, [p.grad if old is None else old for p, old in zip(parameters, before, strict=True)])
    return sums


def _put(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
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
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
