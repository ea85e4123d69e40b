"""What a run knows while it goes, and what it ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import nn

from ..data.encode import Dataset
from ..data.template import FILE as TEMPLATE
from ..errors import InputError
from ..files import write_text
from ..lora.layer import DEFAULT, adapter_layers, adapter_parameters, adapters_of, refuse_left_out
from ..settings import LARGEST, setting


def _counted(help: str) -> Any:
    return setting(0, help, least=0, most=LARGEST)


@dataclass
class RunState:
    """All that a run knows besides tensors; saved as JSON in every checkpoint."""

    done: int = _counted("steps finished")
    evaluated: int = _counted("value of `done` at the last evaluation")
    saved: int = _counted("value of `done` in the last checkpoint")
    best_metrics: dict[str, float | None] = setting({}, "of the best evaluation")
    best_step: int = _counted("steps done at it")
    without_better: int = _counted("evaluations since")
    skipped: int = _counted("steps that were not applied")
    skipped_in_a_row: int = _counted("of them, those at the end")
    tokens: int = _counted("seen in training, padding not counted")
    stopped_early: bool = False
    last_loss: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with. Losses are means in nats (of trained tokens, or of pairs); `signal` is set when one ended
    the run."""

    out: Path
    steps: int
    loss: float | None  # of the last step that was applied
    val: Mapping[str, float | None]  # metrics of the best evaluation: its loss and what else this training reports
    best_step: int
    skipped_steps: int
    tokens: int  # seen in training, padding not counted
    stopped_early: bool
    unmoved: Sequence[str]  # trained tensors that the first steps (50 after warm-up) did not move
    signal: int | None
    checkpoint: Path | None
    peak_bytes: int  # most memory that it took beside what was there when it began, on a CPU of its own (RssAnon)

    @property
    def val_loss(self) -> float | None:
        """The loss on the validation rows, of the best evaluation."""
        return self.val.get("loss")


def adapter_to_train(model: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """What trains of the adapter `name`, by name. InputError unless the model carries it, trainable and active."""
    found, layers = adapter_parameters(model, name), adapter_layers(model).values()
    if not layers:
        raise InputError("the model has no adapter to train: call fourbit.attach first, or train all weights (full)")
    if not found:
        problem, advice = "is not there", "attach or load the one to train under that name"
    elif not any(parameter.requires_grad for parameter in found.values()):
        problem, advice = "is frozen", "attach or load it after all others, or with trainable=True"
    elif not all(name in layer.active for layer in layers if name in layer.adapters):
        problem, advice = "is not active", f"call fourbit.use(model, '{name}')"
    elif (weight := active_adapters(model)[name]) != 1:
        problem, advice = f"counts {weight:g} times", f"train it with weight 1: fourbit.use(model, '{name}')"
    else:
        refuse_left_out(model, name)
        return {own: parameter for own, parameter in found.items() if parameter.requires_grad}
    there = ", ".join(sorted({other for layer in layers for other in layer.adapters}))
    raise InputError(
        f"what is trained is the adapter '{name}', and it {problem} (the model carries {there}; active: "
        f"{', '.join(active_adapters(model)) or 'none'}): {advice}"
    )


def left_out(sets: Sequence[Dataset]) -> float:
    """The share of the rows that were read that no set has."""
    lost = sum(rows.report.dropped.total + rows.report.skipped.total for rows in sets)
    return lost / (lost + sum(map(len, sets)))


def template_text(rows: Dataset) -> str | None:
    """The chat template that rendered the rows, as the text of a file: it goes with what was trained."""
    return None if rows.template is None else rows.template.portable()


def save_template(folder: Path, rows: Dataset) -> None:
    """Write that file into `folder`, or take away an older run's where there is none."""
    if (text := template_text(rows)) is not None:
        write_text(folder / TEMPLATE, text)
    else:
        (folder / TEMPLATE).unlink(missing_ok=True)


def free_name(model: nn.Module, name: str) -> str:
    """The name, or the first of name-2, name-3 and so on, that no adapter of the model has."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if not adapters_of(model, one))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters that are active on any layer, by name, sorted, and how much each counts."""
    return dict(sorted(pair for layer in adapter_layers(model).values() for pair in layer.active.items()))
