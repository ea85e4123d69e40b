"""Ctrl-C and SIGTERM while training runs: remembered, so that a run ends between steps with everything saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """A signal handler that remembers: `signal` is None until one arrives, then its number; `before`: the handlers that
    it stands in for, which are back in their places from then on."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        for number, usual in self.before.items():
            signal.signal(number, usual)


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM while inside. The first sets the flag, the second acts as if nobody had caught it.
    Outside the main thread the flag stays down."""
    flag = Interrupt()
    if threading.current_thread() is threading.main_thread():
        flag.before = {number: signal.signal(number, flag) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        flag.restore()
