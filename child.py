"""A program of ours that runs apart, under limits: how it is started, asked and ended.

What a stranger's file makes it do stays there.
"""

import math
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # what an interpreter may need, and a clock


def child_command(file: Path, packages: Sequence[str], *args: str) -> list[str]:
    """The command that runs `file`, which sees its `args`, the standard library and `packages`, and nothing else."""
    # A package may lie where an isolated interpreter does not look.
    found = [spec.origin for name in packages if (spec := find_spec(name)) and spec.origin]
    folders = list(dict.fromkeys(str(Path(origin).parent.parent) for origin in found))
    start = f"import sys, runpy; sys.path += {folders!r}; runpy.run_path(sys.argv[1], run_name='__main__')"
    return [sys.executable, "-I", "-X", "utf8", "-c", start, str(file), *args]


def child_environment() -> dict[str, str]:
    """The few variables that it is given."""
    return {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}


class Child:
    """A process that is sent bytes and answers in lines. It is in a session of its own: Ctrl-C is its parent's. `stop`
    ends it and all that it has started; so does the end of this object. Raises OSError where it does not start."""

    def __init__(self, command: Sequence[str], **how: Any) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True} | how
        self.process = subprocess.Popen(command, bufsize=0, **pipes)  # a fork may fall between a write and its flush
        self.stop = weakref.finalize(self, _end, self.process, os.getpid())
        self._rest = b""

    def ask(self, request: bytes, seconds: float = math.inf) -> bytes:
        """The next line, after this request. Raises TimeoutError where none comes in time, EOFError where it ended."""
        until, left = time.monotonic() + seconds, memoryview(request)
        with suppress(BrokenPipeError):  # it ended; so does the stream of its answers
            while left:
                left = left[os.write(_ready(self.process.stdin, select.POLLOUT, until), left[: select.PIPE_BUF]) :]
        while b"\n" not in self._rest:
            if not (more := os.read(_ready(self.process.stdout, select.POLLIN, until), 1 << 16)):
                raise EOFError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _ready(pipe: Any, event: int, until: float) -> int:
    """The number of a pipe that may be written or read without waiting. TimeoutError."""
    (waits := select.poll()).register(pipe, event)
    if not waits.poll(None if until == math.inf else max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError
    return int(pipe.fileno())


def _end(process: subprocess.Popen[bytes], born: int) -> None:
    if os.getpid() != born:  # in a fork, whose parent's it is
        return
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        pipe.close()  # what has left the group may hold the other ends
    process.wait()
