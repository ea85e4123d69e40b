"""What a trained policy is compared with: the base, or the adapter as it was at the start; never a second model."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..lora.active import copy_adapter, using
from ..lora.layer import adapters_of
from ..lora.peft_files import adapter_state, load_adapter_state
from ..models.protocol import evaluating
from .losses.tokens import answer_scores
from .run import active_adapters, free_name
from .trainer import Trainer, Weights

REFERENCE = "reference"  # the name, if it is free, of the frozen adapter that the policy started as


class Referenced(Trainer):
    """Base of the trainers whose loss compares with a reference, as `config.reference` says, where `compares` is set
    before `Trainer` is initialised."""

    compares = False
    config: Any
    reference: tuple[str, ...] = ()  # the adapters that are active in it

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.compares:
            self._set_reference()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        found = super().trained_parameters()
        others = [name for name in active_adapters(self.model) if name != self.adapter]
        if others and self.compares:
            raise InputError(
                f"the reference has no other adapter than the trained one's start, and {', '.join(others)} is active "
                f"beside '{self.adapter}': call fourbit.use(model, '{self.adapter}'), or take another loss"
            )
        return found

    def reference_logps(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The reference's log-probability of each answer's tokens, [A, P, L], without gradient; dropout off, and the
        model afterwards as it was before."""
        with evaluating(self.model), using(self.model, *self.reference):
            return answer_scores(self.model, batch, temperature).logps

    def state(self) -> Weights:
        return {f"{REFERENCE}.{n}": t for own in self.reference for n, t in adapter_state(self.model, own).items()}

    def load_state(self, state: Weights) -> None:
        for name in self.reference:
            then = {n.removeprefix(f"{REFERENCE}."): t for n, t in state.items() if n.startswith(f"{REFERENCE}.")}
            load_adapter_state(self.model, then, name)

    def _set_reference(self) -> None:
        kind = self.config.reference
        if kind == "auto":
            idle = all(part.is_idle() for part in adapters_of(self.model, self.adapter).values())
            kind = "base" if idle else "start"
        self.config = replace(self.config, reference=kind)  # so that checkpoints and the run's folder say which
        if kind == "start":
            self.reference = (free_name(self.model, REFERENCE),)
            copy_adapter(self.model, self.adapter, *self.reference)
