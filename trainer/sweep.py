"""Several adapters trained at once over one base: what the base computes, it computes once for the rows of all.

Each adapter has a trainer of its own (rows, order, rates, clipping, optimizer, evaluations, checkpoints, folder), which
runs as it would alone, step by step (`Trainer.course`). A sweep makes the gradients of all of them together, no more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, TypeVar

import torch

from ..data.batch import Batch, sent
from ..data.encode import Dataset
from ..data.order import fingerprint
from ..errors import InputError, NumericError
from ..kernels.chunked_head import TokenScores
from ..lora.active import using
from ..lora.layer import AdapterLayer, adapter_layers
from ..lora.rows import rows
from ..models.recompute import leanness
from .config import PAGED
from .interrupt import interrupts
from .loop import token_sums
from .losses.tokens import batch_token_scores
from .metrics import Display
from .progress import display_for
from .resume import repeating
from .run import TrainResult
from .sft import SFTTrainer
from .step import Sums, backward_or_retry

Value = TypeVar("Value")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep ended with, by the names of its adapters."""

    results: Mapping[str, TrainResult]
    failed: Mapping[str, str]  # those whose numbers were not finite, and what ended them
    best: str | None  # the one with the lowest validation loss, where all are validated on the same rows

    def table(self) -> str:
        """A line for each adapter: its name (of a `grid`, its settings), steps, losses, and a mark at the best."""
        lines: list[tuple[str, ...]] = [("adapter", "steps", "train loss", "validation loss", "")]
        for name, result in self.results.items():
            losses = ("-" if loss is None else f"{loss:.4f}" for loss in (result.loss, result.val_loss))
            lines.append((name, str(result.steps), *losses, "best" * (name == self.best)))
        lines += [(name, "-", "-", "-", f"failed: {why.splitlines()[0]}") for name, why in self.failed.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def grid(sweep: Mapping[str, Sequence[Value]]) -> dict[str, dict[str, Value]]:
    """Every combination of values, by a name made of them that an adapter and a folder can have."""
    found: dict[str, dict[str, Value]] = {}
    for values in product(*sweep.values()):
        own = dict(zip(sweep, values, strict=True))
        name = re.sub(r"[^\w=,+-]+", "_", ",".join(f"{key}={value}" for key, value in own.items()))[:100]
        found[f"{name}-{len(found) + 1}" if name in found else name] = own
    return found


class SweepTrainer:
    """Trains the adapters of several `SFTTrainer`s on one model at once, each as its own trainer would alone.

    trainers: each of another adapter of the model (its `adapter`), with a folder of its own (`config.out`). Batches,
    order, losses, rates, clipping and steps of each are those that it has alone; dropout draws other masks, and the
    first says layout (packing, micro_batch) and deterministic. One whose loss is no number ends where it would alone,
    and the others go on. Budgets of paged optimizers add up. Raises InputError for trainers that cannot go together.
    """

    def __init__(self, trainers: Sequence[SFTTrainer]) -> None:
        self.trainers, self.model = {trainer.adapter: trainer for trainer in trainers}, trainers[0].model
        self.config, self.device = trainers[0].config, trainers[0].device
        same = all(type(t).sums is SFTTrainer.sums and not t.loss and t.model is self.model for t in trainers)
        if not same or len(self.trainers) < len(trainers) or len({t.config.out for t in trainers}) < len(trainers):
            rule = "SFTTrainers on one model with no loss of their own, each with its own adapter and folder (out)"
            raise InputError(f"a sweep takes {rule}; got {[(t.adapter, t.config.out) for t in trainers]}")
        head = self.model.lm_head
        if isinstance(head, AdapterLayer) and head.adapters.keys() & self.trainers.keys():
            raise InputError("a sweep takes no adapter of the output head (target, train_tokens): leave it out there")
        for parameter in [p for t in trainers for p in t.parameters.values()]:  # attaching the next one froze them
            parameter.requires_grad_()

    def train(self, display: Callable[..., Display] | None = display_for) -> SweepResult:
        """As `Trainer.train`, of all; raises the first one's NumericError where all failed. display: called for each
        with (steps in all, steps done before, the adapter's name); None shows nothing."""
        failed, layers, courses = dict[str, NumericError](), adapter_layers(self.model).values(), dict[str, Any]()
        with repeating(self.config, self.device), interrupts() as stop, using(self.model), ExitStack() as stack:
            for name, trainer in self.trainers.items():
                shown = display and partial(display, name=name)
                courses[name] = stack.enter_context(closing(trainer.course(stop, shown)))
            while courses:
                batches: dict[str, list[Batch]] = {}
                for name in [*courses]:
                    for layer in layers:  # what a trainer does itself, as evaluations, is with its own adapter
                        layer.active = {name: 1.0} if name in layer.adapters else {}
                    try:
                        batches[name] = next(courses[name])
                    except (StopIteration, NumericError) as error:
                        failed |= {name: error} if isinstance(error, NumericError) else {}
                        self.trainers[name].run.make_room()  # no step touches its state any more
                        del courses[name]
                if batches:
                    self._forward_backward(batches)
        if len(failed) == len(self.trainers):
            raise next(iter(failed.values()))
        results = {name: trainer.result for name, trainer in self.trainers.items() if name not in failed}
        losses = {name: result.val_loss for name, result in results.items() if result.val_loss is not None}
        alike = len({t.val_set and fingerprint(t.val_set) for t in self.trainers.values()}) == 1
        best = min(losses, key=losses.__getitem__) if losses and alike else None
        return SweepResult(results, {name: str(error) for name, error in failed.items()}, best)

    def _forward_backward(self, batches: Mapping[str, Sequence[Batch]]) -> None:
        """The gradients of one step of each of these adapters, whose examples share forward passes."""
        names, trainers = [*batches], [self.trainers[name] for name in batches]
        weights = [sum(batch.weight for batch in own) for own in batches.values()]
        numbers = [(i, number) for i, own in enumerate(batches.values()) for batch in own for number in batch.numbers]
        examples = [replace(trainers[i].train_set.examples[number], group=i) for i, number in numbers]
        owners = torch.tensor([i for i, _ in numbers], device="cpu")

        def backward(batch: Batch) -> Sums:
            """Of all adapters' means, each over its own tokens of the step, so that none changes another's gradient."""
            width = batch.input_ids.shape[1]
            whose = owners[[batch.numbers[p] for p in batch.owners or range(batch.examples)]]
            sizes = [b - a for a, b, *_ in batch.spans] if batch.spans else [width] * batch.examples
            whose = whose.repeat_interleave(whose.new_tensor(sizes))
            with rows(self.model, names, whose.view(-1, width)):
                scores = batch_token_scores(self.model, batch)
            counts = whose[batch.rows].bincount(minlength=len(names)).tolist()
            order = sent(whose[batch.rows].argsort(stable=True), self.model.device)
            parts = zip(*(values.index_select(0, order).split(counts) for values in scores), strict=True)
            own = {i: token_sums(TokenScores(*part)) for i, part in enumerate(parts) if counts[i]}
            loss = torch.stack([sums.loss / weights[i] for i, sums in own.items()]).sum()
            loss.backward()
            for i, sums in own.items():  # not before: memory may have run out
                part = sums._replace(loss=sums.loss.detach())
                trainers[i].run.gathered.append((part.loss / weights[i], [part]))
            return Sums(loss.detach())

        config, parameters = trainers[0].config, [p for t in trainers for p in t.parameters.values()]
        self.model.checkpointing = max((trainer.recompute for trainer in trainers), key=leanness)
        for batch in trainers[0].micro_batches(Dataset("sft", examples), range(len(examples)), config.micro_batch):
            if any(trainer.config.optimizer.startswith(PAGED) for trainer in trainers):
                backward_or_retry(parameters, partial(backward, batch), lambda: [t.run.make_room() for t in trainers])
            else:
                backward(batch)
