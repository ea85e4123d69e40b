"""The process that runs hostile cases: it imports everything once, then forks for each, so a case costs no import.

A program of its own (`python forks.py`), for a fork must find no threads of a test runner. A JSON line in asks for a
case, a JSON line out says how it ended. Each case is a session of its own with limits on processor time and on the size
of files; it is killed, with whatever it started, when it takes too long or too much memory.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.02
CPU_SECONDS = 10  # of one process: the last resort
WALL_SECONDS = 60.0  # the same
FILE_BYTES = 64 << 20
LAZY = (  # what commands import inside functions
    "PIL.Image",
    "PIL.PngImagePlugin",
    "gguf",
    "gguf.quants",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "matplotlib.pyplot",
    "rich.console",
    "rich.text",
    "safetensors.torch",
    "readline",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.utils.tensorboard",
    "yaml",
)


def import_everything() -> None:
    """All that a command may need, with one thread: no pool of threads may exist when a case is forked."""
    import torch

    torch.set_num_threads(1)
    from fourbit.cli.main import COMMANDS

    for name in [*(f"fourbit.cli.{command}" for command in COMMANDS), *LAZY]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def load_reward_model(folder: str) -> int:
    """`fourbit.RewardModel.load`, which no command calls, under the command line's rules for errors."""
    import fourbit
    from fourbit.cli.main import explain

    try:
        model, _ = fourbit.load("m")
        fourbit.RewardModel.load(model, folder)
    except Exception as error:
        message, code = explain(error)
        print(message, file=sys.stderr)
        return code
    return 0


def run_child(job: dict[str, Any]) -> None:
    """In the forked process: take streams, folder and limits, run the command, and end as a program does."""
    code = 1
    try:
        _streams(job)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        for what, limit in (
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (limit, limit))
        code = _command(job["argv"])()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # what main lets through, a panic of a library above all: Python would print it
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except BaseException:
                code = code or 120  # as Python ends when it cannot flush
        os._exit(code)


def _command(argv: list[str]) -> Callable[[], int]:
    if argv[0] == "RewardModel.load":
        return lambda: load_reward_model(argv[1])
    from fourbit.cli.main import main

    return lambda: main(argv)


def _streams(job: dict[str, Any]) -> None:
    """Standard streams from and to the job's files, in its encoding; those named in `closed` are closed."""
    os.setsid()
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, (name, mode) in enumerate(zip(("stdin", "stdout", "stderr"), modes, strict=True)):
        opened = os.open(job[name], mode, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
        stream = io.TextIOWrapper(
            io.FileIO(descriptor, "r" if descriptor == 0 else "w", closefd=False),
            encoding=job["encoding"],
            errors="backslashreplace" if name == "stderr" else "strict",
            line_buffering=name == "stderr",
        )
        if descriptor == 0:
            stream = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding=job["encoding"])
        setattr(sys, name, stream)
    for name in job["closed"]:
        os.close(("stdin", "stdout", "stderr").index(name))
        setattr(sys, name, None)  # as Python finds it


def supervise(pid: int, seconds: float, most_kib: int) -> dict[str, Any]:
    """Wait for a case, or end it. Its seconds are those it would take on an idle machine: processor time of all its
    processes, and the time in which none of them could run."""
    begun, blocked, computed, ended, watch = time.monotonic(), 0.0, 0.0, "itself", select.poll()
    handle, last = os.pidfd_open(pid), begun
    watch.register(handle, select.POLLIN)
    while ended == "itself" and not watch.poll(POLL_SECONDS * 1000):
        runs, computed, resident = _looked_at(pid)
        now = time.monotonic()
        blocked, last = blocked + (0 if runs else now - last), now
        if blocked + computed > seconds or now - begun > WALL_SECONDS:
            ended = "time"
        elif resident > most_kib:
            ended = "memory"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its session; itself too, if it has not ended
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # before it has become a session's leader
    os.close(handle)
    _, status, used = os.wait4(pid, 0)
    _reap_orphans()
    computed = max(computed, used.ru_utime + used.ru_stime)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "ended": ended, "seconds": blocked + computed, "peak_kib": used.ru_maxrss}


def _looked_at(pid: int) -> tuple[bool, float, int]:
    """Of a process and its children: whether any runs or waits for a processor, processor seconds, memory in KiB."""
    runs, ticks, pages = False, 0, 0
    for each in (pid, *_children(pid)):
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{each}/stat") as file:
                fields = file.read().rpartition(")")[2].split()  # from the third on, the state
            runs |= fields[0] in "RZ"  # one that has just ended will be waited for
            ticks += sum(map(int, fields[11:15]))
            pages += int(fields[21])
    return runs, ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") // 1024


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _reap_orphans() -> None:
    """End what a case left running in sessions of its own: this process adopts it (see `main`)."""
    for orphan in _children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(orphan, 0)


def main() -> None:
    """Serve until the input ends. The first line out says that everything is imported."""
    os.nice(5)  # a thousand cases in a row: others first
    import_everything()
    gc.collect()
    gc.freeze()  # else a collection in a child would touch, and so copy, every page
    atexit._clear()  # what libraries do at their end takes longer than a case; a command's own handlers still run
    subreaper = 36  # PR_SET_CHILD_SUBREAPER
    ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0)
    out = os.fdopen(os.dup(1), "w")
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_child(job)
        print(json.dumps(supervise(pid, job["seconds"], job["most_kib"])), file=out, flush=True)
    os._exit(0)  # libraries that say at their end what they leaked have no part in this


if __name__ == "__main__":
    main()
