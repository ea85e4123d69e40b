"""`fourbit distill`: train a student to predict what a teacher predicts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..errors import InputError
from ..models.protocol import CausalLM
from ..settings import REQUIRED, Checked, setting
from ..text.tokenizer import Tokenizer
from ..trainer.config import DistillConfig
from ..trainer.distill import DistillTrainer, check_same_tokens
from .load import load_weights, open_tokenizer, put_adapter, trained
from .options import Quant
from .show import note
from .train import TrainOptions
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Checked):
    """Which teacher, and how it is loaded."""

    title: ClassVar[str] = "teacher"
    teacher: str = setting(REQUIRED, "Hugging Face folder or .gguf file, of the student's tokenizer", metavar="PATH")
    teacher_adapter: str | None = setting(None, "folder of the LoRA adapter that the teacher carries", metavar="DIR")
    teacher_quant: Quant | None = setting(
        None,
        "as quant, of the teacher (default: as the student where both are one model, else as the teacher's adapter or "
        "model was trained, else nf4)",
    )


@dataclass(frozen=True, kw_only=True)
class Options(DistillConfig, TeacherOptions, TrainOptions):
    """Train a student to predict what a teacher predicts, on the tokens of chat rows.

      fourbit distill --model STUDENT --teacher T --data rows.jsonl --val 5% --out runs/small
      fourbit distill --model M --teacher M --teacher-adapter runs/wide --rank 4 --data ...

    Teacher and student share one tokenizer; sizes and 4-bit forms may differ. When
    both are the same model in the same form, it is in memory once, and the teacher
    is that base with --teacher-adapter, or without any.
    """

    config_type: ClassVar = DistillConfig
    trainer_type: ClassVar = DistillTrainer

    @property
    def one_base(self) -> bool:
        """Whether teacher and student are one model in one form, so that it is in memory once."""
        return _same(self.teacher, self.model) and not self.full and self.teacher_quant == self.quant

    def adapters(self) -> dict[str, str | None]:
        return super().adapters() | {"teacher_adapter": self.teacher_adapter}

    def settled(self, tokenizer: Tokenizer) -> "Options":
        check_same_tokens(tokenizer, open_tokenizer(self.teacher, "teacher"))
        theirs, _ = trained(self.teacher, self.teacher_adapter)
        default = self.quant if _same(self.teacher, self.model) and not self.full else theirs
        options = replace(self, teacher_quant=self.teacher_quant or default or "nf4")
        if options.one_base and not options.sft_weight and _same(options.teacher_adapter, options.adapter):
            raise InputError(
                "the teacher is what the student starts as, so there is nothing to learn: give another teacher, "
                "teacher_adapter, or sft_weight"
            )
        return options

    def extras(self, model: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
        """The teacher: a model, or what stands for one on the student's base."""
        adapter, quant = self.teacher_adapter, str(self.teacher_quant)
        what = "without an adapter" if adapter is None else f"with the adapter {adapter}"
        if self.one_base:
            note(f"teacher: the student's own base, in memory once, {what}")
            if adapter is not None:
                put_adapter(model, adapter, self.force, name="teacher", trainable=False)
            return {"teacher": adapter and "teacher"}
        teacher = load_weights(replace(self, model=self.teacher), tokenizer, quant)
        if adapter is not None:
            put_adapter(teacher, adapter, self.force)
        note(f"teacher: {self.teacher}, {what}")
        return {"teacher": teacher}


def _same(a: str | None, b: str | None) -> bool:
    """Whether two paths are one place, or both are missing."""
    return a == b if a is None or b is None else Path(a).resolve() == Path(b).resolve()
