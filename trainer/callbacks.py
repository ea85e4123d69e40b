"""Parts of one's own that every trainer takes: looking on while a run goes, and the options that name the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Required, TypedDict

from torch.optim import Optimizer

from ..data.encode import Dataset
from ..data.read import Rows
from ..errors import InputError
from .loop import MakeOptimizer, MakeScheduler, Run
from .metrics import finite

Record = Mapping[str, float | None]  # metrics by name; None for what is not finite


class Callback:
    """Looks on while a trainer's run goes; a subclass has the events that it wants. What on_step and on_evaluate return
    is recorded in metrics.jsonl beside the trainer's own metrics; `run.stopped = True` ends it after the step, as
    patience does. What a callback draws from torch's generators is missing in the run: it has one of its own."""

    def on_step(self, run: Run, record: Record) -> Mapping[str, float] | None:
        """After an update, with its metrics; on a GPU once they are there, which is during the next one."""

    def on_evaluate(self, run: Run, metrics: Record) -> Mapping[str, float] | None:
        """After an evaluation; the names of what is returned get val_ before them."""

    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """After a checkpoint was written."""


class Options(TypedDict, total=False):
    """What every trainer takes besides model, tokenizer, config and loss; see `Trainer`."""

    train: Required[Rows | Dataset]
    val: Rows | Dataset | float | None
    optimizer: Optimizer | MakeOptimizer | None
    scheduler: MakeScheduler | None
    callbacks: Sequence[Callback]
    adapter: str


def told(callbacks: Sequence[Callback], event: str, run: Run, record: Record) -> dict[str, float | None]:
    """A record with the metrics that callbacks give at an event. InputError for names that are taken."""
    told = dict(record)
    for callback in callbacks:
        own = getattr(callback, event)(run, record) or {}
        told = joined(told, {name: finite(float(value)) for name, value in own.items()}, "a callback")
    return told


def joined(record: Record, own: Record, whose: str) -> dict[str, float | None]:
    """A record with more metrics. InputError for names that are taken."""
    if taken := own.keys() & record.keys():
        raise InputError(f"{whose}'s metrics must have names of their own, got {', '.join(sorted(taken))}")
    return {**record, **own}
