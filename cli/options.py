"""Options that commands share, in groups; a command's options are one frozen dataclass made of such groups.

The field is the flag, its type the check, `help` the help. A class's `title` heads its group in `--help`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..trainer.config import LossOn, at_least

Quant = Literal["nf4", "nf4-nodq", "none"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def option(help: str, default: Any = ..., **more: Any) -> Any:
    """A field with its help text; without a default the option is required."""
    metadata = {"help": help, **more}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Whose tokenizer and template."""

    title: ClassVar[str] = "model"
    model: str = option("Hugging Face folder or .gguf file", metavar="PATH")
    template: str | None = option("chat template: a built-in's name or a .jinja file instead of the model's own", None)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TokenizerOptions):
    """Which model, and how it is loaded."""

    title: ClassVar[str] = "model"
    quant: Quant | None = option(
        "4-bit NF4 with or without double quantisation of its scales, or the dense model (default: nf4, or as the "
        "adapter or model was trained)",
        None,
    )
    device: str = option("auto, cpu, cuda, cuda:1, ...; auto takes a GPU when there is one", "auto", metavar="NAME")
    dtype: DType = option("of activations and dense weights; auto: bfloat16 on a GPU that has it, else float32", "auto")


@dataclass(frozen=True, kw_only=True)
class AdaptedModelOptions(ModelOptions):
    """A model, with an adapter or without."""

    title: ClassVar[str] = "model"
    adapter: str | None = option("folder with a LoRA adapter (PEFT's format)", None, metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How data files are read, for commands that only look at them."""

    title: ClassVar[str] = "data"
    positional: ClassVar[str] = "data"
    data: tuple[str, ...] = option("JSONL file of chat rows; repeat the flag for more", metavar="FILE")
    max_length: int = option("tokens an example may have; a longer one is a bad row", 1024)
    loss_on: LossOn = option("which tokens are trained: assistant turns, the last turn only, or all", "assistant")
    on_bad_row: Literal["error", "skip"] = option("stop at bad rows, or leave them out and count them", "error")

    def __post_init__(self) -> None:
        at_least(self, 2, "max_length")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn."""

    title: ClassVar[str] = "sampling"
    max_new_tokens: int = option("tokens an answer may have", 256)
    temperature: float = option("0 takes the likeliest token each time", 0.0)
    top_k: int = option("sample from this many likeliest tokens; 0: from all", 0)
    top_p: float = option("sample from the likeliest tokens that make up this share", 1.0)
    seed: int = option("seed of sampling", 0)

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def sampling(self) -> dict[str, Any]:
        """Arguments for `fourbit.generate`, less the seed."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """How results are printed."""

    title: ClassVar[str] = "output"
    json: bool = option("print one JSON line of results, last and alone on stdout", False)
