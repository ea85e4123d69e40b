"""What a run can be told: one flat, frozen dataclass for each kind of training, which checks itself.

Every field carries its help text, so the command line and the docs print the same sentence. The defaults train an
adapter sensibly on a few hundred to a few thousand rows; nothing here needs a GPU.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..data.encode import LossOn
from ..data.order import steps_per_epoch
from ..data.truncate import Truncation
from ..errors import InputError
from ..models.recompute import Keep
from ..optim.schedule import Schedule, rate_factor
from ..optim.update import Rounding
from ..settings import LARGEST, REQUIRED, Checked, setting
from .losses.objective import PAIR_LOSSES, SETTINGS, UNPAIRED_LOSSES, Objective, parse_losses
from .losses.pairs import DivergenceName

PAGED = "paged-"
KEPT: dict[str, Keep] = {"off": "all", "products": "products", "on": "input", "offload": "host"}
COURSE = {"epochs", "steps", "schedule", "warmup", "decay"}  # what decides how long a run is, and its rates
OF_OPTIMIZER = {"lr", "lora_plus", "lr_scale", "optimizer", "optimizer_budget", "rounding", "weight_decay"}
UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked):
    """Options of every kind of training. Raises InputError for a value that cannot work, naming it."""

    out: str = setting(REQUIRED, "folder for the adapter, checkpoints, metrics and the loss curve", metavar="PATH")
    epochs: int = setting(1, "passes over the training rows (ignored when steps is given)", least=1)
    steps: int | None = setting(None, "optimizer steps in all; decides instead of epochs", least=1)
    batch_size: int = setting(8, "examples per optimizer step, over all micro-batches", least=1)
    micro_batch: int | Literal["auto"] = setting(
        "auto", "examples per forward pass; auto: 512 tokens on CPU, 8192 on a GPU. Never changes the result", least=1
    )
    packing: bool = setting(True, "lay a micro-batch's examples end to end in one row instead of padding them")
    max_length: int = setting(1024, "tokens an example may have; a longer one is a bad row", least=2)
    on_bad_row: Literal["error", "skip"] = setting("error", "stop at bad rows, or leave them out and count them")
    template: str | None = setting(
        None, "chat template: a built-in's name or a .jinja file instead of the model's own", metavar="NAME|FILE"
    )
    lr: float = setting(2e-4, "peak learning rate", positive=True)
    schedule: Schedule = setting(
        "cosine",
        "learning rate after warm-up: cosine or linear to zero, constant, inverse-sqrt of the step, or wsd (constant, "
        "then linear to zero over the last steps)",
    )
    warmup: float = setting(0.03, "linear warm-up: a fraction of all steps below 1, a number from 1 on", least=0)
    decay: float | None = setting(
        None, "wsd's last part, in which the rate falls: a fraction or a number, as warmup; default 0.1", positive=True
    )
    lora_plus: float = setting(1.0, "LoRA+: the rate of B as a multiple of A's; its authors suggest 16", positive=True)
    lr_scale: dict[str, float] = setting(
        {},
        "factors on the learning rate by patterns of parameter names, such as '*.layers.0.*=0.5'; those that match "
        "multiply, 0 leaves weights as they are. Repeat the flag for more",
        metavar="PATTERN=X",
    )
    optimizer: Literal[
        "adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "lion", "lion8bit", "paged-lion", "paged-lion8bit"
    ] = setting(
        "adamw",
        "adamw or lion; 8bit: state of 1 byte a value instead of 4; paged-: state that does not fit on the GPU waits "
        "in host memory. lion wants an lr 3 to 10 times smaller",
    )
    optimizer_budget: str = setting(
        "auto", "most GPU memory for paged state, such as 2GiB; auto: what is left by the model", metavar="auto|SIZE"
    )
    rounding: Rounding = setting(
        "stochastic",
        "of trained weights in 16 bits (full in bfloat16): stochastic goes up or down at random so that no update is "
        "lost on average; nearest loses those below their precision",
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices (no norms, biases, magnitudes)", least=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm; 0 turns clipping off", least=0)
    checkpointing: Literal["auto", "off", "products", "on", "offload"] = setting(
        "auto",
        "what a layer keeps for backward. off: all; products: what linears and attention put out, the cheap rest is "
        "made again; on: its input, all is computed again; offload: that, in the host's memory; auto: for each layer "
        "products, or as few as needed of the others, so that it fits",
    )
    seed: int = setting(0, "seed of the order of rows and of dropout", least=0, most=LARGEST)
    deterministic: bool = setting(False, "on a GPU only kernels whose sums repeat to the bit; a CPU's always do")
    eval_every: int | None = setting(None, "steps between evaluations on validation rows; default each epoch", least=1)
    patience: int | None = setting(None, "stop after this many evaluations without a better validation loss", least=1)
    keep_best: bool = setting(True, "save the weights of the best validation loss instead of the last")
    save_every: int | None = setting(None, "steps between training checkpoints; default each epoch", least=1)
    keep: int = setting(2, "training checkpoints kept", least=1)
    resume: str | None = setting(
        None, "auto: from the newest checkpoint in out, if any; or from this one", metavar="auto|PATH", bare="auto"
    )
    log: tuple[str, ...] = setting((), "more places for metrics: tensorboard", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.log:
            if name != "tensorboard":
                raise InputError(f"log knows tensorboard (metrics.jsonl is always written), got {name!r}")
        for pattern, factor in self.lr_scale.items():
            if not 0 <= factor < math.inf:
                raise InputError(f"lr_scale must have factors of 0 or more, got {factor} for {pattern!r}")
        for name in ("warmup", "decay"):
            if (given := getattr(self, name)) is not None and given > 1 and given % 1:
                raise InputError(f"{name} must be a fraction of all steps below 1, or a number of them, got {given}")
        if isinstance(self.micro_batch, int) and self.micro_batch > (most := self.examples_a_step):
            what = f"micro_batch splits the {most} examples of a step (batch_size), got {self.micro_batch}"
            raise InputError(f"{what}: give at most that, or auto")
        if self.decay is not None and self.schedule != "wsd":
            raise InputError(f"decay is the last part of schedule wsd; {self.schedule} has none")
        if self.optimizer_budget == "auto":
            return
        if not self.optimizer.startswith(PAGED):
            raise InputError(
                f"optimizer_budget is for paged optimizers; {self.optimizer} keeps its whole state on the device, "
                f"{PAGED}{self.optimizer} does not"
            )
        if not size_in_bytes(self.optimizer_budget):
            size = "a size above 0 with a unit, such as 2GiB or 512MiB"
            raise InputError(f"optimizer_budget must be auto or {size}, got {self.optimizer_budget!r}")

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise InputError for those of these options that were given."""
        given = [name for name in sorted(names) if getattr(self, name) != getattr(type(self), name, {})]
        if given:  # what differs from its field's default, which is its class'; {} of mappings
            raise InputError(f"{', '.join(given)} would do nothing, as {why}: leave out what is said of it")

    @property
    def examples_a_step(self) -> int:
        """Rows of data, or answers to them, that a step learns from."""
        return self.batch_size

    def epoch_steps(self, rows: int) -> int:
        """Steps of a pass over so many rows."""
        return steps_per_epoch(rows, self.batch_size)

    def total_steps(self, rows: int) -> int:
        """Steps in all of a run on so many rows."""
        return self.steps or self.epochs * self.epoch_steps(rows)

    def warmup_steps(self, total: int) -> int:
        """Steps of warm-up in a run of `total` steps."""
        return _steps(self.warmup, total)

    def rate_factor(self, step: int, total: int) -> float:
        """The learning rate of step `step`, counted from 0, in a run of `total` steps, as a share of `lr`."""
        warmup, decay = self.warmup_steps(total), None if self.decay is None else _steps(self.decay, total)
        return rate_factor(step, total=total, warmup=warmup, schedule=self.schedule, decay=decay)

    def course(self) -> tuple[Schedule, float, float | None]:
        """What decides the rates of all steps, besides their number."""
        return self.schedule, self.warmup, self.decay

    def check_rows(self, rows: int, val: int | None) -> None:
        """Whether the settings can do what they say with so many rows to train on, and to validate on (None: without).
        Raises InputError that says the numbers."""
        if val == 0 or (val and not rows):
            raise InputError(
                f"no row was left {'for validation' if rows else 'to train on'}: rows of one prompt stay on one side of"
                " a split, and these all have one. Give validation rows of their own, or none"
            )
        if not rows:
            raise InputError("there are no rows to train on")
        if val is None and (self.patience or self.eval_every):
            raise InputError(f"{'patience' if self.patience else 'eval_every'} needs validation rows: give val, say 5%")
        total, epoch = self.total_steps(rows), self.epoch_steps(rows)
        run = f"the run has {total:,} step{'s' * (total > 1)} ({rows:,} rows, {self.batch_size} a step)"
        warmup = self.warmup_steps(total)
        if warmup >= total:
            raise InputError(f"warmup {self.warmup:g} is {warmup:,} steps, and {run}: no step would have the full rate")
        if self.decay is not None and not 0 < (decay := _steps(self.decay, total)) <= total - warmup:
            raise InputError(f"decay {self.decay:g} is {decay:,} steps after {warmup:,} of warmup, and {run}")
        times = -(-total // (self.eval_every or epoch))
        if self.patience is not None and self.patience >= times:
            raise InputError(
                f"patience {self.patience} needs more than {self.patience} evaluations, and there will be {times}: "
                f"{run}, and one is every {self.eval_every or epoch:,} (eval_every)"
            )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Options of supervised fine-tuning."""

    loss_on: LossOn = setting("assistant", "which tokens are trained: assistant turns, the last turn only, or all")
    full: bool = setting(False, "train all weights of a dense model instead of an adapter")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full and self.lora_plus != 1:
            raise InputError("lora_plus is the ratio of an adapter's learning rates; full training has no adapter")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(SFTConfig):
    """Options of distillation."""

    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = setting(
        "forward-kl",
        "between teacher and student at each trained token: forward-kl covers all that the teacher says, reverse-kl "
        "keeps to what it finds likely, jsd lies between",
    )
    jsd_beta: float | None = setting(
        None, "jsd: how much of the teacher is in the mixture that both are compared with, between 0 and 1; default 0.5"
    )
    temperature: float = setting(
        1.0, "both sides' logits are divided by it; the divergence is not multiplied by its square", positive=True
    )
    top_k: int | None = setting(
        None, "compare the teacher's k likeliest tokens only, both sides renormalised; default: all", least=1
    )
    sft_weight: float = setting(0.0, "weight of the cross-entropy on the data's own tokens, which is added", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "jsd":
            self.refuse(["jsd_beta"], f"divergence is {self.divergence}")
        if (beta := self.jsd_beta) is not None and not 0 < beta < 1:
            raise InputError(f"jsd_beta must lie between 0 and 1, got {beta}; its ends are forward-kl and reverse-kl")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TrainingConfig):
    """Options that every training on preference rows has."""

    title: ClassVar[str] = "preferences"
    max_length: int = setting(1024, "tokens that a prompt and one answer may have together; see truncation", least=2)
    truncation: Truncation = setting(
        "drop",
        "a row with an answer past max_length: drop leaves it out and counts it; answer cuts the answer but keeps its "
        "end-of-turn token",
    )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Options of preference training."""

    lr: float = setting(5e-5, "peak learning rate", positive=True)
    loss: tuple[str, ...] = setting(
        ("sigmoid",),
        f"one of {', '.join(PAIR_LOSSES)}, or on judged answers {', '.join(UNPAIRED_LOSSES)}; NAME=WEIGHT and the flag "
        "repeated for a weighted sum, such as sigmoid=0.8 and sft=0.2",
        metavar="NAME[=WEIGHT]",
    )
    beta: float | None = setting(None, "how strongly the reference holds; default: the loss' own", positive=True)
    label_smoothing: float | None = setting(
        None, "wrong labels' share: sigmoid (cDPO), robust, exo, simpo, cpo", least=0
    )
    gamma: float | None = setting(None, "simpo: the margin of rewards aimed at", least=0)
    tau: float | None = setting(None, "discopop: the temperature of its mixture", positive=True)
    sft_weight: float | None = setting(None, "cpo: the weight of its term that fits the chosen answers", least=0)
    desirable_weight: float | None = setting(None, "kto, apo-zero-unpaired: the weight of good answers", positive=True)
    undesirable_weight: float | None = setting(None, "kto, apo-zero-unpaired: the weight of bad answers", positive=True)
    divergence: DivergenceName | None = setting(None, "f-DPO, whose reverse-kl is DPO itself")
    divergence_alpha: float | None = setting(None, "alpha of divergence alpha, 0 to 1", least=0, most=1)
    ld_alpha: float | None = setting(None, "LD-DPO: tokens' weight past the shorter answer; default 1", least=0, most=1)
    reference: Literal["auto", "base", "start"] = setting(
        "auto",
        "what the policy is compared with: base (adapter off), or start (the adapter as it was at the start); auto: "
        "start on top of a trained adapter, else base, which then is the same",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        objective = self.objective()
        if not objective.needs_reference and self.reference != "auto":
            what = f"the loss {', '.join(objective.losses)}, which compares with no reference"
            raise InputError(f"reference has no use with {what}; got {self.reference!r}: leave it out")

    def objective(self) -> Objective:
        """The loss as a checked object."""
        given = {name: getattr(self, name) for name in sorted(SETTINGS)}
        return Objective(parse_losses(self.loss), {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PreferenceConfig):
    """Options of training a reward model."""

    head_lr: float = setting(
        3e-3, "peak learning rate of the head, which starts at 0; an lr_scale of score.weight goes first", positive=True
    )
    center: float = setting(
        0.0, "weight of the squared sum of a pair's rewards, which holds rewards around zero; 0.01 is usual", least=0
    )


def _steps(given: float, total: int) -> int:
    """A fraction of all steps, or a number of them."""
    return round(given * total) if given < 1 else int(given)


def size_in_bytes(text: str) -> int | None:
    """2147483648 for "2GiB"; a point and a blank are fine ("1.5 GiB"). None for what is no size."""
    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d{{1,15}})?) ?({'|'.join(UNITS)})", text, flags=re.IGNORECASE | re.ASCII)
    return int(float(match[1]) * UNITS[match[2].lower()]) if match else None
