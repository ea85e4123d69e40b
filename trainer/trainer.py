"""The training loop, and what every kind of training shares: read it top-down.

A kind of training (`sft`, `preference`, `reward`, `distill`) says how rows are read, how examples become batches, and
what the loss of a batch is. The rest is here: the order of rows, steps, metrics, evaluations, checkpoints, the best
weights, early stopping, interruption, resuming bit for bit, what is saved at the end. Step k depends on nothing but k,
the configuration and what a checkpoint holds, so the data cursor of a checkpoint is one number.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.encode import Dataset, load_rows
from ..data.order import fingerprint, split_validation, step_indices
from ..data.protocol import AnyTokenizer
from ..data.read import Rows
from ..data.sample import Kind
from ..errors import InputError
from ..lora.layer import DEFAULT
from ..lora.peft_files import save_adapter
from ..models.foreign import as_causal_lm
from ..models.protocol import CausalLM, evaluating
from ..optim.unmoved import notice
from ..outputs import check_free, lock_folder
from ..settings import read_fields
from ..text.tokenizer_folder import as_tokenizer
from .callbacks import Callback, joined, told
from .checkpoint import STATE, checkpoint_to_resume, load_checkpoint, resuming, save_checkpoint
from .config import COURSE, OF_OPTIMIZER, TrainingConfig
from .fit import Fitted
from .interrupt import Interrupt, interrupts
from .loop import MakeOptimizer, MakeScheduler, Run
from .metrics import Display, Metrics, finite
from .planner import memory_used, peak_from_now, state_bytes
from .progress import display_for
from .report import draw_curves, nonfinite
from .resume import SavedState, as_json, basis, check_resumed, described, layout, repeating, template_to_resume
from .run import RunState, TrainResult, adapter_to_train, left_out, save_template
from .step import StepResult, Sums, as_sums, make_optimizer, means, parts_of

SKIPS_ALLOWED = 2  # in a row; one more ends the run
WATCHED = 50  # steps after warm-up in which every trained tensor should have moved
TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}  # of micro_batch="auto": matmuls run at full speed from there on
Weights = dict[str, Tensor]
Pending = tuple[int, Sequence[Batch], list[str], StepResult, float]  # step, batches, sources, result, rate


class Trainer(Fitted):
    """Base of the trainers: model, rows and options in; adapter, metrics and curves out.

    train: a JSONL file, several, or a dataset. val: the same, or a fraction of train below 1, or None.
    loss: instead of the trainer's own; see there what it is given. It returns the value of each token or pair, [N].
    optimizer: instead of the config's: one of torch.optim's kind on what is trained, or a function of that list; its
        groups' rates are the schedule's peaks. scheduler: makes torch's for it, instead of the config's schedule.
    adapter: the name of the one that is trained.
    Raises InputError for rows, options or a model that cannot be trained on."""

    kind: Kind = "sft"  # of the rows
    takes_loss: ClassVar[bool] = True
    best_metric: ClassVar[str] = "loss"  # of an evaluation: what keep_best and patience go by
    best_is: ClassVar[Literal["lowest", "highest"]] = "lowest"

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnyTokenizer,
        *,
        train: Rows | Dataset,
        config: TrainingConfig,
        val: Rows | Dataset | float | None = None,
        loss: Callable[..., Tensor | Sums] | None = None,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        callbacks: Sequence[Callback] = (),
        adapter: str = DEFAULT,
    ) -> None:
        self.model, self.tokenizer, self.callbacks = as_causal_lm(model), as_tokenizer(tokenizer), callbacks
        self.adapter = adapter
        self.config = config = config if self.model.packs else replace(config, packing=False)
        self.loss, self.optimizer, self.scheduler = loss, optimizer, scheduler
        if loss is not None and not self.takes_loss:
            raise InputError(f"{type(self).__name__} has a loss of its own: leave out loss, or build on fourbit.Run")
        if optimizer is not None:
            config.refuse(OF_OPTIMIZER, "an optimizer of your own has its own")
        if scheduler is not None:
            config.refuse(COURSE - {"epochs", "steps"}, "a scheduler of your own decides the rates")
        self.parameters = self.trained_parameters()
        self.device = next(iter(self.parameters.values())).device
        self.token_budget = TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])
        read = any(not isinstance(rows, Dataset | float | None) for rows in (train, val))
        template = template_to_resume(config, self.tokenizer, config.template) if read else None
        self.train_set = load_rows(config, self.tokenizer, train, self.kind, name="train", template=template)
        self.val_set: Dataset | None = None
        if isinstance(val, float):
            self.train_set, self.val_set = split_validation(self.train_set, val)
        elif val is not None:
            self.val_set = load_rows(config, self.tokenizer, val, self.kind, name="val", template=template)
        config.check_rows(len(self.train_set), None if self.val_set is None else len(self.val_set))
        self.steps_per_epoch = config.epoch_steps(len(self.train_set))
        self.total = config.total_steps(len(self.train_set))  # steps in all
        self.foreseen = ""  # what memory a run takes, where that was in doubt
        self.interrupt = Interrupt()  # a run has its own
        self._pending: Pending | None = None  # an update whose metrics are still on the device
        self.run = self.new_run()

    def begin(self, dataset: Dataset, batches: Sequence[Batch]) -> None:
        """Called with all batches of a step, or of an evaluation, before the first forward pass."""

    def applied(self, result: StepResult) -> None:
        """Called after an update."""

    def state(self) -> Weights:
        """What a resumed run needs besides weights and optimizer; tensors by name."""
        return {}

    def load_state(self, state: Weights) -> None:
        """Take back what `state` gave."""

    def describe(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of an evaluation, with what follows from them."""
        return metrics

    def depends(self) -> dict[str, str]:
        """What the run stands on besides rows and options, by name: resumed with another it would be another run."""
        own = {"loss": self.loss, "optimizer": self.optimizer, "scheduler": self.scheduler}
        stands_on = basis(self.model, self.adapter, self.parameters.values()) | {"trainer": type(self).__name__}
        return stands_on | {what: described(given) for what, given in own.items() if given is not None}

    # What is trained: the adapter, unless a kind says otherwise.

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return adapter_to_train(self.model, self.adapter)

    def save(self, out: Path) -> None:
        """Write what was trained into the run's folder."""
        save_adapter(self.model, str(out), base_model=self.model.source, name=self.adapter)

    @property
    def sets(self) -> list[Dataset]:
        """What is trained and validated on."""
        return [self.train_set] + ([self.val_set] if self.val_set is not None else [])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of that."""
        return hashlib.sha256("".join(map(fingerprint, self.sets)).encode()).hexdigest()

    def train(self, display: Callable[[int, int], Display] | None = display_for) -> TrainResult:
        """Run to the end, or until SIGINT or SIGTERM, after which everything is saved and `result.signal` set.
        display: called with (steps in all, steps done before); None shows nothing."""
        with repeating(self.config, self.device), interrupts() as stop, closing(self.course(stop, display)) as course:
            for batches in course:
                self.run.forward_backward(*batches)
        return self.result

    def course(
        self, interrupt: Interrupt, display: Callable[[int, int], Display] | None = None
    ) -> Generator[list[Batch], None, None]:
        """`train` without gradients: yields a step's batches, and goes on once `run` has theirs. Sets `result`."""
        self.trained_parameters()  # raises if they have been switched off or frozen since
        self.interrupt, out = interrupt, Path(self.config.out)
        reads = [self.model.source, *{s.place.name for rows in self.sets for s in rows.samples if s.place.in_file}]
        with lock_folder(self.config.out, reads, self.config.resume) as notes:
            checkpoint = checkpoint_to_resume(out, self.config.resume, notes)
            torch.manual_seed(self.config.seed)
            self.depends_on = self.depends()  # once: it reads whole models
            self.progress, self.run = RunState(), self.new_run() if self.run.updates else self.run
            self.run.forget()  # what backward passes of others have left
            needed = state_bytes(self.config, self.parameters.values())
            check_free(out, needed + 2 * sum(tensor.nbytes for tensor in self.run.weights().values()))
            self.best: Weights | None = None
            self._pending = None
            self.recompute, self.peak = self.recomputes(), peak_from_now(self.device)
            notes += [self.foreseen] * bool(self.foreseen)
            if not self.model.packs:
                notes.append("packing is off: this architecture mixes the examples of a row, so rows are padded")
            if checkpoint is not None:  # refused, if it is, before a file of the run is touched
                with resuming(checkpoint, notes):
                    self._resume(checkpoint, notes)
            self.metrics = Metrics(out, self.config.log, self.progress.done, notes)
            try:
                self.model.checkpointing = self.recompute
                if display is not None:
                    self.metrics.display = shown = display(self.total, self.progress.done)
                    for note in notes:
                        shown.message(note)
                self.model.train()
                watched = min(self.total - self.progress.done, self.config.warmup_steps(self.total) + WATCHED)
                self.run.watched = watched if watched > 1 else 0  # LoRA's A gets no gradient while B is 0
                yield from self._loop()
            finally:
                self.metrics.close()
                self.model.checkpointing = False
            self.result = self._finish()

    def _loop(self) -> Iterator[list[Batch]]:
        """Ends with the trained weights in place: the best ones with keep_best and validation, else the last."""
        run, config = self.progress, self.config
        self._clock = time.perf_counter()
        while True:
            run.stopped_early |= self.run.stopped
            ended = run.done >= self.total or run.stopped_early
            if self._due(config.eval_every, ended) and run.evaluated != run.done:
                with self.apart():
                    self._evaluate()
                run.stopped_early |= self.run.stopped
                ended = ended or run.stopped_early
            if self.interrupt or (self._due(config.save_every, ended) and run.saved != run.done):
                with self.apart():
                    self._save()
            if self.interrupt or ended:
                break
            batches, sources = self.step_data(run.done)
            if batches:  # else a signal came while they were made
                yield batches
                self._step(batches, sources)
        if ended and not self.interrupt and self.best is not None:
            self.run.load_weights(self.best)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside is not training time."""
        self._settle()
        yield
        self._clock = time.perf_counter()

    def _due(self, every: int | None, ended: bool) -> bool:
        return self.progress.done > 0 and (ended or self.progress.done % (every or self.steps_per_epoch) == 0)

    def _step(self, batches: list[Batch], sources: list[str]) -> None:
        """The update."""
        step, config = self.progress.done, self.config
        lr = (config.lr if self.optimizer is None else 1.0) * config.rate_factor(step, self.total)
        first = self.run.optimizer.param_groups[0]
        rate = float(first["lr"] if self.scheduler else lr if self.optimizer is None else lr * first["lr_scale"])
        result = self.run.optim_step(None if self.scheduler else lr)
        self.applied(result)
        if self.run.updates == self.run.watched and self.run.unmoved and self.metrics.display:
            self.metrics.display.message(notice(self.run.unmoved, len(self.parameters), self.run.updates))
        self._settle()  # the update before this one: its metrics are there without waiting for this one
        self._pending = step, batches, sources, result, rate
        if self.device.type == "cpu":
            self._settle()  # already computed: nothing to wait for, and its time is its own
        self.progress.done += 1

    def step_data(self, step: int) -> tuple[list[Batch], list[str]]:
        """The examples of step `step` (from 0), laid out in micro-batches, and file and line of each."""
        examples = self.train_set.examples
        numbers = step_indices(len(examples), self.config.batch_size, step, self.config.seed)
        batches = self.micro_batches(self.train_set, numbers, self.config.micro_batch)
        self.begin(self.train_set, batches)
        return batches, [examples[i].source for i in numbers]

    def _settle(self) -> None:
        """Read the metrics of the last update off the device, record them, and stop a run that has gone bad."""
        if self._pending is None:
            return
        (step, batches, sources, result, rate), self._pending, run = self._pending, None, self.progress
        loss, skipped, norm = result.loss.item(), bool(result.skipped.item()), result.grad_norm.item()
        now, tokens = time.perf_counter(), sum(batch.tokens for batch in batches)
        run.tokens += tokens
        run.skipped += skipped
        run.skipped_in_a_row = run.skipped_in_a_row + 1 if skipped else 0
        run.last_loss = loss if not skipped else run.last_loss
        what, used = memory_used(self.device)
        record = {
            "step": step + 1,
            "epoch": round((step + 1) / self.steps_per_epoch, 4),
            "loss": finite(loss),
            **({} if self.kind == "sft" else {"dropped": left_out(self.sets)}),
            "lr": rate,
            "grad_norm": finite(norm),
            "skipped": skipped,
            "tokens": tokens,
            "trained_tokens": sum(batch.trained for batch in batches),
            "tokens_per_second": round(tokens / (now - self._clock), 2),
            what: used,
            **result.optimizer,
        }
        record = joined(record, result.read_metrics(), "a loss")
        self.metrics.write(told(self.callbacks, "on_step", self.run, record))
        self._clock = now
        in_vain = step + 1 == self.total and run.last_loss is None  # the last step, and none has counted
        if skipped and (in_vain or run.skipped_in_a_row > SKIPS_ALLOWED):
            what = f"{run.skipped_in_a_row} steps in a row (step {step + 1}: loss {loss}, gradient norm {norm}"
            raise nonfinite(self.model, self.config, step + 1, sources, batches, what)

    def _evaluate(self) -> None:
        """Validation metrics, and what follows from them: the best weights so far, an early stop."""
        run = self.progress
        try:
            if self.val_set is not None and not (found := self.evaluate(self.interrupt)):
                return  # interrupted: the resumed run does it again
        except Exception:  # which costs no step
            self._save()
            raise
        run.evaluated = run.done
        if self.val_set is None:
            return
        run.saved = min(run.saved, run.done - 1)  # a checkpoint made before this evaluation lacks its outcome
        self.metrics.write({"step": run.done, **{f"val_{name}": value for name, value in found.items()}})
        settled = all(run.done >= course.settled_at for course in self.run.courses)  # else no run can end with it
        if settled and self._is_best(found[self.best_metric]):
            run.best_metrics, run.best_step, run.without_better = found, run.done, 0
            if self.config.keep_best:
                self.best = {name: tensor.detach().clone() for name, tensor in self.run.weights().items()}
        elif settled:
            run.without_better += 1
            run.stopped_early |= self.config.patience is not None and run.without_better >= self.config.patience

    def _is_best(self, value: float | None) -> bool:
        before = self.progress.best_metrics.get(self.best_metric)
        if value is None or before is None:
            return value is not None
        return value < before if self.best_is == "lowest" else value > before

    def evaluate(self, interrupt: Interrupt | bool = False) -> dict[str, float | None]:
        """Mean loss and metrics on the validation rows, dropout off; also before training, and after. Empty when it was
        interrupted. Raises InputError without validation rows."""
        rows = self.validation()
        batches = self.micro_batches(rows, range(len(rows.examples)), "auto")
        loss, weight, parts = 0.0, 0.0, list[Mapping[str, Tensor]]()
        with evaluating(self.model):
            self.begin(rows, batches)
            for batch in batches:
                if interrupt:
                    return {}
                for sums in parts_of(as_sums(self.sums(batch), batch), backward=False):
                    loss, weight = loss + sums.loss.item(), weight + float(sums.weight or 0)
                    parts.append(sums.metrics)
        if not weight:
            raise InputError("the loss counts nothing on the validation rows: give rows of which it counts something")
        found = self.describe({"loss": loss / weight, **{name: v.item() for name, v in means(parts).items()}})
        return told(self.callbacks, "on_evaluate", self.run, {name: finite(value) for name, value in found.items()})

    def validation(self) -> Dataset:
        """The validation rows. Raises InputError where there are none."""
        if self.val_set is None:
            raise InputError("evaluate needs validation rows: give the trainer val, rows or a share such as 0.1")
        return self.val_set

    def _save(self) -> None:
        run = self.progress
        run.stopped_early |= self.run.stopped
        if run.done == 0 or run.saved == run.done:
            return
        run.saved = run.done
        groups, loop = self.run.state()
        groups |= {"task": task} if (task := self.state()) else {}
        groups |= {"best": self.best} if self.best is not None else {}
        folder, state = Path(self.config.out) / "checkpoints", asdict(self._saved(loop))
        path = save_checkpoint(folder, run.done, groups, state, keep=self.config.keep)
        for callback in self.callbacks:
            callback.on_checkpoint(self.run, path)

    def _saved(self, loop: dict[str, Any]) -> SavedState:
        order = layout(self.config, self.device) | {"tokens a pass": str(self.token_budget)}
        date = None if self.train_set.template is None else self.train_set.template.date
        return SavedState(self.progress, as_json(self.config), self.fingerprint, self.depends_on, order, loop, date)

    def _resume(self, path: Path, notes: list[str]) -> None:
        """Take up a checkpoint. Raises InputError when it belongs to other data, other options or another model."""
        tensors, state = load_checkpoint(path)
        saved = read_fields(SavedState, state, str(path / STATE))
        notes += check_resumed(path, saved, self._saved({}), self.config, len(self.train_set.examples))
        self.progress, self.best = saved.run, tensors.get("best")
        self.run.restore(tensors, saved.loop)
        self.load_state(tensors.get("task", {}))

    def _finish(self) -> TrainResult:
        out, run = Path(self.config.out), self.progress
        if not self.interrupt:
            save_template(out, self.train_set)
            self.save(out)
        if self.metrics.path.stat().st_size:
            draw_curves(self.metrics.path, out / "loss.png")
        newest, signal = out / "checkpoints" / f"step-{run.saved:06d}", self.interrupt.signal
        done = run.done, run.last_loss, run.best_metrics, run.best_step, run.skipped, run.tokens, run.stopped_early
        kept = newest if newest.is_dir() else None
        return TrainResult(out, *done, self.run.unmoved, signal, kept, self.peak())

    def new_run(self) -> Run:
        """What the trainer's loop stands on, at its start."""
        config, own = self.config, self.optimizer
        optimizer = make_optimizer(self.parameters, config) if own is None else own
        how: dict[str, Any] = {"scheduler": self.scheduler, "max_grad_norm": config.max_grad_norm}
        how |= {"loss": lambda _, batch: self.sums(batch), "parameters": self.parameters, "optimizer": optimizer}
        run = Run(self.model, self.tokenizer, total=self.total, **how)
        for group in run.optimizer.param_groups if own is not None else ():  # the peak, as torch's schedulers keep it
            group["lr_scale"] = group.setdefault("initial_lr", group["lr"])
        return run
