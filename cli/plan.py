"""`fourbit plan`: what a fine-tuning takes, before a weight is read."""

from dataclasses import dataclass

from ..settings import setting
from . import sft
from .train import run as run


@dataclass(frozen=True, kw_only=True)
class Options(sft.Options):
    """What a run of fourbit sft takes, before a weight is read; without --data, of rows of --max-length.

    All flags of sft are taken, and a run's YAML file. The other trainings have --dry-run.
    """

    data: tuple[str, ...] = setting((), "JSONL file to train on; repeat the flag for more", metavar="FILE")
    out: str = setting("run", "folder of the run; nothing is written", metavar="PATH")
    dry_run: bool = setting(True, "this command trains nothing")
    memory: str | None = setting(None, "what the run may take; default: what is free here", metavar="SIZE")
    flops: float | None = setting(None, "FLOP/s of products, for the time; default: measured here", positive=True)
