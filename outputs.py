"""Where a command may write: an output is compared with everything that is read before anything is opened.

What is read is never written: two paths are one when device and inode say so, links followed. What is there already is
kept: a file is replaced only where the user says so, a folder written into only where it is empty or a run's own. What
was finished is kept: rows lie beside their place in a file that says it is partial, from which the command goes on. A
link to a file is followed; a pipe, a device or standard output (`-`) is written into, row by row. What the file system
of a run's folder cannot do is found out before the first step.
"""

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from .errors import DiskError, EnvironmentProblem, InputError
from .files import disk_errors, remove_flat, remove_stale, sync, temporary_name, write_whole

LOCK = "run.lock"
StrPath = str | os.PathLike[str]
_PARTIAL = "partial: the rows that were finished; the same command, resumed, goes on from here"
_MARKS = {  # what a run's files say, and nobody else's
    LOCK: re.compile(r"\Aprocess [0-9]+ on [^\n]* \(fourbit\)\n\Z"),
    "config.yaml": re.compile(r'^format: "?fourbit run ', re.MULTILINE),
}
_FILES = re.compile(r"latest|.*\.(lock|yaml|jsonl?|png|safetensors|jinja)")  # names that a run writes to
_FOLDERS = ("checkpoints", "tensorboard")
_RESULTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


class Output:
    """A file of rows, one a line, written as they are finished; whole under its name only when all are.

        with Output(path, inputs=paths, overwrite=options.overwrite, resume=options.resume, made_from=how) as out:
            model = ...                        # what `out` refuses, it has refused before the model is read
            for row in rows[len(out.rows) :]:  # out.rows: the lines that a run before this one finished
                out.write(json.dumps(answer(row)))

    path: followed where it is a link; `-` is standard output. name: what errors call the option. inputs: every file and
    folder that the command reads. made_from: JSON of what the rows depend on; rows finished under another are refused.
    Rows go into `path.partial`, whose first line says what it is, and each is there once `write` returns. Leaving the
    block gives them their name; leaving it by an exception keeps the partial file, if it has rows, and adds a note that
    says so to the exception. Into a pipe, a device or standard output they go directly (`partial` is None); `stdout`
    says that nothing else should go there.

    Raises InputError for a place that is read, is taken (unless overwrite), is half-written (unless resume or
    overwrite) or cannot be written; EnvironmentProblem where another command writes; DiskError when the disk refuses.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        name: str = "out",
        inputs: Iterable[StrPath] = (),
        overwrite: bool = False,
        resume: bool = False,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.name, self.rows, self.written = Path(path), name, list[str](), 0
        self.partial: Path | None = None
        self.stdout = os.fspath(path) == "-"
        inputs, there = list(inputs), None if self.stdout else _stat(path)
        if not there and not self.stdout and ("\0" in os.fspath(path) or not _is_free(path)):
            raise InputError(f"{name} {path} must be a file in a folder that exists")
        check_apart(path, f"{name} {path}", inputs)
        if self.stdout or (there and (out := _stat(1)) and os.path.samestat(there, out)):
            if sys.stdout is None:
                raise InputError(f"{name} is standard output, which is closed")
            self.stdout, self._file = True, sys.stdout.buffer
        elif there and (stat.S_ISFIFO(there.st_mode) or stat.S_ISCHR(there.st_mode)):
            self._file = _opened_stream(path, name)
        elif there and not stat.S_ISREG(there.st_mode):
            raise InputError(f"{name} {path} must be a file in a folder that exists, not a folder, a socket or a disk")
        elif there and not overwrite:
            raise InputError(f"{name} {path} is there already: overwrite=True replaces it, or give another name")
        else:
            self.path = Path(os.path.realpath(path))
            self.partial = self.path.with_name(self.path.name + ".partial")
            alone = [read for read in inputs if not os.path.isdir(read)]  # in a folder that is read it may wait
            check_apart(self.partial, f"{self.partial}, where rows wait for {name},", alone)
            self._head = json.dumps({"fourbit": _PARTIAL, "made_from": dict(made_from or {})}).encode() + b"\n"
            self._file = self._opened_partial(self.partial, overwrite, resume)

    def write(self, line: str) -> None:
        """Add a row: text without a line break."""
        raw = line.encode("utf-8", "surrogatepass") + b"\n"
        try:
            with contextlib.nullcontext() if self.stdout else disk_errors("rows", self.path.parent, len(raw)):
                self._file.write(raw)
                self._file.flush()
        except DiskError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise DiskError(f"nobody reads {self.path} any more: it got {self.written:,} rows") from None
            raise
        self.written += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        done = len(self.rows) + self.written
        try:
            if self.partial is not None and error is None:
                self._finish(self.partial)
            elif self.partial is not None and not done:
                os.unlink(self.partial)
            elif self.partial is not None and error is not None:
                rows = "row that was" if done == 1 else f"{done:,} rows that were"
                error.add_note(f"{self.partial} keeps the {rows} finished; the same command with resume=True goes on")
        finally:
            with contextlib.suppress(OSError):  # every row is flushed: what fails here was told
                if not self.stdout:
                    self._file.close()  # and with it the lock

    def _finish(self, partial: Path) -> None:
        def copy(part: Path) -> None:
            with part.open("wb") as file:
                self._file.seek(len(self._head))
                shutil.copyfileobj(self._file, file)
            if self.path.exists():  # what is replaced may have been for few eyes
                shutil.copymode(self.path, part)

        with disk_errors("rows", self.path.parent, os.fstat(self._file.fileno()).st_size):
            write_whole(self.path, copy)
            os.unlink(partial)

    def _opened_partial(self, partial: Path, overwrite: bool, resume: bool) -> BinaryIO:
        """The partial file, locked, at its end: a new one, or an earlier run's, whose rows are taken over."""
        new = not os.path.lexists(partial)
        how = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT | os.O_EXCL if new else 0)
        try:
            file = os.fdopen(os.open(partial, how, 0o666), "r+b")
        except OSError as error:
            what = f"{self.name} {self.path} cannot be written, nor {partial.name} beside it"
            raise InputError(f"{what}: {error.strerror or error}") from None
        try:
            _lock(file.fileno(), str(partial), "another command")
            self._take_over(file, partial, new, overwrite, resume)
        except BaseException:
            file.close()
            raise
        return file

    def _take_over(self, file: BinaryIO, partial: Path, new: bool, overwrite: bool, resume: bool) -> None:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        head, *lines = file.read().split(b"\n")[:-1] or [b""] if regular else [b""]  # what is torn has no line break
        try:
            said = json.loads(self._head if new else head)
            if said["fourbit"] != _PARTIAL:
                raise LookupError(said)
            made_from = dict(said["made_from"])
        except (ValueError, TypeError, LookupError, RecursionError):
            what = f"{partial} is no partial file of fourbit's"
            raise InputError(f"{what}: rename it, or give {self.name} another name") from None
        if lines and resume:
            now = json.loads(self._head)["made_from"]
            if other := [key for key in sorted({*now, *made_from}) if now.get(key) != made_from.get(key)]:
                what = f"{partial} holds rows that were made with another {', '.join(other)}"
                raise InputError(f"{what}: resume with the same, or overwrite=True to begin anew")
            self.rows = [line.decode("utf-8", "surrogatepass") for line in lines]
        elif lines and not overwrite:
            what = f"{len(lines):,} rows" if len(lines) > 1 else "a row"
            raise InputError(
                f"{partial} holds {what} of an earlier run: resume=True goes on, overwrite=True begins anew"
            )
        with disk_errors("rows", partial.parent, len(self._head)):
            file.seek(0)
            file.write(self._head + b"".join(line + b"\n" for line in lines[: len(self.rows)]))
            file.truncate()
            file.flush()


def _is_free(path: StrPath) -> bool:
    """Whether a file may be made where nothing can be opened: not at a link that leads round, nor in no folder."""
    place = Path(os.path.realpath(path))
    return place.parent.is_dir() and not os.path.lexists(place)


def _stat(path: StrPath | int) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _opened_stream(path: StrPath, name: str) -> BinaryIO:
    """A pipe that somebody reads, or a device."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        why = "nobody reads it" if error.errno == errno.ENXIO else error.strerror
        raise InputError(f"{name} {path} is a pipe or a device that cannot be written: {why}") from None
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")


def check_apart(path: StrPath, what: str, inputs: Iterable[StrPath], *, folder: bool = False) -> None:
    """InputError where writing to `path` would change what is read: it is an input, or a file there in a folder that is
    one; or, of a folder to write, it lies in one. what: its name in the error."""
    place, there = Path(os.path.realpath(path)), _stat(1 if os.fspath(path) == "-" else path)
    if (there is None and not folder) or (there is not None and stat.S_ISCHR(there.st_mode)):
        return
    above = [found for each in (place, *place.parents) if (found := _stat(each))]
    for read in inputs:
        found, inside = _stat(read), list[os.stat_result | None]()
        if found is None:
            continue
        if stat.S_ISDIR(found.st_mode):
            inside = [_stat(entry.path) for entry in os.scandir(read)]
            if any(os.path.samestat(found, each) for each in above):
                raise InputError(f"{what} lies in {read}, which is read: give another place")
        if there is not None and any(each and os.path.samestat(there, each) for each in (found, *inside)):
            raise InputError(f"{what} is read, as {read}: give another place")


@contextlib.contextmanager
def lock_folder(folder: StrPath, inputs: Iterable[StrPath] = (), resume: str | None = None) -> Iterator[list[str]]:
    """Hold the output folder of a run, made if need be; a second run in it is refused with `EnvironmentProblem`.

    inputs: what the run reads. resume: as in its settings. Yields a sentence for each thing that the file system cannot
    do and the run can do without. Raises InputError for a folder that is read, is no run's, holds links or a run that
    this one does not go on from; EnvironmentProblem where no run can be written; DiskError when the disk refuses.
    The operating system drops the lock with the process, however that ends, so a lock never goes stale; the file that
    stays behind names the last holder and marks the folder as a run's. (A forked child shares the lock and keeps it as
    long as it lives.)"""
    where = f"the output folder {folder}"
    _check_folder(folder, inputs, resume)
    try:
        os.makedirs(folder, exist_ok=True)
        how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(Path(folder) / LOCK, how, 0o644)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to {where}: {error.strerror}; choose another out") from error
    try:
        holder = os.pread(descriptor, 400, 0).decode(errors="replace").removesuffix(" (fourbit)\n")
        locked = _lock(descriptor, where, holder or "another process")
        if locked:
            remove_stale(Path(folder))
        notices = [] if locked else [f"files in {where} cannot be locked: start no second run in it"]
        text = f"process {os.getpid()} on {platform.node()} (fourbit)\n".encode()
        with disk_errors("the lock", Path(folder), len(text)):
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))  # afterwards: the mark is never missing
        yield notices + _tried(Path(folder))
    finally:
        os.close(descriptor)


def _check_folder(folder: StrPath, inputs: Iterable[StrPath], resume: str | None) -> None:
    """InputError for a folder that a run must not write into, before anything in it is opened."""
    name, text = f"out {folder}", os.fspath(folder)
    if not text or "\0" in text or (not text.isascii() and text != text.encode(errors="replace").decode()):
        raise InputError(f"out must be the name of a folder, in UTF-8, got {text!r}")
    place = Path(os.path.realpath(folder))
    standing = next(each for each in (place, *place.parents) if os.path.lexists(each))
    if not os.path.isdir(standing) or (os.path.lexists(folder) and not os.path.isdir(folder)):
        raise InputError(f"{name} is a file; give a folder")
    check_apart(folder, name, inputs, folder=True)
    if standing != place:
        return
    entries = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]  # .gitkeep: no name of a run's
    if not _is_run(place) and (others := sorted(e.name for e in entries if e.name != LOCK or e.stat().st_size)):
        what = f"{name} is no run's folder and holds {', '.join(others[:3])}"
        new = next(path for number in itertools.count(1) if not os.path.lexists(path := place / f"run{number}"))
        raise InputError(f"{what}: give an empty or a new one, such as {new}")
    if any(entry.name == "checkpoints" and entry.is_dir(follow_symlinks=False) for entry in entries):
        entries += os.scandir(place / "checkpoints")
    for entry in entries:
        file = _FILES.fullmatch(entry.name) and not entry.is_file(follow_symlinks=False)
        if file or (entry.name in _FOLDERS and not entry.is_dir(follow_symlinks=False)):
            kind = "file" if file else "folder"
            raise InputError(f"{entry.path} is a link or no {kind}, and a run writes there: remove it")
    steps = sorted(place.glob("checkpoints/step-*"))
    if steps and resume is None:
        raise InputError(
            f'{folder} already holds a run ({steps[-1].name}); go on with resume="auto", or choose another out'
        )
    if not steps and (kept := [each for result in _RESULTS if (each := place / result).exists()]):
        raise InputError(f"{folder} holds {kept[0].name} of a run, and no checkpoint to go on from: choose another out")


def _is_run(folder: Path) -> bool:
    """Whether a run made the folder: its lock or its settings say so."""
    for name, mark in _MARKS.items():
        with contextlib.suppress(OSError):  # there is none, or it is a link or a folder
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                if mark.search(file.read(1 << 16).decode(errors="replace")):
                    return True
    return False


def _lock(descriptor: int, what: str, holder: str) -> bool:
    """Whether the file could be locked; EnvironmentProblem where another process has it."""
    import fcntl  # not on Windows; `import fourbit` must not need it

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EnvironmentProblem(
            f"{what} is in use by {holder}. Two runs in one place would overwrite each other: wait for that one to "
            "end, stop it, or choose another out."
        ) from None
    except OSError:
        return False
    return True


def _tried(folder: Path) -> list[str]:
    """Do in the folder what a run does there. A sentence for what it can do without; else the error says what to do."""
    probe, moved = folder / temporary_name("probe"), folder / temporary_name("probe")
    try:
        os.mkdir(probe)
        for name in ("new", "old"):
            (probe / name).write_bytes(b"fourbit")
        forced = [sync(probe / "new"), sync(probe)]
        os.replace(probe / "new", probe / "old")
        os.rename(probe, moved)
        remove_flat(moved)
    except OSError as error:
        for left in (probe, moved):
            with contextlib.suppress(OSError):
                remove_flat(left)
        kind = DiskError if error.errno in (errno.ENOSPC, errno.EDQUOT) else EnvironmentProblem
        what = "a run makes, replaces and renames files and folders in its output folder, and cannot"
        raise kind(f"{what} in {folder}: {error.strerror}. Choose another out") from error
    return [] if all(forced) else [f"{folder} cannot force its files to the disk: a loss of power may cost checkpoints"]


def check_free(folder: Path, needed: int) -> None:
    """DiskError where a run's folder has fewer bytes free than its first checkpoint and its result need."""
    if (free := shutil.disk_usage(folder).free) < needed:
        what = f"a checkpoint and the result need {needed:,} bytes in {folder} and {free:,} are free"
        raise DiskError(f"{what}: free some space, or choose another out")
