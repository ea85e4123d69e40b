"""`fourbit distill`: train a student to predict what a teacher predicts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError
from ..trainer.distill_config import DistillConfig
from .load import load_weights, run_settings
from .options import Quant, option
from .parse import DEFAULT, Parsed, parse
from .preference import StartOptions, checked_start, load_start
from .show import note
from .train import ADAPTER_ONLY, check, check_resumed, datasets, train

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..trainer.distill import DistillTrainer

ABOUT = """\
Train a student to predict what a teacher predicts, on the tokens of chat rows.

  fourbit distill --model STUDENT --teacher T --data rows.jsonl --val 5% --out runs/small
  fourbit distill --model M --teacher M --teacher-adapter runs/wide --rank 4 --data ...

Teacher and student share one tokenizer; sizes and 4-bit forms may differ. When
both are the same model in the same form, it is in memory once, and the teacher
is that base with --teacher-adapter, or without any."""


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Whom the student learns from."""

    title: ClassVar[str] = "teacher"
    teacher: str = option("the teacher: Hugging Face folder or .gguf file, of the student's tokenizer", metavar="PATH")
    teacher_adapter: str | None = option("folder of the LoRA adapter that the teacher carries", None, metavar="DIR")
    teacher_quant: Quant | None = option(
        "as quant, of the teacher (default: as the student where both are one model, else as the teacher's adapter or "
        "model was trained, else nf4)",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class DistillOptions(DistillConfig, TeacherOptions, StartOptions):
    """Everything `fourbit distill` takes."""

    @property
    def one_base(self) -> bool:
        """Whether teacher and student are one model in one form, so that it is in memory once."""
        return self.same_model and not self.full and self.teacher_quant == self.quant

    @property
    def same_model(self) -> bool:
        """Whether teacher and student are one model, in whatever form."""
        return _same(self.teacher, self.model)


def run(args: Sequence[str]) -> int:
    """Parse, load, train, report. Returns 0, or 128 + the signal that ended the run."""
    parsed = parse(DistillOptions, args, command="distill", about=ABOUT)
    options = _checked(parsed)
    trainer = _prepare(options)
    fresh = not options.full and options.adapter is None
    return train("distill", Parsed(options, parsed.sources), trainer, unsaved=() if fresh else ADAPTER_ONLY)


def _checked(parsed: Parsed[DistillOptions]) -> DistillOptions:
    """The options with `quant` and `teacher_quant` settled. Raises InputError for what cannot go together."""
    options = parsed.options
    if not Path(options.teacher).exists():
        raise InputError(f"teacher {options.teacher} does not exist; give a Hugging Face folder or a .gguf file")
    adapter = options.teacher_adapter
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"teacher_adapter {adapter} is no folder with adapter_config.json; fourbit sft writes one")
    options = _checked_full(parsed) if options.full else checked_start(parsed)
    options = dataclasses.replace(options, teacher_quant=_teacher_quant(options))
    check_resumed(options, ("full", "teacher", "teacher_adapter", "teacher_quant"))
    if options.one_base and not options.sft_weight and _same(adapter, options.adapter):
        raise InputError(
            "the teacher is what the student starts as, so there is nothing to learn: give another teacher, "
            "teacher_adapter, or sft_weight"
        )
    return options


def _checked_full(parsed: Parsed[DistillOptions]) -> DistillOptions:
    """The options of training all weights, with `quant` settled."""
    options = parsed.options
    given = [name for name in ADAPTER_ONLY if parsed.sources[name] != DEFAULT]
    if given := ["adapter"] * (options.adapter is not None) + given:
        raise InputError(f"full training has no adapter: leave out {', '.join(given)}, or leave out full")
    if options.quant not in (None, "none"):
        raise InputError(
            f"full training needs the dense model: quant {options.quant} keeps it in 4 bits; use quant none"
        )
    check(options)
    options = dataclasses.replace(options, quant="none")
    check_resumed(options, ("model", "quant"))
    return options


def _teacher_quant(options: DistillOptions) -> Quant:
    if options.teacher_quant is None and options.same_model and not options.full and options.quant is not None:
        return options.quant
    trained: Quant | None = run_settings(options.teacher_adapter or options.teacher).get("quant")
    return options.teacher_quant or trained or "nf4"


def _same(a: str | None, b: str | None) -> bool:
    """Whether two paths are one place, or both are missing."""
    return a == b if a is None or b is None else Path(a).resolve() == Path(b).resolve()


def _prepare(options: DistillOptions) -> "DistillTrainer":
    """Data first: a bad row should not wait for gigabytes of weights."""
    from ..data.dataset import load_dataset
    from ..models.load import load_tokenizer
    from ..trainer.distill import DistillTrainer, check_same_tokens

    tokenizer = load_tokenizer(options.model)
    teacher_tokenizer = load_tokenizer(options.teacher)
    check_same_tokens(tokenizer, teacher_tokenizer)

    def read(paths: Sequence[str]) -> "Dataset":
        return load_dataset(
            paths,
            tokenizer,
            template=options.template,
            max_length=options.max_length,
            loss_on=options.loss_on,
            on_bad_row=options.on_bad_row,
        )

    rows, val = datasets(options, read)
    model = load_weights(options, tokenizer, "none") if options.full else load_start(options, tokenizer)
    teacher = _load_teacher(options, model, teacher_tokenizer)
    config = options.config(DistillConfig)
    return DistillTrainer(model, tokenizer, teacher=teacher, train=rows, val=val, config=config)


def _load_teacher(options: DistillOptions, student: Any, tokenizer: Any) -> Any:
    """A model, or what stands for one on the student's base."""
    from ..lora.files import load_adapter, read_snapshot

    adapter, quant = options.teacher_adapter, str(options.teacher_quant)
    trained = None if adapter is None else run_settings(adapter).get("quant")
    if trained not in (None, quant):
        note(f"note: the teacher's adapter was trained on {trained}; on {quant} it will be somewhat off")
    what = "without an adapter" if adapter is None else f"with the adapter {adapter}"
    if options.one_base:
        note(f"teacher: the student's own base, in memory once, {what}")
        return None if adapter is None else read_snapshot(student, adapter)
    teacher = load_weights(dataclasses.replace(options, model=options.teacher), tokenizer, quant)
    if adapter is not None:
        load_adapter(teacher, adapter)
    note(f"teacher: {options.teacher}, {what}")
    return teacher
