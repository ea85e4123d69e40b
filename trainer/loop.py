"""The training loop: steps, evaluations, checkpoints, early stopping, interruption, resuming.

It knows no task and no model family. A task brings the micro-batches of step k; the stepper knows their loss. Step k
depends on nothing but k and the configuration, so the data cursor of a checkpoint is one number.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import InputError, NumericError
from ..optim.schedule import learning_rate
from .checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from .config import TrainingConfig, changed_options
from .disk import remove_stale
from .interrupt import Interrupt
from .memory import memory_used
from .metrics import Metrics
from .rng import rng_states, set_rng_states
from .step import MicroBatch, Stepper, StepResult

SKIPS_ALLOWED = 2  # in a row; one more ends the run

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class StepData:
    """What one optimizer step trains on: its micro-batches, still on the CPU, and where its rows come from."""

    batches: Sequence[MicroBatch]
    sources: list[str]


@dataclass
class RunState:
    """All that a run knows besides tensors; saved as JSON in every checkpoint."""

    done: int = 0  # optimizer steps finished
    evaluated: int = 0  # value of `done` at the last evaluation
    saved: int = 0
    best_loss: float | None = None
    best_figures: dict[str, float | None] = field(default_factory=dict)  # of the same evaluation
    best_step: int = 0
    without_better: int = 0  # evaluations since the best one
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    stopped_early: bool = False
    last_loss: float | None = None


class Task(Protocol):
    """The seam between the loop and what is trained: `trainer.Trainer` is one."""

    @property
    def total(self) -> int:
        """Steps in all."""

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""

    @property
    def fingerprint(self) -> str:
        """The same for the same data."""

    def step_data(self, step: int) -> StepData: ...
    def applied(self, result: StepResult) -> None:
        """After a step's update."""

    def evaluate(self, interrupt: Interrupt) -> dict[str, float] | None:
        """Figures on the validation rows, `loss` among them; None when interrupted."""

    def constants(self) -> dict[str, float]:
        """Figures that every record of a step carries."""

    def weights(self) -> Weights:
        """Name -> tensor of all that training changes."""

    def load_weights(self, state: Weights) -> None: ...
    def state(self) -> Weights:
        """What a resumed run needs besides."""

    def load_state(self, state: Weights) -> None: ...


@dataclass
class Loop:
    """Runs a Task to its end or to an interruption. `run` may be called once."""

    task: Task
    stepper: Stepper
    config: TrainingConfig
    metrics: Metrics
    interrupt: Interrupt
    state: RunState = field(default_factory=RunState)
    best: Weights | None = None
    _pending: tuple[int, StepData, StepResult, float] | None = None
    _clock: float = 0.0

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.out) / "checkpoints"

    def run(self) -> None:
        """Ends with the trained weights in place: the best ones with keep_best and validation, else the last."""
        self._clock = time.perf_counter()
        while True:
            done = self.state.done
            ended = done >= self.task.total or self.state.stopped_early
            if self._due(self.config.eval_every, done, ended) and self.state.evaluated != done:
                self._evaluate()
                ended = ended or self.state.stopped_early
            if self.interrupt or (self._due(self.config.save_every, done, ended) and self.state.saved != done):
                self._save()
            if self.interrupt or ended:
                break
            self._step()
        if ended and not self.interrupt and self.best is not None:
            self.task.load_weights(self.best)

    def _due(self, every: int | None, done: int, ended: bool) -> bool:
        return done > 0 and (ended or done % (every or self.task.steps_per_epoch) == 0)

    def _step(self) -> None:
        step = self.state.done
        data = self.task.step_data(step)
        rate = learning_rate(
            step,
            total=self.task.total,
            peak=self.config.lr,
            warmup=self.config.warmup_steps(self.task.total),
            schedule=self.config.schedule,
            decay=self.config.decay_steps(self.task.total),
        )
        result = self.stepper.step(data.batches, rate)
        self.task.applied(result)
        self._settle()  # the step before this one: its figures are there without waiting for this one
        self._pending = (step, data, result, rate)
        self.state.done += 1
        if self.stepper.device.type == "cpu":
            self._settle()  # already computed: nothing to wait for, and its time is its own

    def _settle(self) -> None:
        """Read the figures of the last step off the device, record them, and stop a run that has gone bad."""
        if self._pending is None:
            return
        (step, data, result, rate), self._pending = self._pending, None
        loss, skipped = result.loss.item(), bool(result.skipped.item())
        now = time.perf_counter()
        tokens = sum(batch.tokens for batch in data.batches)
        state = self.state
        state.tokens += tokens
        state.skipped += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        state.last_loss = loss if not skipped else state.last_loss
        what, used = memory_used(self.stepper.device)
        norm = result.grad_norm.item()
        self.metrics.write(
            {
                "step": step + 1,
                "epoch": round((step + 1) / self.task.steps_per_epoch, 4),
                "loss": _finite(loss),
                **result.read_figures(),
                **self.task.constants(),
                "lr": rate,
                "grad_norm": _finite(norm),
                "skipped": skipped,
                "tokens": tokens,
                "trained_tokens": sum(batch.trained for batch in data.batches),
                "tokens_per_second": round(tokens / (now - self._clock), 2),
                what: used,
                **result.optimizer,
            }
        )
        self._clock = now
        if state.skipped_in_a_row > SKIPS_ALLOWED:
            self._give_up(step, data, loss, norm)

    def _give_up(self, step: int, data: StepData, loss: float, norm: float) -> None:
        dump = Path(self.config.out) / f"nonfinite-step-{step + 1}.json"
        rows = {"sources": data.sources, "input_ids": [batch.input_ids.tolist() for batch in data.batches]}
        dump.write_text(json.dumps({"step": step + 1, "loss": str(loss), "grad_norm": str(norm), **rows}))
        raise NumericError(
            f"loss or gradient was not finite in {self.state.skipped_in_a_row} steps in a row (step {step + 1}: loss "
            f"{loss}, gradient norm {norm}); none of them changed a weight. The last batch is in {dump}; the newest "
            f"checkpoint is unharmed. Usual causes: a learning rate too high (lr={self.config.lr:g}), float16 overflow."
        )

    def _evaluate(self) -> None:
        self._settle()
        if not self.task.evaluates:
            self.state.evaluated = self.state.done
            return
        figures = self.task.evaluate(self.interrupt)
        if figures is None:
            return  # interrupted: the resumed run does it again
        state, loss = self.state, figures["loss"]
        state.evaluated = state.done
        state.saved = min(state.saved, state.done - 1)  # a checkpoint made before this evaluation lacks its outcome
        finite = {name: _finite(value) for name, value in figures.items()}
        self.metrics.write({"step": state.done, **{f"val_{name}": value for name, value in finite.items()}})
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step, state.without_better = loss, state.done, 0
            state.best_figures = finite
            if self.config.keep_best:
                self.best = {name: tensor.detach().clone() for name, tensor in self.task.weights().items()}
        else:
            state.without_better += 1
            state.stopped_early = self.config.patience is not None and state.without_better >= self.config.patience
        self._clock = time.perf_counter()  # an evaluation is not training time

    def _save(self) -> None:
        self._settle()
        if self.state.done == 0 or self.state.saved == self.state.done:
            return
        self.state.saved = self.state.done
        rng = rng_states(self.stepper.device)
        groups = {"weights": self.task.weights(), "optimizer": self.stepper.state(), "rng": rng}
        if task := self.task.state():
            groups["task"] = task
        if self.best is not None:
            groups["best"] = self.best
        state = {"run": asdict(self.state), "config": _plain(self.config), "data": self.task.fingerprint}
        save_checkpoint(self.checkpoints, self.state.done, groups, state, keep=self.config.keep)
        self._clock = time.perf_counter()

    def resume(self, path: Path) -> None:
        """Take up a checkpoint. Raises InputError when it belongs to other data or other options."""
        tensors, state = load_checkpoint(path)
        if changes := changed_options(state["config"], self.config):
            raise InputError(
                f"{path} was written by a run with other options ({'; '.join(changes)}); use the same ones"
            )
        if state["data"] != self.task.fingerprint:
            raise InputError(f"{path} was written by a run on other training data; resume with the same data files")
        self.state = RunState(**state["run"])
        self.task.load_weights(tensors["weights"])
        self.task.load_state(tensors.get("task", {}))
        self.stepper.load_state(tensors["optimizer"])
        self.best = tensors.get("best")
        set_rng_states(tensors["rng"], self.stepper.device)


def find_checkpoint(config: TrainingConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that config.resume names, None for a fresh start. InputError when out holds a run already."""
    folder = Path(config.out) / "checkpoints"
    if folder.is_dir():
        remove_stale(folder)  # what a killed run left half-written; it may have been killed after its last save
    if config.resume not in (None, "auto"):
        path = Path(str(config.resume))
        if not path.is_dir() or not path.name.rpartition("-")[2].isdecimal():
            raise InputError(f"resume must be auto or a checkpoint folder such as {folder / 'step-000100'}, got {path}")
        return path
    newest, problems = newest_checkpoint(folder)
    for problem in problems:
        say(problem)
    if config.resume is None and newest is not None:
        raise InputError(
            f"{config.out} already holds a run ({newest.name}); go on with --resume auto, or choose another --out"
        )
    return newest


def _plain(config: TrainingConfig) -> dict[str, Any]:
    """The options as JSON gives them back: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _finite(value: float) -> float | None:
    """JSON has no NaN: a figure that is none is null."""
    return value if math.isfinite(value) else None
