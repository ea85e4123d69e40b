"""Ctrl-C and SIGTERM, remembered, so that none is lost and a run ends between steps with everything saved.

Python drops an exception that is raised inside a finaliser or a weak reference's callback, and the collector may run
one at any moment; a KeyboardInterrupt that hits such a moment is gone and the command goes on for hours. So a command
asks between its phases, and while training runs its loop polls.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """A signal handler that remembers: `signal` is None until one arrives, then its number."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.signal: int | None = None
        self.then = then

    def __bool__(self) -> bool:
        return self.signal is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.then()


def _caught(handler: Any, *numbers: int) -> Callable[[], None]:
    """Set a signal handler; what is returned puts back those before. Outside the main thread none can be set."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = {number: signal.signal(number, handler) for number in numbers}

    def restore() -> None:
        for number, usual in before.items():
            signal.signal(number, usual)

    return restore


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM while inside. The first sets the flag, the second acts as if nobody had caught it.
    Outside the main thread the flag stays down."""
    flag = Interrupt()
    flag.then = restore = _caught(flag, signal.SIGINT, signal.SIGTERM)
    try:
        yield flag
    finally:
        restore()


@contextmanager
def remembered_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt as ever and is remembered. Where SIGINT is ignored or handled by another
    already, that stays."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    restore = _caught(Interrupt(_stop), *([signal.SIGINT] if usual else []))
    try:
        yield
    finally:
        restore()


@contextmanager
def at_most(seconds: float, error: Exception) -> Iterator[None]:
    """Raises `error` where the body takes more processor time: also in the middle of a regular expression, which looks
    for signals as it goes. Outside the main thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def stop_if_asked() -> None:
    """Raise the KeyboardInterrupt that was dropped, if one was."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Interrupt) and handler:
        raise KeyboardInterrupt


def _stop() -> None:
    raise KeyboardInterrupt
