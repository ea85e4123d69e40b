"""Ctrl-C that cannot get lost.

Python drops an exception that is raised inside a finaliser or a weak reference's callback, and the collector may run
one at any moment; a KeyboardInterrupt that hits such a moment is gone and the command goes on for hours. So the handler
remembers, and commands ask between their phases. While training runs, the trainer's own handler is in charge.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """A SIGINT handler that raises KeyboardInterrupt and keeps `seen`."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


@contextmanager
def remembered_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C is remembered. Where SIGINT is ignored or handled by another already, that stays."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, CtrlC())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_if_asked() -> None:
    """Raise the KeyboardInterrupt that was dropped, if one was."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, CtrlC) and handler.seen:
        raise KeyboardInterrupt
