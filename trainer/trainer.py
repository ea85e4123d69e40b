"""What every kind of training shares: rows, parameters, the run around the loop, what is saved at its end.

A kind of training (`sft`, `dpo`, `reward`, `distill`) says how rows are read, how examples become batches, and what the
loss of a batch is. Everything else, from the order of rows to resuming bit for bit, is here and in the loop.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import fingerprint, split_validation
from ..data.order import step_indices, steps_per_epoch
from ..errors import InputError
from ..lora.attach import lora_modules
from ..lora.files import adapter_state, load_adapter_state, save_adapter
from ..models.protocol import CausalLM
from .config import TrainingConfig
from .disk import lock_folder
from .evaluate import evaluating
from .interrupt import Interrupt, interrupts
from .loop import Loop, StepData, Weights, find_checkpoint
from .memory import memory_free, saved_bytes
from .metrics import Display, Metrics
from .progress import display_for
from .report import draw_curves
from .step import Stepper, StepResult, Sums, means

TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}  # of micro_batch="auto": matmuls run at full speed from there on


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with. Losses are means in nats (of trained tokens, or of pairs); `signal` is set when one ended
    the run."""

    out: Path
    steps: int
    loss: float | None  # of the last step that was applied
    val: Mapping[str, float | None]  # figures of the best evaluation: its loss and what else this training reports
    best_step: int
    skipped_steps: int
    tokens: int  # seen in training, padding not counted
    stopped_early: bool
    signal: int | None
    checkpoint: Path | None

    @property
    def val_loss(self) -> float | None:
        """The best loss on the validation rows."""
        return self.val.get("loss")


class Trainer(ABC):
    """Base of the trainers: model, rows and options in; adapter, metrics and curves out.

    train: a JSONL file, several, or a dataset. val: the same, or a fraction of train below 1, or None.
    Raises InputError for rows, options or a model that cannot be trained on.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Any, *, train: Any, config: TrainingConfig, val: Any | float | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.parameters = self._parameters()
        self.device = next(iter(self.parameters.values())).device
        self.pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        self.token_budget = TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])
        self.train_set = self._dataset(train)
        self.val_set: Any = None
        if isinstance(val, float):
            self.train_set, self.val_set = split_validation(self.train_set, val)
        elif val is not None:
            self.val_set = self._dataset(val)
        if not self.train_set.examples:
            raise InputError("there are no rows to train on")
        if self.val_set is not None and not self.val_set.examples:
            raise InputError(
                "no row was left for validation: rows of one prompt stay on one side of a split, and these all have "
                "one. Give validation rows of their own, or none"
            )

    # What a kind of training says.

    @abstractmethod
    def load_rows(self, paths: Sequence[str | Path]) -> Any:
        """Files to a dataset."""

    @abstractmethod
    def micro_batches(self, dataset: Any, numbers: Sequence[int], micro_batch: int | str) -> list[Any]:
        """The examples with these numbers, each once, as batches of one forward pass each, on the CPU."""

    @abstractmethod
    def sums(self, batch: Any) -> Sums:
        """Loss and figures of a batch, summed; the loss carries the gradient."""

    def tokens_of(self, example: Any) -> int:
        """How many tokens an example takes through the model."""
        return len(example.ids)

    def begin(self, dataset: Any, batches: Sequence[Any]) -> None:
        """Called with all batches of a step, or of an evaluation, before the first forward pass."""

    def applied(self, result: StepResult) -> None:
        """Called after a step's update."""

    def state(self) -> Weights:
        """What a resumed run needs besides weights and optimizer; tensors by name."""
        return {}

    def load_state(self, state: Weights) -> None:
        """Take back what `state` gave."""

    def describe(self, figures: dict[str, float]) -> dict[str, float]:
        """The figures of an evaluation, with what follows from them."""
        return figures

    def constants(self) -> dict[str, float]:
        """Figures of the data that every record carries."""
        return {}

    def save(self, out: Path) -> None:
        """Write what was trained into the run's folder."""
        save_adapter(self.model, str(out), base_model=self.model.source)

    def weights(self) -> Weights:
        """All that training changes, by name: the adapter."""
        return adapter_state(self.model)

    def load_weights(self, state: Weights) -> None:
        """Put back what `weights` gave."""
        load_adapter_state(self.model, state)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.model)

    # The run.

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train_set.examples), self.config.batch_size)

    @property
    def total(self) -> int:
        """Optimizer steps in all."""
        return self.config.steps or self.config.epochs * self.steps_per_epoch

    @property
    def evaluates(self) -> bool:
        return self.val_set is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is trained and validated on."""
        sets = [self.train_set] + ([self.val_set] if self.val_set is not None else [])
        return hashlib.sha256("".join(fingerprint(dataset) for dataset in sets).encode()).hexdigest()

    def train(self, display: Callable[[int, int], Display] | None = display_for) -> TrainResult:
        """Run to the end, or until SIGINT or SIGTERM, after which everything is saved and `result.signal` set.

        display: called with (steps in all, steps done before); None shows nothing.
        """
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out), torch.random.fork_rng(), interrupts() as interrupt:
            notes: list[str] = []
            checkpoint = find_checkpoint(self.config, notes.append)
            torch.manual_seed(self.config.seed)
            stepper = self._stepper()
            self.model.checkpointing = self._checkpointing()
            start = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
            displays = [display(self.total, start)] if display else []
            metrics = Metrics(out, displays, log=self.config.log, resumed_at=start)
            loop = Loop(self, stepper, self.config, metrics, interrupt)
            try:
                for note in notes:
                    metrics.message(note)
                if checkpoint is not None:
                    loop.resume(checkpoint)
                    metrics.message(f"resumed from {checkpoint}")
                self.model.train()
                loop.run()
            finally:
                metrics.close()
                self.model.checkpointing = False
            return self._finish(loop, interrupt)

    def step_data(self, step: int) -> StepData:
        """The examples of step `step` (from 0), laid out in micro-batches."""
        examples = self.train_set.examples
        numbers = step_indices(len(examples), self.config.batch_size, step, self.config.seed)
        batches = self.micro_batches(self.train_set, numbers, self.config.micro_batch)
        self.begin(self.train_set, batches)
        return StepData(batches, [examples[i].source for i in numbers])

    def evaluate(self, interrupt: Interrupt) -> dict[str, float] | None:
        """Mean loss and figures on the validation rows, dropout off; None when it was interrupted."""
        batches = self.micro_batches(self.val_set, range(len(self.val_set.examples)), "auto")
        loss, figures, weight = 0.0, list[Mapping[str, Tensor]](), 0
        with evaluating(self.model):
            self.begin(self.val_set, batches)
            for batch in batches:
                if interrupt:
                    return None
                sums = self.sums(batch)
                loss += sums.loss.item()
                figures.append(sums.figures)
                weight += batch.weight
        return self.describe({"loss": loss / weight, **{name: v.item() for name, v in means(figures).items()}})

    def _dataset(self, rows: Any) -> Any:
        if hasattr(rows, "examples"):
            return rows
        return self.load_rows([rows] if isinstance(rows, (str, Path)) else list(rows))

    def _stepper(self) -> Stepper:
        config = self.config
        return Stepper(
            self.parameters,
            self.sums,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            lora_plus=config.lora_plus,
            lr_scale=config.lr_scale,
            name=config.optimizer,
            budget=config.optimizer_budget,
            stochastic_rounding=config.stochastic_rounding,
        )

    def _checkpointing(self) -> bool:
        """Recompute activations? `auto` measures what the longest example keeps and scales it to a micro-batch."""
        if self.config.checkpointing != "auto":
            return self.config.checkpointing == "on"
        sizes = [self.tokens_of(example) for example in self.train_set.examples]
        longest = max(sizes)
        (batch,) = self.micro_batches(self.train_set, [sizes.index(longest)], 1)
        per_token = saved_bytes(self.model, lambda: self.sums(batch).loss) / longest
        tokens = self.token_budget if self.config.micro_batch == "auto" else int(self.config.micro_batch) * longest
        return per_token * max(tokens, longest) > memory_free(self.device) / 2 > 0

    def _finish(self, loop: Loop, interrupt: Interrupt) -> TrainResult:
        out, state = Path(self.config.out), loop.state
        if not interrupt:
            self.save(out)
        if loop.metrics.path.stat().st_size:
            draw_curves(loop.metrics.path, out / "loss.png")
        newest = loop.checkpoints / f"step-{state.saved:06d}"
        return TrainResult(
            out=out,
            steps=state.done,
            loss=state.last_loss,
            val=state.best_figures,
            best_step=state.best_step,
            skipped_steps=state.skipped,
            tokens=state.tokens,
            stopped_early=state.stopped_early,
            signal=interrupt.signal,
            checkpoint=newest if newest.is_dir() else None,
        )


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters that training moves, by name. Raises InputError for a model without an adapter."""
    if not lora_modules(model):
        raise InputError("the model has no adapter to train: call fourbit.attach first, or train all weights (full)")
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
