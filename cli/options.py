"""Options that commands share, in groups; a command's options are one frozen dataclass made of such groups.

The field is the flag, its type the check, `help` the help. A class's `title` heads its group in `--help`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..data.encode import LossOn
from ..errors import InputError
from ..models.generate import KeepDense, Sampling
from ..outputs import Output
from ..settings import LARGEST, REQUIRED, Checked, setting
from ..trainer.rewards import files_of

Quant = Literal["nf4", "nf4-nodq", "none"]
WRITTEN = ("out", "answers", "resume")  # options that name a place to write, or one in it
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(Checked):
    """Whose tokenizer and template."""

    title: ClassVar[str] = "model"
    model: str = setting(REQUIRED, "Hugging Face folder or .gguf file", metavar="PATH")
    template: str | None = setting(
        None, "chat template: a built-in's name or a .jinja file instead of the model's own", metavar="NAME|FILE"
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TokenizerOptions):
    """Which model, and how it is loaded."""

    title: ClassVar[str] = "model"
    quant: Quant | None = setting(
        None,
        "4-bit NF4 with or without double quantisation of its scales, or the dense model (default: nf4, or as the "
        "adapter or model was trained)",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...; auto takes a GPU when there is one", metavar="NAME")
    dtype: DType = setting(
        "auto",
        "of activations and dense weights; auto: as in training, else bfloat16 where the device multiplies it",
    )


@dataclass(frozen=True, kw_only=True)
class AdapterChoice(Checked):
    """Which adapter the model carries."""

    title: ClassVar[str] = "adapter"
    adapter: str | None = setting(
        None, "folder of a LoRA adapter, PEFT's format; a training goes on from it, or else makes one", metavar="DIR"
    )
    force: bool = setting(False, "put an adapter on another base than the one it was trained on, too")


@dataclass(frozen=True, kw_only=True)
class AdaptedModelOptions(AdapterChoice, ModelOptions):
    """A model, with an adapter or without."""


@dataclass(frozen=True, kw_only=True)
class AnsweringOptions(AdaptedModelOptions):
    """The same, for commands that generate."""

    keep_dense: KeepDense = setting("auto", "decode 4-bit weights once; auto: on a CPU, where memory allows")


@dataclass(frozen=True, kw_only=True)
class RowOptions(Checked):
    """How data files are read, for commands that only look at them."""

    title: ClassVar[str] = "data"
    positional: ClassVar[str] = "data"
    data: tuple[str, ...] = setting(REQUIRED, "JSONL file of chat rows; repeat the flag for more", metavar="FILE")
    max_length: int = setting(1024, "tokens an example may have; a longer one is a bad row", least=2)
    loss_on: LossOn = setting("assistant", "which tokens are trained: assistant turns, the last turn only, or all")
    on_bad_row: Literal["error", "skip"] = setting("error", "stop at bad rows, or leave them out and count them")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling):
    """How tokens are drawn, and how many."""

    title: ClassVar[str] = "sampling"
    max_new_tokens: int = setting(256, "tokens an answer may have", least=1)
    seed: int = setting(0, "seed of sampling", least=0, most=LARGEST)

    def sampling(self) -> dict[str, Any]:
        """Arguments for `fourbit.generate`, less the seed."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


@dataclass(frozen=True, kw_only=True)
class RewardOptions(Checked):
    """What answers are worth."""

    title: ClassVar[str] = "rewards"
    reward: tuple[str, ...] = setting(
        (),
        "what an answer earns: a check (exact, contains, regex, number, json against the row's answer; fields:A,B "
        "words:MIN-MAX format:REGEX of the answer alone; last-line:CHECK), FILE.py:FUNCTION, f(prompt, answer, row), "
        "or the folder of a reward model; NAME=WEIGHT and the flag repeated for a weighted sum",
        metavar="NAME[=WEIGHT]",
    )
    reward_seconds: float = setting(10.0, "time that a call of a reward's function may take", positive=True)


@dataclass(frozen=True, kw_only=True)
class ResultOptions(Checked):
    """How results are printed."""

    title: ClassVar[str] = "output"
    json: bool = setting(False, "print one JSON line of results, last and alone on stdout")


@dataclass(frozen=True, kw_only=True)
class FileOptions(ResultOptions):
    """What happens to a file of rows that is there already."""

    title: ClassVar[str] = "output"
    overwrite: bool = setting(False, "replace an output file that is there")
    resume: bool = setting(False, "go on after the rows that are there")


def inputs_of(options: Any, sources: Mapping[str, str]) -> list[str]:
    """Every path that a command reads: of the options that are paths, and the settings' own file."""
    found = [source.rpartition(":")[0] for source in sources.values()]
    for option in fields(options):
        if option.name not in WRITTEN and {"PATH", "FILE", "DIR"} & {*option.metadata["metavar"].split("|")}:
            value = getattr(options, option.name)
            found += value if isinstance(value, tuple) else [value]
    found += map(str, files_of(getattr(options, "reward", ())))
    return sorted({path for path in found if path})


def output_of(options: FileOptions, sources: Mapping[str, str], name: str, path: str | Path) -> Output:
    """Where rows go: away from all that is read."""
    how: dict[str, Any] = {"overwrite": options.overwrite, "resume": options.resume}
    how["resumes"] = getattr(options, "n", 1) == 1  # what one row of the input became is told apart
    output = Output(path, name=name, inputs=inputs_of(options, sources), **how)
    if output.stdout and options.json:
        raise InputError(f"json prints results to standard output, where {name} - writes rows: leave json out")
    return output
