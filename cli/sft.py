"""`fourbit sft`: fine-tune a model on chat rows, with LoRA on a 4-bit base unless told otherwise."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..trainer.config import SFTConfig
from .load import load_weights
from .parse import DEFAULT, Parsed, parse
from .train import ADAPTER_ONLY, TrainOptions, attach_adapter, check, check_resumed, datasets, train

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..trainer.sft import SFTTrainer

ABOUT = """\
Fine-tune a model on chat rows and save a LoRA adapter (with --full: the model).

  fourbit sft --model M --data train.jsonl --val 5% --out runs/first
  fourbit sft run.yaml --lr 1e-4

A YAML file holds the same settings, `micro_batch: 4` for `--micro-batch 4`;
flags win over the file. The folder --out gets the adapter, config.yaml (all
settings and where each came from), metrics.jsonl, loss.png and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class SFTOptions(SFTConfig, TrainOptions):
    """Everything `fourbit sft` takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.full:
            self.lora_config()


def run(args: Sequence[str]) -> int:
    """Parse, load, train, report. Returns 0, or 128 + the signal that ended the run."""
    parsed = parse(SFTOptions, args, command="sft", about=ABOUT)
    options = _checked(parsed)
    trainer = _prepare(options)
    return train("sft", Parsed(options, parsed.sources), trainer, unsaved=ADAPTER_ONLY if options.full else ())


def _checked(parsed: Parsed[SFTOptions]) -> SFTOptions:
    """The options with `quant` settled. Raises InputError for what cannot go together."""
    options = parsed.options
    given = [name for name in ADAPTER_ONLY if parsed.sources[name] != DEFAULT]
    if options.full and given:
        raise InputError(f"full training has no adapter: leave out {', '.join(given)}, or leave out full")
    if options.full and options.quant not in (None, "none"):
        raise InputError(
            f"full training needs the dense model: quant {options.quant} keeps it in 4 bits; use quant none"
        )
    check(options)
    options = dataclasses.replace(options, quant=options.quant or ("none" if options.full else "nf4"))
    check_resumed(options, ("model", "quant", "full", *(ADAPTER_ONLY if not options.full else ())))
    return options


def _prepare(options: SFTOptions) -> "SFTTrainer":
    """Data first: a bad row should not wait for gigabytes of weights."""
    from ..data.dataset import load_dataset
    from ..models.load import load_tokenizer
    from ..trainer.sft import SFTTrainer

    tokenizer = load_tokenizer(options.model)

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
    model = load_weights(options, tokenizer, str(options.quant))
    if not options.full:
        attach_adapter(model, options)
    return SFTTrainer(model, tokenizer, train=rows, val=val, config=options.config(SFTConfig))
