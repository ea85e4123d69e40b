"""Where the metrics of a run go: metrics.jsonl always, TensorBoard when asked, the terminal for whoever watches."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import EnvironmentProblem, InputError
from ..files import regular_file, write_text
from ..settings import LARGEST, checked

LARGEST_FILE = 1 << 30  # bytes that are read back: two million steps
LONGEST_LINE = 1 << 20  # characters; ours have some hundreds


class Display(Protocol):
    """Shows a run while it goes."""

    def show(self, record: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Writes one JSON object a line, flushed at once, and passes it on; `display` may be set.

    A record has `step` (steps done) and either the metrics of an update (loss, lr, grad_norm, skipped, tokens,
    trained_tokens, tokens_per_second, memory under the name of what it is, and optimizer_bytes, which is state on the
    model's device; of a paged optimizer also optimizer_host_bytes and what pages did in this step: page_hits, _misses,
    _evictions, _bytes_in, _bytes_out, _stall_seconds, and _retries, which are micro-batches that were run again without
    pages when memory ran out) or of an evaluation (names beginning with val_).
    Means over the answers' tokens: token_accuracy (the likeliest token was the right one), entropy (nats). Preference
    training adds means over pairs: reward_chosen, _rejected, _margin, _accuracy, logp_chosen, logp_rejected; kl, a
    token's (see `tokens.token_kl`); and dropped, the share of rows that were left out. Evaluations of fine-tuning add
    val_perplexity."""

    def __init__(self, folder: Path, log: Sequence[str], resumed_at: int, notes: list[str]) -> None:
        self.path = folder / "metrics.jsonl"
        self.display: Display | None = None
        self._board = _tensorboard(folder, resumed_at) if "tensorboard" in log else None  # first: it may be missing
        kept = list[dict[str, Any]]()
        if resumed_at and self.path.exists():  # its steps are done again: records past the checkpoint would stand twice
            if (size := regular_file(folder, self.path.name).stat().st_size) > LARGEST_FILE:
                raise InputError(f"{self.path} must be at most {LARGEST_FILE:,} bytes, got {size:,}: move it away")
            kept = [record for record in read_metrics(self.path, notes) if record["step"] <= resumed_at]
        if missing := resumed_at - len({record["step"] for record in kept if "loss" in record}):
            notes.append(f"{self.path} lacks {missing:,} of the {resumed_at:,} steps that are done")
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        if len(line := json.dumps(record) + "\n") > LONGEST_LINE:
            raise InputError(f"a step's metrics are at most {LONGEST_LINE:,} characters of JSON, got {len(line):,}")
        self._file.write(line)
        self._file.flush()
        if self.display is not None:
            self.display.show(record)
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        for shown in filter(None, (self.display, self._board)):
            shown.close()


def read_metrics(path: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, as `write` took them. Lines that are none are left out, and counted in `notes`;
    without a word only a last one that a crash cut off."""
    records, damaged = list[dict[str, Any]](), 0
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(LONGEST_LINE + 1):
            try:
                record: dict[str, Any] = json.loads(line)
                checked("metrics", record, dict[str, float | bool | None])
                checked("step", record.get("step"), int, {"least": 0, "most": LARGEST})
                records.append(record)
            except (ValueError, RecursionError):
                damaged += line.endswith("\n")
    if damaged and notes is not None:
        notes.append(f"{path}: {damaged} lines damaged, or not of this run: left out")
    return records


def finite(value: float) -> float | None:
    """JSON has no NaN: a metric that is none is null."""
    return value if math.isfinite(value) else None


def _tensorboard(folder: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem("log=tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
