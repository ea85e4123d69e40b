"""`fourbit plan`: what a fine-tuning takes, before a weight is read."""

from dataclasses import dataclass

from ..settings import setting
from . import sft
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(sft.Options):
    """What a run of fourbit sft would take: memory by part, what fits, time.

      fourbit plan --model M --data train.jsonl --memory 24GiB --device cuda

    No weights are read; without --data examples have --lengths tokens. All flags
    of sft are taken, and a run's YAML file. The other trainings have --dry-run.
    """

    data: tuple[str, ...] = setting((), "JSONL file to train on; repeat the flag for more", metavar="FILE")
    out: str = setting("run", "folder of the run; nothing is written", metavar="PATH")
    dry_run: bool = setting(True, "this command trains nothing")
    lengths: tuple[int, ...] = setting((), "without data: tokens of an example; default max_length", metavar="N")
    memory: str | None = setting(None, "what the run may take; default: what is free here", metavar="SIZE")
    flops: float | None = setting(None, "FLOP/s of products, for the time; default: measured here", positive=True)
