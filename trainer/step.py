"""One optimizer step: gradients of all micro-batches, clipping, the non-finite guard, AdamW.

Nothing here waits for the device. Whether a step may be applied is decided on the device by a flag that AdamW's fused
kernel reads (the mechanism of loss scaling); the host looks at the flag of the step before while this one runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..optim.groups import parameter_groups


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, still on the device: reading it waits for the step."""

    loss: Tensor  # 0-d float64: mean over the step's trained tokens
    grad_norm: Tensor  # 0-d: global norm before clipping
    skipped: Tensor  # 0-d: 1 when loss or norm was not finite, so no weight moved; 0 otherwise


class Stepper:
    """AdamW over named parameters; the loss of a step is its sum over trained tokens divided by their number.

    parameters: name -> parameter to train. loss_sum: a batch on the device -> 0-d sum of its token losses.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss_sum: Callable[[Batch], Tensor],
        *,
        weight_decay: float,
        max_grad_norm: float,
        lora_plus: float = 1.0,
        lr_scale: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.loss_sum = loss_sum
        self.max_grad_norm = max_grad_norm
        self.device = next(iter(self.parameters.values())).device
        groups = _groups(self.parameters, weight_decay=weight_decay, lora_plus=lora_plus, lr_scale=lr_scale or {})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One update from the micro-batches of one step, at this learning rate."""
        trained = sum(batch.trained for batch in batches)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            # Divided by the whole step's count, so any split into micro-batches gives the same gradients.
            part = self.loss_sum(batch) / trained
            part.backward()
            loss += part.detach()
        return self._update(loss, learning_rate)

    def _update(self, loss: Tensor, learning_rate: float) -> StepResult:
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        parameters = [p for p in trained if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        skipped = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        # Fused AdamW leaves weights, moments and its step count alone where found_inf is 1.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        for parameter in self.parameters.values():  # those too that no group has
            parameter.grad = None
        return StepResult(loss, norm, skipped)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `parameter.slot`; empty before the first step."""
        return {
            f"{name}.{slot}": value
            for name, parameter in self.parameters.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises InputError when a name or a shape does not fit these parameters."""
        for key, value in state.items():
            name, _, slot = key.rpartition(".")
            parameter = self.parameters.get(name)
            if parameter is None or (slot != "step" and value.shape != parameter.shape):
                raise InputError(f"optimizer state {key!r} {tuple(value.shape)} fits no parameter trained here")
            self.optimizer.state[parameter][slot] = value.to(parameter.device)


def _groups(
    parameters: Mapping[str, nn.Parameter], *, weight_decay: float, lora_plus: float, lr_scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate each step sets; InputError for patterns that match none, or freeze all."""
    try:
        groups = parameter_groups(
            parameters.items(), lr=0.0, weight_decay=weight_decay, lora_plus=lora_plus, lr_scale=lr_scale
        )
    except ValueError as error:
        raise InputError(f"lr_scale: {error}") from None
    if not groups:
        raise InputError("lr_scale leaves nothing to train: the factor of every parameter is 0")
    return groups
