"""Where a command may write: an output is compared with everything that is read before anything is opened.

What is read is never written: two paths are one when device and inode say so, links followed. What is there already is
kept: a file is replaced only where the user says so, a folder written into only where it is empty or a run's own. What
was finished is kept: rows are written as they come, and a command may go on after them. A link to a file is followed; a
pipe, a device or standard output (`-`) is written into.
"""

import contextlib
import json
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

from .errors import DiskError, EnvironmentProblem, InputError
from .files import disk_errors, remove_stale

LOCK = "run.lock"
StrPath = str | os.PathLike[str]
_RESULTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


class Output:
    """A file of rows, one a line, each of which is there once it is written.

        with Output(path, inputs=paths, overwrite=options.overwrite, resume=options.resume) as out:
            model = ...                        # what `out` refuses, it has refused before the model is read
            for row in rows[len(out.rows) :]:  # out.rows: those that stand there already, where `resume` goes on
                out.write(json.dumps(answer(row)))

    path: followed where it is a link; `-` is standard output. name: what errors call the option. inputs: every file and
    folder that the command reads. A file that is replaced stays as it was until the first row. Leaving the block by an
    exception adds a note to it that says which rows are kept, and how to go on where the command `resumes`. A pipe or a
    device gets rows and stays what it is; `stdout` says that nothing else should go there, `regular` that it is a file.

    Raises InputError for a place that is read, is taken (unless overwrite or resume, of which one may be given, and for
    a file) or cannot be written;
    EnvironmentProblem where another command writes; DiskError when the disk refuses."""

    def __init__(
        self,
        path: StrPath,
        *,
        name: str = "out",
        inputs: Iterable[StrPath] = (),
        overwrite: bool = False,
        resume: bool = False,
        resumes: bool = True,
    ) -> None:
        self.resumes = resumes
        self.path, self.name, self.rows, self.written = Path(path), name, list[dict[str, Any]](), 0
        there, out = None if os.fspath(path) == "-" else _stat(path), _stat(1)
        if "\0" in os.fspath(path):
            raise InputError(f"{name} {path} must be the name of a file")
        # Rows to go on after may stand in a folder that is read: they are looked at.
        check_apart(path, f"{name} {path}", [read for read in inputs if not (resume and os.path.isdir(read))])
        self.stdout = os.fspath(path) == "-" or bool(there and out and os.path.samestat(there, out))
        self.regular, self._new, self._kept = False, there is None, 0
        if overwrite and resume:
            raise InputError("overwrite=True begins anew and resume=True goes on: give one of them")
        if self.stdout and (overwrite or resume):
            given = "overwrite=True" if overwrite else "resume=True"
            raise InputError(f"{name} is standard output, which keeps no rows: leave out {given}, or name a file")
        if self.stdout:
            if sys.stdout is None:
                raise InputError(f"{name} is standard output, which is closed")
            self._file: BinaryIO = sys.stdout.buffer
            return
        if there and stat.S_ISREG(there.st_mode) and not (overwrite or resume):
            way = "overwrite=True replaces it, resume=True goes on after its rows, or give another name"
            raise InputError(f"{name} {path} is there already: {way}")
        try:
            self._file = open(path, "ab")  # noqa: SIM115  (closed where the block is left)
        except OSError as error:
            raise InputError(f"{name} {path} must be a file in a folder that exists: {error.strerror}") from None
        self.regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        try:
            if self.regular:
                _lock(self._file.fileno(), str(path), "another command")
                self._take_over(resume)
        except BaseException:
            self._file.close()
            raise

    def _take_over(self, resume: bool) -> None:
        """The rows to go on after; a last one that was cut off is none."""
        *lines, torn = self.path.read_bytes().split(b"\n") if resume else [b""]
        try:
            self.rows = [dict(json.loads(line)) for line in lines]
            if torn and not lines:
                raise ValueError("no whole row")
        except (ValueError, TypeError, RecursionError):
            self.refuse_rows()
        self._kept = sum(len(line) + 1 for line in lines)

    def check(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        """InputError unless each row that stands there says what `wanted` has in its place."""
        both = zip(self.rows, wanted, strict=False)
        if len(self.rows) > len(wanted) or any({**row, **own} != row for row, own in both):
            self.refuse_rows()

    def refuse_rows(self) -> NoReturn:
        """The InputError for rows that this command has not written."""
        what = f"{self.name} {self.path} holds other rows than those of this command"
        raise InputError(f"{what}: overwrite=True replaces it, or give another name")

    def write(self, line: str) -> None:
        """Add a row: text without a line break."""
        raw = line.encode("utf-8", "surrogatepass") + b"\n"
        with contextlib.nullcontext() if self.stdout else disk_errors("rows", self.path.parent, len(raw)):
            self._begin()
            self._file.write(raw)
            self._file.flush()
        self.written += 1

    def _begin(self) -> None:
        if self.regular and not self.written:
            self._file.truncate(self._kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.stdout:
            return
        if error is None:
            self._begin()
        elif self.regular and self.written:
            done = len(self.rows) + self.written
            kept = f"{self.path} keeps {done:,} finished rows"
            error.add_note(f"{kept}; the same command with resume=True goes on" if self.resumes else kept)
        elif self.regular and self._new:
            os.unlink(self.path)
        with contextlib.suppress(OSError):  # every row is flushed: what fails here was told
            self._file.close()  # and with it the lock


def _stat(path: StrPath | int) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


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
def new_place(path: StrPath, what: str, inputs: Iterable[StrPath], *, folder: bool) -> Iterator[None]:
    """A file or folder that is not there before, but an empty folder, or InputError; a folder nor after an error."""
    check_apart(path, what, inputs, folder=folder)
    if os.path.lexists(path) and not (folder and os.path.isdir(path) and not os.listdir(path)):
        raise InputError(f"{what} is there already: give another place")
    try:
        yield
    except BaseException:
        if folder:
            shutil.rmtree(path, ignore_errors=True)
        raise


@contextlib.contextmanager
def lock_folder(folder: StrPath, inputs: Iterable[StrPath] = (), resume: str | None = None) -> Iterator[list[str]]:
    """Hold the output folder of a run, made if need be; a second run in it is refused with `EnvironmentProblem`.

    inputs: what the run reads. resume: as in its settings. Yields notices: a sentence where files cannot be locked.
    Raises InputError for a folder that is read, is no run's, or holds a run that this one does not go on from;
    EnvironmentProblem where no run can be written; DiskError when the disk refuses.
    The operating system drops the lock with the process, however that ends, so a lock never goes stale; the file that
    stays behind names the last holder and marks the folder as a run's. (A forked child shares the lock and keeps it as
    long as it lives.)"""
    where = f"the output folder {folder}"
    _check_folder(folder, inputs, resume)
    try:
        os.makedirs(folder, exist_ok=True)
        how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(Path(folder) / LOCK, how, 0o644)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"out {folder} is no folder: {error.strerror}; give another out") from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to {where}: {error.strerror}; choose another out") from error
    try:
        holder = os.pread(descriptor, 400, 0).decode(errors="replace").removesuffix(" (fourbit)\n")
        locked = _lock(descriptor, where, holder or "another process")
        if locked:
            remove_stale(Path(folder))
        text = f"process {os.getpid()} on {platform.node()} (fourbit)\n".encode()
        with disk_errors("the lock", Path(folder), len(text)):
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        yield [] if locked else [f"files in {where} cannot be locked: start no second run in it"]
    finally:
        os.close(descriptor)


def _check_folder(folder: StrPath, inputs: Iterable[StrPath], resume: str | None) -> None:
    """InputError for a folder that a run must not write into, before anything in it is opened."""
    name, text, place = f"out {folder}", os.fspath(folder), Path(folder)
    if not text or "\0" in text or (not text.isascii() and text != text.encode(errors="replace").decode()):
        raise InputError(f"out must be the name of a folder, in UTF-8, got {text!r}")
    check_apart(folder, name, inputs, folder=True)
    if not place.is_dir():
        return
    names = sorted(entry.name for entry in os.scandir(place) if not entry.name.startswith("."))
    if names and not (place / LOCK).is_file():
        what = f"{name} is no run's folder and holds {', '.join(names[:3])}"
        raise InputError(f"{what}: give an empty or a new one")
    steps = sorted(place.glob("checkpoints/step-*"))
    if steps and resume is None:
        raise InputError(f'{folder} holds a run ({steps[-1].name}); go on with resume="auto", or choose another out')
    if not steps and (kept := [result for result in _RESULTS if result in names]):
        raise InputError(f"{folder} holds {kept[0]} of a run, and no checkpoint to go on from: choose another out")


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


def check_free(folder: Path, needed: int) -> None:
    """DiskError where a run's folder has fewer bytes free than its first checkpoint and its result need."""
    if (free := shutil.disk_usage(folder).free) < needed:
        what = f"a checkpoint and the result need {needed:,} bytes in {folder} and {free:,} are free"
        raise DiskError(f"{what}: free some space, or choose another out")
