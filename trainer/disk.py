"""Durable file operations: what the disk must hold before what, and one run a folder.

A checkpoint survives a crash only if its bytes are on the disk before its name is, and its name before older ones go.
Everything here is plain `os` calls, each of which may fail or be the process's last: nothing buffers behind our back,
so the tests can trip every one of them. An fsync is a promise of the operating system and the drive; we claim to
survive a killed process and a torn file, not every loss of power.
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DiskError, EnvironmentProblem

LOCK = "run.lock"
_SLICE = 16 << 20  # bytes a write call; a signal is handled between two of them
# What a dead run may leave behind. The process number and the host say whose it was.
_TEMPORARY = re.compile(r"\.tmp-[0-9a-z]+-(?P<pid>[1-9][0-9]{0,8})-[0-9a-f]{8}@(?P<host>.+)")


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file, force it to the disk, and return its size in bytes and its SHA-256 in hex.

    The file must not exist yet. Raises OSError as the operating system gives it.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while len(view):
                written = os.write(descriptor, view[:_SLICE])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk (a rename is only safe after this)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder, and say so this way
            raise
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Give a small file new contents in one step: a reader sees the old text or the new, never a part."""
    temporary = path.parent / temporary_name("text")
    try:
        write_file(temporary, [text.encode()])
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def temporary_name(label: str) -> str:
    """A fresh name that `remove_stale` knows again, once this process is dead."""
    return f".tmp-{label}-{os.getpid()}-{secrets.token_hex(4)}@{platform.node()}"


def remove_stale(folder: Path) -> None:
    """Remove what dead processes of this host, or an earlier try of this one, left half-written in `folder`."""
    for entry in sorted(folder.iterdir()):
        found = _TEMPORARY.fullmatch(entry.name)
        if found and found["host"] == platform.node() and not _another_runs(int(found["pid"])):
            with contextlib.suppress(OSError):  # a leftover costs space, not correctness
                remove_flat(entry)


def _another_runs(pid: int) -> bool:
    """Whether `pid` is a live process other than this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and someone else's
    return True


def remove_flat(path: Path) -> None:
    """Remove a file, or a folder that holds only files. A folder inside stops it: we never write one."""
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        os.unlink(entry)
    os.rmdir(path)


@contextlib.contextmanager
def reporting_bytes(what: str, folder: Path, needed: int) -> Iterator[None]:
    """Turn an OSError in the body into a `DiskError` that says how many bytes `what` needs and how many are free."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"could not write {what} in {folder}: {error.strerror or error}. It needs {needed:,} bytes there and "
            f"{_free_bytes(folder)} are free. Checkpoints that were complete are untouched; free some space or make "
            "the folder writable, then continue with --resume."
        ) from error


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


@contextlib.contextmanager
def lock_folder(folder: Path | str) -> Iterator[None]:
    """Hold `folder` for this run; a second run on it is refused with `EnvironmentProblem`.

    The operating system drops the lock with the process, however that ends, so a lock never goes stale; the file that
    stays behind only names the last holder. (A forked child shares the lock and keeps it as long as it lives.)
    """
    import fcntl  # not on Windows; `import fourbit` must not need it

    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to the output folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(_in_use(Path(folder), descriptor)) from None
        except OSError as error:
            raise EnvironmentProblem(f"the file system of {folder} cannot lock files: {error.strerror}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _in_use(folder: Path, descriptor: int) -> str:
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    return (
        f"the output folder {folder} is in use by {holder}. Two runs in one folder would overwrite each other: wait "
        "for that one to end, stop it, or choose another --out."
    )
