"""One optimizer step: gradients of all micro-batches, clipping, the non-finite guard, and the update.

Nothing here waits for the device. Whether a step may be applied is decided on the device by a flag that the optimizer's
kernel reads (the mechanism of loss scaling); the host looks at the flag of the step before while this one runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError
from .optimizers import make_optimizer, paging
from .retry import backward_or_retry


class MicroBatch(Protocol):
    """What loop and stepper read of one forward pass' batch."""

    input_ids: Tensor  # [B, T] int64, on the CPU

    @property
    def tokens(self) -> int:
        """Run through the model, padding not counted."""

    @property
    def trained(self) -> int:
        """Tokens that are predicted."""

    @property
    def weight(self) -> int:
        """What its summed loss is a sum over: trained tokens, or pairs. A step's loss is divided by the step's."""


class Sums(NamedTuple):
    """What a batch's forward pass gives: its loss, and figures to report."""

    loss: Tensor  # 0-d: the sum over what the batch's weight counts (trained tokens, pairs); carries the gradient
    figures: Mapping[str, Tensor]  # each [2]: a sum, and the number of things it is over; without gradient


def summed(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """A figure of `Sums`: [2], the sum of `values` (where `mask` is true) and how many they are; float64, no graph."""
    values = values.detach().to(torch.float64)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum(dtype=torch.float64)])


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, still on the device: reading it waits for the step."""

    loss: Tensor  # 0-d float64: mean over the step's weight
    figures: Mapping[str, Tensor]  # 0-d means over the whole step
    grad_norm: Tensor  # 0-d: global norm before clipping
    skipped: Tensor  # 0-d: 1 when loss or norm was not finite, so no weight moved; 0 otherwise
    optimizer: Mapping[str, int | float]  # bytes of its state, and what paging did in this step; known to the host

    def read_figures(self) -> dict[str, float | None]:
        """The figures on the host, in one copy; None for what is not finite."""
        if not self.figures:
            return {}
        values = torch.stack([value.double() for value in self.figures.values()]).tolist()
        return {n: v if math.isfinite(v) else None for n, v in zip(self.figures, values, strict=True)}


class Stepper:
    """An optimizer over named parameters; a step's loss is the sum over its batches divided by their `weight`.

    parameters: name -> parameter to train. sums: a batch (still on the CPU) -> its loss and figures. The rest is for
    `make_optimizer`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sums: Callable[[Any], Sums],
        **options: Any,
    ) -> None:
        self.parameters = dict(parameters)
        self.sums = sums
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(self.parameters, **options)
        self.retries = 0  # micro-batches that ran out of memory and were run again
        self._names = {p: name for name, p in self.parameters.items()}
        self._paged: dict[str, int | float] = {}

    def step(self, batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """One update from the micro-batches of one step, at this learning rate."""
        weight = sum(batch.weight for batch in batches)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        figures: dict[int, Mapping[str, Tensor]] = {}  # by batch: one that runs out of memory is run twice

        def part(i: int) -> Tensor:
            sums = self.sums(batches[i])
            figures[i] = sums.figures
            # Divided by the whole step's weight, so any split into micro-batches gives the same gradients.
            return sums.loss / weight

        for i in range(len(batches)):
            loss += self._backward(partial(part, i))
        return self._update(loss, means(list(figures.values())), learning_rate)

    def _backward(self, part: Callable[[], Tensor]) -> Tensor:
        """Add a micro-batch's gradients; where memory runs out and pages can make room, on the second attempt."""
        if self.optimizer.budget is not None:
            return backward_or_retry(list(self.parameters.values()), part, self._make_room)
        value = part()
        value.backward()
        return value.detach()

    def _make_room(self) -> None:
        self.retries += 1
        self.optimizer.evict_all()

    def _update(self, loss: Tensor, figures: Mapping[str, Tensor], learning_rate: float) -> StepResult:
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        # Where it is 1, or the norm is not finite, weights, moments and step counts stay as they are.
        optimizer.found_inf = (~torch.isfinite(loss)).float()
        optimizer.step()
        for parameter in self.parameters.values():  # those too that no group has
            parameter.grad = None
        assert optimizer.grad_norm is not None and optimizer.skipped is not None
        return StepResult(loss, figures, optimizer.grad_norm, optimizer.skipped, self._state_figures())

    def _state_figures(self) -> dict[str, int | float]:
        device, host = self.optimizer.state_bytes()
        before, self._paged = self._paged, paging(self.optimizer)
        if self._paged:
            self._paged["page_retries"] = self.retries
        moved = {name: round(value - before.get(name, 0), 6) for name, value in self._paged.items()}
        return {"optimizer_bytes": device, **({"optimizer_host_bytes": host} if moved else {}), **moved}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `parameter.slot`; empty before the first step."""
        names = self._order()
        saved = self.optimizer.state_dict()["state"]
        return {f"{names[i]}.{slot}": value for i, slots in saved.items() for slot, value in slots.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises InputError when a name or a shape does not fit these parameters."""
        numbers = {name: number for number, name in enumerate(self._order())}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, slot = key.rpartition(".")
            if name not in numbers:
                raise InputError(f"optimizer state {key!r} {tuple(value.shape)} fits no parameter trained here")
            slots.setdefault(numbers[name], {})[slot] = value
        try:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        except ValueError as error:
            raise InputError(f"the optimizer's state does not fit this run: {error}") from None
        self._paged, self.retries = {}, 0  # the pagers start anew

    def _order(self) -> list[str]:
        """Names in the order in which the optimizer numbers its parameters."""
        return [self._names[p] for group in self.optimizer.param_groups for p in group["params"]]


def means(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each figure of several batches, [2] sum and number, as one 0-d mean."""
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}
    return {name: both[0] / both[1] for name, both in sums.items()}
