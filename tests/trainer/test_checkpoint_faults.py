"""Every file operation of a save fails once, or is the last one of the process: a good checkpoint always loads.

`FaultyDisk` stands between the module and `os`, and before its three ways to write a file. It trips the n-th operation,
for every n: the disk is full (ENOSPC, EDQUOT), it fails (EIO), the process dies there, or the machine does. In the last
case it also takes away what was not yet forced to the disk, in the worst way: files without fsync lose their second
half, new names and renames in folders without fsync are undone (all, or only the oldest one), while removals stay. So a
missing or misplaced fsync is caught, and not only a wrong order.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.errors import DiskError
from fourbit.trainer import checkpoint
from fourbit.trainer.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

FAULTS = {
    "full": errno.ENOSPC,
    "quota": errno.EDQUOT,
    "broken": errno.EIO,
    "killed": None,
    "power": None,
    "reordered": None,
}
GROWS = {"write", "mkdir", "rename", "replace"}  # what a full disk can refuse


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine dies in these tests, so the real fsync would only cost time; the shim keeps the books on it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """The process is dead: nothing after this point runs, cleaning up included."""


class FaultyDisk:
    """`os` with the n-th file operation tripped; `power_cut` then undoes what was not synced."""

    def __init__(self, patch: pytest.MonkeyPatch, fault: str, trip: int) -> None:
        self.fault, self.trip, self.count, self.dead = fault, trip, 0, False
        self.real = {
            name: getattr(os, name)
            for name in ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "close")
        }
        self.opened: dict[int, Path] = {}
        self.torn: set[Path] = set()  # files written since their last fsync
        self.made: list[Path] = []  # names new since their folder's last fsync
        self.moved: list[tuple[Path, Path, bytes | None]] = []  # renames since then, and the file each replaced
        for name in self.real:
            patch.setattr(os, name, getattr(self, name))
        plain = {name: getattr(Path, name) for name in ("write_bytes", "write_text")}
        for name, real in plain.items():
            patch.setattr(Path, name, lambda path, data, real=real, **more: self.write(path, real, path, data, **more))
        serialise = checkpoint.save_file
        patch.setattr(checkpoint, "save_file", lambda tensors, path: self.write(path, serialise, tensors, path))

    def tick(self, name: str) -> None:
        if self.dead:
            raise Killed
        self.count += 1
        code = FAULTS[self.fault]
        if self.count != self.trip or (self.fault in ("full", "quota") and name not in GROWS):
            return
        if code is not None:
            raise OSError(code, os.strerror(code))
        self.dead = True
        raise Killed

    def open(self, path: Any, flags: int, mode: int = 0o777, **kwargs: Any) -> int:
        self.tick("open")
        descriptor = self.real["open"](path, flags, mode, **kwargs)
        self.opened[descriptor] = Path(path)
        return int(descriptor)

    def write(self, path: Path, real: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A whole file, by any of the ways there are; a part of it lands when it is tripped."""
        was_dead = self.dead
        try:
            self.tick("write")
        except (OSError, Killed):
            if not was_dead:
                real(*args, **kwargs)
                self.made.append(path)
                self.torn.add(path)
                os.truncate(path, path.stat().st_size // 2)
            raise
        real(*args, **kwargs)
        self.made.append(path)
        self.torn.add(path)

    def fsync(self, descriptor: int) -> None:
        self.tick("fsync")
        path = self.opened[descriptor]
        self.torn.discard(path)
        self.made = [name for name in self.made if name.parent != path]
        for old, new, _ in (move for move in self.moved if move[1].parent == path):
            self.made = [_moved(name, old, new) for name in self.made]
        self.moved = [move for move in self.moved if move[1].parent != path]

    def close(self, descriptor: int) -> None:
        self.opened.pop(descriptor, None)
        self.real["close"](descriptor)

    def mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self.tick("mkdir")
        self.real["mkdir"](path, *args, **kwargs)
        self.made.append(Path(path))

    def rename(self, old: Any, new: Any) -> None:
        self._move("rename", Path(old), Path(new))

    def replace(self, old: Any, new: Any) -> None:
        self._move("replace", Path(old), Path(new))

    def _move(self, name: str, old: Path, new: Path) -> None:
        self.tick(name)
        self.moved.append((old, new, new.read_bytes() if new.is_file() else None))
        self.real[name](old, new)
        self.torn = {_moved(path, old, new) for path in self.torn}

    def unlink(self, path: Any, **kwargs: Any) -> None:
        self.tick("unlink")
        self.real["unlink"](path, **kwargs)

    def rmdir(self, path: Any, **kwargs: Any) -> None:
        self.tick("rmdir")
        self.real["rmdir"](path, **kwargs)

    def power_cut(self) -> None:
        """The worst that the disk may hold after the machine stopped here."""
        for path in self.torn:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        undone = self.moved[:1] if self.fault == "reordered" else self.moved
        for old, new, replaced in reversed(undone):
            if old.exists():  # the name was given again since, and a disk keeps such renames in order
                continue
            new.rename(old)
            if replaced is not None:
                new.write_bytes(replaced)
        for old, new, _ in self.moved[len(undone) :]:
            self.made = [_moved(path, old, new) for path in self.made]
        for path in reversed(self.made):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file():
                path.unlink()


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def content(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    return {"adapter": {"x": torch.full((50,), float(step))}, "rng": {"s": torch.tensor([step])}}, {"step": step}


def save(folder: Path, step: int, keep: int) -> Path:
    return save_checkpoint(folder, step, *content(step), keep=keep)


def loaded_step(folder: Path) -> int:
    """The step that a resume would start from, its tensors checked."""
    path, _ = newest_checkpoint(folder)
    assert path is not None, "no checkpoint loads any more"
    tensors, state = load_checkpoint(path)
    expected, _ = content(state["step"])
    assert all(
        torch.equal(tensors[group][name], value) for group in expected for name, value in expected[group].items()
    )
    return int(state["step"])


def trip_every_operation(
    tmp_path: Path, fault: str, setup: Callable[[Path], None], step: int, keep: int, good: set[int]
) -> int:
    """Save `step` with each operation tripped in turn; returns their number. `good`: other steps that may load."""
    setup(tmp_path / "before")
    for trip in range(1, 200):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(trip))
        with pytest.MonkeyPatch.context() as patch:
            faulty = FaultyDisk(patch, fault, trip)
            outcome: BaseException | None = None
            try:
                save(folder, step, keep)
            except (DiskError, Killed) as error:
                outcome = error
        if fault in ("power", "reordered") and outcome:
            faulty.power_cut()
        latest = (folder / "latest").read_text().strip()
        if step not in good:  # else its folder may have stepped aside
            checkpoint.verify_checkpoint(folder / latest)
        check_after(folder, fault, outcome, step, keep, good)
        if faulty.count < trip:
            return trip - 1
    raise AssertionError("a save has no 200 operations")


def check_after(folder: Path, fault: str, outcome: BaseException | None, step: int, keep: int, good: set[int]) -> None:
    resumed = loaded_step(folder)
    assert resumed == step if outcome is None else resumed in good | {step}
    if isinstance(outcome, DiskError):
        assert f"step {step}" in str(outcome) and " bytes" in str(outcome) and outcome.exit_code == 5
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".tmp")]
    if fault in ("full", "quota"):  # removing works on a full disk, so nothing may stay
        assert leftovers == []
    save(folder, step + 2, keep)  # the run goes on as if nothing had been
    assert loaded_step(folder) == step + 2
    if fault not in ("power", "reordered"):  # there a half-removed folder may come back under its old name
        for path in folder.glob("step-*"):
            checkpoint.verify_checkpoint(path)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("keep", [1, 2])
def test_the_next_checkpoint(tmp_path: Path, fault: str, keep: int) -> None:
    def setup(folder: Path) -> None:
        for step in (2, 4):
            save(folder, step, keep)

    operations = trip_every_operation(tmp_path, fault, setup, 6, keep, good={4})
    assert operations > 25  # else the shim watches the wrong calls


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_step_again_on_another_branch(tmp_path: Path, fault: str) -> None:
    """The folder's name is taken: the old one must step aside and still load."""

    def setup(folder: Path) -> None:
        save(folder, 6, 1)

    trip_every_operation(tmp_path, fault, setup, 6, 1, good={6})


@pytest.mark.parametrize("fault", ["killed", "power", "reordered"])
def test_death_in_two_saves_in_a_row(tmp_path: Path, fault: str) -> None:
    """The second run dies while it clears away what the first left."""

    def setup(folder: Path) -> None:
        save(folder, 2, 1)
        with pytest.MonkeyPatch.context() as patch:
            faulty = FaultyDisk(patch, fault, 12)  # while it writes the files
            with pytest.raises(Killed):
                save(folder, 4, 1)
        if fault != "killed":
            faulty.power_cut()

    trip_every_operation(tmp_path, fault, setup, 6, 1, good={2, 4})
