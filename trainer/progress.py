"""A run on the terminal: one line that is redrawn when someone watches, lines now and then when output goes to a file.

Everything goes to stderr, so that stdout stays free for results.
"""

import shutil
import sys
import time
from typing import Any

from .metrics import Display

SMOOTHING = 0.9  # of the metrics shown: exponential moving average over steps
SMOOTHED = {  # those, and what they are called
    "loss": "loss",
    "reward": "reward",
    "reward_margin": "margin",
    "reward_accuracy": "accuracy",
    "reward_chosen": "chosen",
    "reward_rejected": "rejected",
    "kl": "kl",
    "logp_chosen": "logp+",
    "logp_rejected": "logp-",
}
OF_VALIDATION = ("loss", "reward", "reward_margin", "reward_accuracy")
PLAIN_SECONDS = 10.0  # between lines of their own
CLEARED = "\r\x1b[2K"  # the terminal's line, from its start


def display_for(total: int, start: int = 0, name: str = "") -> Display:
    """The display that fits where stderr goes. total, start: steps in all, and done before; name: of one of several."""
    return _Line(total, start, name, live=sys.stderr.isatty() and not name)


class _Line:
    """The metrics in one line: after each step in place of the line before (live), or on a line of its own every few
    seconds, and at every evaluation and the first and last step."""

    def __init__(self, total: int, start: int, name: str = "", *, live: bool) -> None:
        self.total, self.start, self.name, self.live = total, start, name and f"{name}  ", live
        self.begun = self.last = time.monotonic()
        self.means: dict[str, float] = {}
        self.skipped = 0
        self.shown: dict[str, str] = {}

    def show(self, record: dict[str, Any]) -> None:
        self._add(record)
        step, now = record["step"], time.monotonic()
        told = self.live or step in (self.start + 1, self.total) or "lr" not in record
        if now - self.last < PLAIN_SECONDS and not told:
            return
        self.last = now
        left = (now - self.begun) / max(1, step - self.start) * (self.total - step)
        metrics = "  ".join(f"{name} {value}" for name, value in self.shown.items())
        line = f"{self.name}step {step}/{self.total}  left {_clock(left)}  {metrics}"
        if self.live:
            print(CLEARED + line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)
        else:
            self.message(line)

    def _add(self, record: dict[str, Any]) -> None:
        """What to show from now on, by name; smoothed where it jumps."""
        if "lr" not in record:
            found = {SMOOTHED[name]: record[f"val_{name}"] for name in OF_VALIDATION if f"val_{name}" in record}
            self.shown |= {f"val {short}": _number(value) for short, value in found.items()}
            return
        self.skipped += record["skipped"]
        for name in SMOOTHED.keys() & record.keys():
            if (value := record[name]) is not None:
                self.means[name] = SMOOTHING * self.means.get(name, value) + (1 - SMOOTHING) * value
        means = {short: self.means.get(name) for name, short in SMOOTHED.items() if name in record}
        memory = record.get("rss_anon") or record.get("max_memory_allocated") or 0
        host = record.get("optimizer_host_bytes")
        self.shown |= {short: _number(mean) for short, mean in means.items()}
        self.shown |= {
            "lr": f"{record['lr']:.1e}",
            "tok/s": f"{record['tokens_per_second']:,.0f}",
            "mem": f"{memory / 2**30:.2f} GiB",
            "opt": f"{record['optimizer_bytes'] / 2**30:.2f} GiB"
            + ("" if host is None else f" + {host / 2**30:.2f} on host"),
        }
        self.shown |= {"dropped": f"{record['dropped']:.1%}"} if record.get("dropped") else {}
        self.shown |= {"skipped": str(self.skipped)} if self.skipped else {}

    def message(self, text: str) -> None:
        print(CLEARED * self.live + text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print(file=sys.stderr)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
