"""Where the metrics of a run go: metrics.jsonl always, TensorBoard when asked, the terminal for whoever watches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import EnvironmentProblem
from ..files import write_text


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
    val_perplexity.
    """

    def __init__(self, folder: Path, log: Sequence[str], resumed_at: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.display: Display | None = None
        self._board = _tensorboard(folder, resumed_at) if "tensorboard" in log else None  # first: it may be missing
        if self.path.exists():  # a resumed run does its steps again: records past the checkpoint would stand twice
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.path) if record["step"] <= resumed_at]
            write_text(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; a line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _tensorboard(folder: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem("log=tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
