"""Ctrl-C and SIGTERM while training runs: remembered, so that a run ends between steps with everything saved.

What makes a step's data may take minutes, and nothing of it is kept: there the signal ends a block at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal came in a block that it ends. Nothing but that block catches it."""


class Interrupt:
    """A signal handler that remembers: `signal` is None until one arrives, then its number; `before`: the handlers that
    it stands in for, which are back in their places from then on."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}
        self.ends = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()
        while frame is not None and frame.f_code.co_name not in ("__enter__", "__exit__"):
            frame = frame.f_back
        if self.ends and frame is None:  # else something is being put in its place, or back: that is done first
            raise Interrupted

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A block that a signal ends where it is."""
        self.ends = True
        try:
            yield
        except Interrupted:
            pass
        finally:
            self.ends = False

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
