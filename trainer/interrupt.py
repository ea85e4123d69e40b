"""Ctrl-C and SIGTERM as a flag that loops poll, so that a run ends between steps with everything saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """`signal` is None until one arrives, then its number."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM while inside. The first sets the flag, the second acts as if nobody had caught it.

    Outside the main thread signals cannot be caught: the flag then stays down.
    """
    flag = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        flag.signal = number
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        restore()
