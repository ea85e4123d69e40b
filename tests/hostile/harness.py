"""What a hostile case is, how one is run, and the rule that it is held to.

The rule: a command that meets a bad input ends within 5 seconds and 500 MB above the level after imports, with an exit
code from 2 to 6 and one paragraph of at most 2,000 characters on stderr, without a traceback, a "fault of fourbit" or a
control character; every input is byte for byte what it was, and nothing new lies outside the output folder.

The paragraph is the part of stderr from the last line on that begins with "fourbit: "; what stands before it are notes
of progress, which may be there but not be long. `fourbit data` reports bad rows without such a line: there it is the
last line. Seconds are those of an idle machine: processor time of all processes of a case, and the time in which none
of them could run. So work beside the tests fails no case.
"""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 5.0
KILL_SECONDS = 6.0
MEMORY_KIB = 500_000_000 // 1024  # above the level
KILL_KIB = 1 << 20  # above the level: before the machine suffers
PARAGRAPH = 2000
STDERR = 8000  # all of it, notes included
HASHED_BYTES = 64 << 20  # larger inputs are sparse: told by size and time

MADE = ("run", "rm")  # of `start`: what commands made

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One hostile input.

    make: puts it into a folder that is a copy of `start` (see conftest.py). argv: the command that meets it there.
    ends: "refused" (exit code 2 to 6), "done" (a legal input: exit code 0), or "either", where both are right and all
    other rules still hold. outputs: paths in the folder that the command may write to, or add to below; what is there
    below may change only where it ends with exit code 0.
    """

    name: str
    make: Make
    argv: Sequence[str]
    ends: str = "refused"
    outputs: tuple[str, ...] = ("o",)
    stdin: str = ""
    encoding: str = "utf-8"
    closed: tuple[str, ...] = ()  # of stdin, stdout, stderr
    stdout: str = ""  # a device to take for it
    made: bool = False  # needs the run and the reward model
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    code: int
    ended: str  # "itself", or what it was killed for: "time", "memory"
    seconds: float
    peak_kib: int
    out: bytes
    err: bytes


class Forks:
    """The process of `forks.py`, and what a harmless command takes in it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.level = scratch, 0
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        places = {"MPLBACKEND": "Agg", "MPLCONFIGDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
        kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept | threads | offline | places,
            start_new_session=True,
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process that forks ended with {self.process.wait()}"
        return json.loads(line)

    def run(self, case: Case, here: Path, seconds: float = KILL_SECONDS) -> Outcome:
        """Run a case in the folder `here`."""
        assert self.process.stdin is not None
        files = {name: self.scratch / name for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(case.stdin, encoding="utf-8", errors="surrogateescape")
        empty = {"TMPDIR": str(here / "tmp"), "HOME": str(here / "home")}
        job = {
            "argv": list(case.argv),
            "cwd": os.fspath(here),
            "env": empty | {"COLUMNS": "80"} | case.env,
            "encoding": case.encoding,
            "closed": case.closed,
            "seconds": seconds,
            "most_kib": self.level + KILL_KIB,
            **{name: str(path) for name, path in files.items()},
            **({"stdout": case.stdout} if case.stdout else {}),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self._answer()
        out = b"" if case.stdout else files["stdout"].read_bytes()
        return Outcome(**answer, out=out, err=files["stderr"].read_bytes())

    def close(self) -> None:
        """End the process by ending its input."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


def copied(start: Path, here: Path, made: bool = True) -> Path:
    """A copy of the folder that cases begin with; without what commands made there, unless `made`."""
    left_out = shutil.ignore_patterns() if made else shutil.ignore_patterns(*MADE)
    shutil.copytree(start, here, symlinks=True, ignore=left_out, copy_function=shutil.copyfile)
    for name in ("tmp", "home"):
        (here / name).mkdir()
    return here


def snapshot(folder: Path) -> dict[bytes, tuple[Any, ...]]:
    """Every path below a folder and what it is: a file's bytes, a link's aim, a folder, a pipe."""
    found: dict[bytes, tuple[Any, ...]] = {}
    root = os.fsencode(folder)
    for parent, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(parent, name)
            found[os.path.relpath(path, root)] = _told(path)
    return found


def _told(path: bytes) -> tuple[Any, ...]:
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        return ("link", os.readlink(path))
    if not stat.S_ISREG(info.st_mode):
        return (stat.S_IFMT(info.st_mode),)
    if info.st_size > HASHED_BYTES:
        return ("large file", info.st_size, info.st_mtime_ns)
    with open(path, "rb") as file:
        return ("file", hashlib.file_digest(file, "sha256").hexdigest())


def broken_rules(
    case: Case, outcome: Outcome, before: dict[bytes, Any], after: dict[bytes, Any], level: int
) -> list[str]:
    """What of the rule a case broke, each in a few words; empty: it held."""
    return [
        *_limits(outcome, level),
        *_ending(case, outcome),
        *_words(case, outcome),
        *_files(case, outcome.code == 0, before, after),
    ]


def _limits(outcome: Outcome, level: int) -> list[str]:
    broken = []
    if outcome.ended == "time" or outcome.code == -signal.SIGXCPU:
        broken.append("hangs: killed for its time")
    elif outcome.ended == "memory":
        broken.append("takes memory: killed at 1 GiB")
    elif outcome.seconds > SECONDS:
        broken.append(f"takes {outcome.seconds:.1f} s")
    if outcome.peak_kib - level > MEMORY_KIB:
        broken.append(f"takes {(outcome.peak_kib - level) / 1024:.0f} MiB")
    return broken


def _ending(case: Case, outcome: Outcome) -> list[str]:
    right = {"refused": range(2, 7), "done": (0,), "either": (0, *range(2, 7))}[case.ends]
    if outcome.ended != "itself" or outcome.code in right:
        return []
    return [f"ends with exit code {outcome.code}"]


def _words(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with what was printed."""
    out, err = (text.decode(case.encoding, "surrogateescape") for text in (outcome.out, outcome.err))
    broken = [f"prints {words!r}" for words in ("Traceback", "fault of fourbit", "panicked at") if words in err]
    if any("\udc80" <= c <= "\udcff" for c in out + err):
        broken.append("prints what is not in the stream's encoding")
    elif marks := sorted({c for c in err if not c.isprintable() and c != "\n"} | {c for c in out if _drives(c)}):
        broken.append(f"prints control characters {marks[:4]}")
    if len(err) > STDERR:
        broken.append(f"prints {len(err):,} characters")
    if outcome.code in range(2, 7) and "stderr" not in case.closed:
        broken += _paragraph(case, err)
    return broken


def _drives(character: str) -> bool:
    return not character.isprintable() and character not in "\n\t"


def _paragraph(case: Case, err: str) -> list[str]:
    """What is wrong with the error."""
    lines = err.rstrip("\n").split("\n")
    starts = [number for number, line in enumerate(lines) if line.startswith("fourbit: ")]
    if not starts and not (case.argv[0] == "data" and err.strip()):
        return ["prints no error that begins with 'fourbit: '"]
    paragraph = "\n".join(lines[starts[-1] if starts else -1 :])
    broken = [f"has an error of {len(paragraph):,} characters"] if len(paragraph) > PARAGRAPH else []
    if "\n\n" in paragraph:
        broken.append("has an error of several paragraphs")
    return broken


def _files(case: Case, done: bool, before: dict[bytes, Any], after: dict[bytes, Any]) -> list[str]:
    may = tuple(os.fsencode(name) for name in case.outputs)
    changed = sorted(path for path, was in before.items() if after.get(path) != was)
    changed = [path for path in changed if path not in may and not (done and _below(path, may))]
    new = [path for path in sorted(after.keys() - before.keys()) if not _below(path, may)]
    return [f"changes inputs: {_named(changed)}"] * bool(changed) + [f"leaves files: {_named(new)}"] * bool(new)


def _below(path: bytes, names: tuple[bytes, ...]) -> bool:
    return any(path == name or path.startswith(name + b"/") for name in names)


def _named(paths: list[bytes]) -> str:
    return ", ".join(os.fsdecode(path).encode("utf-8", "backslashreplace").decode() for path in paths[:3])
