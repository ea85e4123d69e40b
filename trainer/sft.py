"""Supervised fine-tuning: data, model and options in; adapter, metrics and a loss curve out."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batch import Batch, micro_batches
from ..data.dataset import Dataset, fingerprint, load_dataset, split_validation
from ..data.order import step_indices, steps_per_epoch
from ..errors import InputError
from ..lora.attach import lora_modules
from ..lora.files import adapter_state, load_adapter_state, save_adapter
from ..models.save import save_model
from .config import SFTConfig
from .disk import lock_folder
from .evaluate import batch_loss_sum, evaluate_loss
from .interrupt import Interrupt, interrupts
from .loop import Loop, StepData, Task, Weights, find_checkpoint
from .memory import memory_free, saved_bytes
from .metrics import Display, Metrics
from .progress import display_for
from .report import draw_loss_curve
from .step import Stepper

TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}  # of micro_batch="auto": matmuls run at full speed from there on

Rows = str | Path | Sequence[str | Path] | Dataset


@dataclass(frozen=True)
class SFTResult:
    """What a run ended with. Losses are means over trained tokens in nats; `signal` is set when one ended the run."""

    out: Path
    steps: int
    loss: float | None  # of the last step that was applied
    val_loss: float | None  # the best one
    best_step: int
    skipped_steps: int
    tokens: int  # seen in training, padding not counted
    stopped_early: bool
    signal: int | None
    checkpoint: Path | None

    @property
    def val_perplexity(self) -> float | None:
        return None if self.val_loss is None else math.exp(min(self.val_loss, 700.0))


class SFTTrainer:
    """Fine-tunes a model on chat rows.

    model: from `fourbit.load`, with an adapter attached, or dense with `config.full`.
    train: a JSONL file, several, or a Dataset. val: the same, or a fraction of train below 1, or None.
    Raises InputError for rows, options or a model that cannot be trained on.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, train: Rows, config: SFTConfig, val: Rows | float | None = None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.parameters = trained_parameters(model, full=config.full)
        self.train_set = self._dataset(train)
        self.val_set: Dataset | None = None
        if isinstance(val, float):
            self.train_set, self.val_set = split_validation(self.train_set, val)
        elif val is not None:
            self.val_set = self._dataset(val)
        if not self.train_set.examples:
            raise InputError("there are no rows to train on")
        self.device = next(iter(self.parameters.values())).device
        self.pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        self.token_budget = TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train_set.examples), self.config.batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.steps or self.config.epochs * self.steps_per_epoch

    def train(self, display: Callable[[int, int], Display] | None = display_for) -> SFTResult:
        """Run to the end, or until SIGINT or SIGTERM, after which everything is saved and `result.signal` set.

        display: called with (steps in all, steps done before); None shows nothing.
        """
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out), torch.random.fork_rng(), interrupts() as interrupt:
            notes: list[str] = []
            checkpoint = find_checkpoint(self.config, notes.append)
            torch.manual_seed(self.config.seed)
            stepper = Stepper(
                self.parameters,
                lambda batch: batch_loss_sum(self.model, batch),
                weight_decay=self.config.weight_decay,
                max_grad_norm=self.config.max_grad_norm,
                lora_plus=self.config.lora_plus,
                lr_scale=self.config.lr_scale,
                name=self.config.optimizer,
                budget=self.config.optimizer_budget,
            )
            self.model.checkpointing = self._checkpointing()
            start = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
            displays = [display(self.total_steps, start)] if display else []
            metrics = Metrics(out, displays, log=self.config.log, resumed_at=start)
            loop = Loop(self._task(), stepper, self.config, metrics, interrupt)
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

    def _dataset(self, rows: Rows) -> Dataset:
        if isinstance(rows, Dataset):
            return rows
        return load_dataset(
            [rows] if isinstance(rows, (str, Path)) else list(rows),
            self.tokenizer,
            template=self.config.template,
            max_length=self.config.max_length,
            loss_on=self.config.loss_on,
            on_bad_row=self.config.on_bad_row,
        )

    def _task(self) -> Task:
        return Task(
            step_data=self.step_data,
            weights=lambda: trained_state(self.model, self.parameters, full=self.config.full),
            load_weights=lambda state: load_trained_state(self.model, self.parameters, state, full=self.config.full),
            fingerprint=self._fingerprint(),
            total=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            evaluate=self._evaluate if self.val_set is not None else None,
        )

    def step_data(self, step: int) -> StepData:
        """The examples of step `step` (from 0), laid out in micro-batches."""
        examples = self.train_set.examples
        chosen = [examples[i] for i in step_indices(len(examples), self.config.batch_size, step, self.config.seed)]
        return StepData(self._micro_batches(chosen), [example.source for example in chosen])

    def _micro_batches(self, examples: Sequence[Any]) -> list[Batch]:
        return micro_batches(
            examples,
            packing=self.config.packing,
            micro_batch=self.config.micro_batch,
            token_budget=self.token_budget,
            pad_id=self.pad_id,
        )

    def _evaluate(self, interrupt: Interrupt) -> float | None:
        assert self.val_set is not None
        return evaluate_loss(
            self.model,
            self.val_set.examples,
            packing=self.config.packing,
            token_budget=self.token_budget,
            pad_id=self.pad_id,
            stop=lambda: bool(interrupt),
        )

    def _fingerprint(self) -> str:
        parts = [fingerprint(self.train_set)] + ([fingerprint(self.val_set)] if self.val_set is not None else [])
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _checkpointing(self) -> bool:
        """Recompute activations? `auto` measures what the longest example keeps and scales it to a micro-batch."""
        if self.config.checkpointing != "auto":
            return self.config.checkpointing == "on"
        longest = max(self.train_set.examples, key=lambda example: len(example.ids))
        (batch,) = micro_batches([longest], packing=True, micro_batch=1, token_budget=1, pad_id=self.pad_id)
        per_token = saved_bytes(self.model, lambda: batch_loss_sum(self.model, batch)) / len(longest.ids)
        tokens = self.token_budget if self.config.micro_batch == "auto" else self.config.micro_batch * len(longest.ids)
        return per_token * max(tokens, len(longest.ids)) > memory_free(self.device) / 2 > 0

    def _finish(self, loop: Loop, interrupt: Interrupt) -> SFTResult:
        out, state = Path(self.config.out), loop.state
        if not interrupt:
            if self.config.full:
                save_model(self.model, self.tokenizer, out)
            else:
                save_adapter(self.model, str(out), base_model=str(getattr(self.model, "source", "")))
        if loop.metrics.path.stat().st_size:
            draw_loss_curve(loop.metrics.path, out / "loss.png")
        newest = loop.checkpoints / f"step-{state.saved:06d}"
        return SFTResult(
            out=out,
            steps=state.done,
            loss=state.last_loss,
            val_loss=state.best_loss,
            best_step=state.best_step,
            skipped_steps=state.skipped,
            tokens=state.tokens,
            stopped_early=state.stopped_early,
            signal=interrupt.signal,
            checkpoint=newest if newest.is_dir() else None,
        )


def trained_parameters(model: nn.Module, *, full: bool) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name. Raises InputError when the model does not fit the choice."""
    adapters = lora_modules(model)
    if full:
        if adapters or any(not p.is_floating_point() for p in [*model.parameters(), *model.buffers()]):
            raise InputError(
                "full training needs a dense model without an adapter; load it with quantize='none' (--quant none)"
            )
        model.requires_grad_()
        return dict(model.named_parameters())
    if not adapters:
        raise InputError("the model has no adapter to train: call fourbit.attach first, or train all weights (full)")
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_state(model: nn.Module, parameters: dict[str, nn.Parameter], *, full: bool) -> Weights:
    """What training changes: all weights trained if `full`, else the adapter."""
    return {n: p.detach() for n, p in parameters.items()} if full else adapter_state(model)


def load_trained_state(model: nn.Module, parameters: dict[str, nn.Parameter], state: Weights, *, full: bool) -> None:
    """Put back what `trained_state` gave."""
    if not full:
        load_adapter_state(model, state)
        return
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
