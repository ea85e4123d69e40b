"""`fourbit reward`: train a reward model on preference pairs, an adapter and a head that scores answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..trainer.preference_config import RewardConfig
from .parse import Parsed, parse
from .preference import StartOptions, checked_start, load_start, reader
from .show import note
from .train import ADAPTER_ONLY, datasets, train

if TYPE_CHECKING:
    from ..trainer.reward import RewardTrainer

ABOUT = """\
Train a reward model on preference pairs: a LoRA adapter and a head that gives
the preferred one of two answers the higher score.

  fourbit reward --model M --data pairs.jsonl --val 5% --out runs/reward

Rows are those of fourbit dpo with two answers. The validation figures tell how
often the preferred answer wins (reward accuracy). The folder --out gets the
adapter and reward_head.safetensors; in Python fourbit.RewardModel.load(model,
folder).score(tokenizer, rows) scores answers. With --adapter training goes on
from that adapter, and from its head where it has one."""


@dataclass(frozen=True, kw_only=True)
class RewardOptions(RewardConfig, StartOptions):
    """Everything `fourbit reward` takes."""


def run(args: Sequence[str]) -> int:
    """Parse, load, train, report. Returns 0, or 128 + the signal that ended the run."""
    parsed = parse(RewardOptions, args, command="reward", about=ABOUT)
    options = checked_start(parsed)
    trainer = _prepare(options)
    unsaved = () if options.adapter is None else ADAPTER_ONLY  # an adapter brings its own
    return train("reward", Parsed(options, parsed.sources), trainer, unsaved=unsaved)


def _prepare(options: RewardOptions) -> "RewardTrainer":
    """Data first: a bad row should not wait for gigabytes of weights."""
    from ..models.load import load_tokenizer
    from ..trainer.reward import RewardTrainer
    from ..trainer.reward_model import HEAD, read_head

    tokenizer = load_tokenizer(options.model)
    rows, val = datasets(options, reader(options, tokenizer))
    model = load_start(options, tokenizer)
    head = None
    if options.adapter is not None and (Path(options.adapter) / HEAD).exists():
        head = read_head(model, options.adapter)
        note(f"head: goes on from {options.adapter}")
    return RewardTrainer(model, tokenizer, train=rows, val=val, config=options.config(RewardConfig), head=head)
