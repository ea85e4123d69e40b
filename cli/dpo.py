"""`fourbit dpo`: train an adapter on preferences, on the base or on top of an adapter that was trained before."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..trainer.preference_config import DPOConfig
from .load import is_reward_model
from .parse import Parsed, parse
from .preference import StartOptions, checked_start, load_start, reader
from .show import note
from .train import ADAPTER_ONLY, datasets, train

if TYPE_CHECKING:
    from ..trainer.dpo import DPOTrainer

ABOUT = """\
Train an adapter on preference rows: DPO, and its relatives by --loss.

  fourbit dpo --model M --adapter runs/sft --data pairs.jsonl --val 5% --out runs/dpo

Rows are {"prompt", "chosen", "rejected"}, as texts or messages, or another
common form; {"prompt", "completion", "label"} for the losses kto, bco-unpaired
and apo-zero-unpaired. With --adapter training goes on from that adapter, and
the reference is what it was at the start; without, an adapter starts afresh
and the reference is the base."""


@dataclass(frozen=True, kw_only=True)
class DPOOptions(DPOConfig, StartOptions):
    """Everything `fourbit dpo` takes."""


def run(args: Sequence[str]) -> int:
    """Parse, load, train, report. Returns 0, or 128 + the signal that ended the run."""
    parsed = parse(DPOOptions, args, command="dpo", about=ABOUT)
    options = checked_start(parsed)
    if options.adapter is not None and is_reward_model(options.adapter):
        raise InputError(f"adapter {options.adapter} is a reward model's: it scores answers and writes none")
    trainer = _prepare(options)
    options = dataclasses.replace(options, reference=trainer.config.reference)  # so that the run's folder says which
    unsaved = () if options.adapter is None else ADAPTER_ONLY  # an adapter brings its own
    return train("dpo", Parsed(options, parsed.sources), trainer, unsaved=unsaved)


def _prepare(options: DPOOptions) -> "DPOTrainer":
    """Data first: a bad row should not wait for gigabytes of weights."""
    from ..models.load import load_tokenizer
    from ..trainer.dpo import DPOTrainer

    tokenizer = load_tokenizer(options.model)
    judged = options.objective().unpaired
    rows, val = datasets(options, reader(options, tokenizer, judged=judged))
    model = load_start(options, tokenizer)
    trainer = DPOTrainer(model, tokenizer, train=rows, val=val, config=options.config(DPOConfig))
    if trainer.reference is not None:
        what = {"base": "the base, adapter off", "start": "the adapter as it is at the start"}[trainer.config.reference]
        note(f"reference: {what}")
    return trainer
