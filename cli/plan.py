"""`fourbit plan`: what a fine-tuning takes, before a weight is read."""

import re
from dataclasses import dataclass, replace

from ..errors import InputError, shown
from ..settings import setting
from . import sft, train
from .parse import Sources


@dataclass(frozen=True, kw_only=True)
class Options(sft.Options):
    """What a run of fourbit sft takes, before a weight is read; without --data, of rows
    of --lengths, or of --max-length: then a folder with a config.json alone does.

    All flags of sft are taken, and a run's YAML file. The other trainings have --dry-run.
    """

    data: tuple[str, ...] = setting((), "JSONL file to train on; repeat the flag for more", metavar="FILE")
    out: str = setting("run", "folder of the run; nothing is written", metavar="PATH")
    dry_run: bool = setting(True, "this command trains nothing")
    lengths: str | None = setting(None, "tokens of rows instead of data, each for an equal share", metavar="N,N")
    memory: str | None = setting(None, "what the run may take; default: what is free here", metavar="SIZE")
    flops: float | None = setting(None, "FLOP/s of products, for the time; default: measured here", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lengths is not None and not (re.fullmatch(r"\d+(,\d+)*", self.lengths) and min(self.tokens()) > 1):
            raise InputError(f"lengths must be numbers from 2 on, such as 300,2000, got {shown(self.lengths)}")
        if self.lengths is not None and self.data:
            raise InputError("lengths stand for data: leave out lengths, or data")

    def tokens(self) -> list[int]:
        """Those of each row, without data."""
        return [self.max_length] if self.lengths is None else [int(n) for n in self.lengths.split(",")]


def run(options: Options, sources: Sources) -> int:
    """Print what the run takes, whatever a run's file says of `dry_run`. Returns the exit code."""
    return train.run(replace(options, dry_run=True), sources)
