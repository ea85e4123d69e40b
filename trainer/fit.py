"""Whether a training fits: what its largest pass takes, what each layer keeps so that it does, how large a pass is."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.batch import Batch, MicroBatch, micro_batches
from ..data.encode import Dataset
from ..data.order import step_indices
from ..errors import shown
from ..kernels.dispatch import memory_free
from ..models.protocol import CausalLM
from ..models.recompute import Checkpointing, Keep, keeps
from .config import KEPT, TrainingConfig
from .loop import Run
from .planner import Case, Forecast, bound, state_bytes
from .step import Sums


class Fitted(ABC):
    """The part of a trainer that asks the planner."""

    model: CausalLM
    device: torch.device
    config: TrainingConfig
    train_set: Dataset
    parameters: Mapping[str, nn.Parameter]  # what is trained, by name
    run: Run
    total: int  # steps
    token_budget: int  # of a pass, where micro_batch is auto
    recompute: Checkpointing  # of the run
    foreseen: str  # what memory a run takes, where that was in doubt

    @abstractmethod
    def sums(self, batch: Batch) -> Tensor | Sums:
        """Loss and metrics of a batch, summed; the loss carries the gradient. May be called twice for one batch."""

    def micro_batches(self, dataset: Dataset, numbers: Sequence[int], micro_batch: MicroBatch) -> list[Batch]:
        """The examples with these numbers, each once, as batches of one forward pass each, on the CPU."""
        how: Any = {"packing": self.config.packing, "token_budget": self.token_budget, "micro_batch": micro_batch}
        return micro_batches([(i, dataset.examples[i]) for i in numbers], forks_up_to=self.model.forks_up_to, **how)

    def tokens_a_step(self) -> float:
        """Tokens that a step runs, the mean of the first few: what texts begin with in common counts once."""
        steps, rows, of = min(self.total, 16), len(self.train_set.examples), self.config
        every = (step_indices(rows, of.batch_size, step, of.seed) for step in range(steps))
        return sum(b.tokens for own in every for b in self.micro_batches(self.train_set, own, of.micro_batch)) / steps

    def recomputes(self) -> Checkpointing:
        """What layers keep for backward; `auto`: as much as fits in the free memory, after which `micro_batch` auto
        makes passes smaller, down to one example. What cannot be foreseen costs no run."""
        if self.config.checkpointing != "auto":
            return KEPT[self.config.checkpointing]
        try:
            return self._fitted()
        except Exception as error:
            self.foreseen = f"memory: not foreseen ({type(error).__name__}: {shown(str(error))[1:-1]})"
            return "products"

    def _fitted(self) -> Checkpointing:
        while room := memory_free(self.device) * 4 // 5:
            case = self.case()
            if bound(self.model, case.batch.tokens, max(case.sizes)) <= room:
                break
            words, found = self._shared(case, room)
            if found.beside <= room or self.config.micro_batch != "auto" or self.token_budget <= max(case.sizes):
                self.foreseen = f"memory: {found.beside / 2**30:.1f} GiB foreseen beside the weights"
                if found.beside > room:
                    lever = next(iter(case.levers(words)), None)
                    self.foreseen += ": it may not fit" + (f"; {lever} would save most" if lever else "")
                return words
            self.token_budget //= 2
        return "products"

    def _shared(self, case: Case, room: int) -> tuple[list[Keep], Forecast]:
        """The words of all layers and what they take, of so many bytes; the optimizer's pages get what is left. As many
        layers as needed run again before state waits in the host's memory: it would cross the bus at every step."""
        optimizer: Any = self.run.optimizer
        waits = max(0, state_bytes(self.config, self.parameters.values()) - case.forecast().parts["optimizer"])
        waits *= case.device == "cuda" and getattr(optimizer, "budget", None) == "auto"  # two pages are foreseen there
        found = case.mixed(words := case.words(room - waits))
        if found.beside > room - waits:
            found = case.mixed(words := case.words(room))
        if waits:
            optimizer.cap = max(0, room - found.beside + found.parts["optimizer"])
        return words, found

    def foreseen_bytes(self) -> int:
        """What the run was to take beside what is there when it begins; 0 where that cannot be foreseen."""
        try:
            case = self.case()
            found = case.mixed(keeps(self.recompute, case.layers))
        except Exception:
            return 0
        return found.beside + (found.parts["framework"] if case.device == "cpu" else 0)

    def case(self) -> Case:
        """The pass that takes most: of a step of the longest examples the one of most tokens."""
        sizes = [example.size(self.config.packing, self.model.forks_up_to) for example in self.train_set.examples]
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[: self.config.batch_size]
        batches = self.micro_batches(self.train_set, order, self.config.micro_batch)
        largest = max(batches, key=lambda batch: batch.input_ids.numel())
        device, sizes = "cuda" if self.device.type == "cuda" else "cpu", [sizes[i] for i in order]
        return Case(self.model, largest, self.config, self._sums_of, device=device, passes=len(batches), sizes=sizes)

    def _sums_of(self, model: CausalLM, batch: Batch) -> Tensor | Sums:
        return self.on(model).sums(batch)

    def on(self, model: CausalLM) -> Self:
        """This trainer with another model in the place of its own, such as a forecast's."""
        other = copy.copy(self)
        other.model, other.device = model, model.device
        return other
