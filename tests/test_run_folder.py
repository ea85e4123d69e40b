"""The folder of a run: never one that is read or another's, no link in it followed, tried before the first step."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourbit
from fourbit.errors import DiskError, InputError
from fourbit.files import temporary_name, write_text
from fourbit.lora.peft_files import adapter_state
from fourbit.models.save import save_model
from fourbit.outputs import LOCK, lock_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with a checkpoint."""
    with lock_folder(tmp_path / "run"):
        pass
    for name in ("checkpoints/step-000001/state.json", "config.yaml", "metrics.jsonl", "adapter_model.safetensors"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def held(folder: Any, inputs: Any = (), resume: str | None = "auto") -> list[str]:
    with lock_folder(folder, inputs, resume) as notices:
        return notices


@pytest.mark.parametrize("name", ["m", "m/new/run", "n", "n/run", "x/../m"])
def test_a_folder_that_is_read_or_lies_in_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "n").symlink_to("m")
    with pytest.raises(InputError, match="is read"):
        held(tmp_path / name, [tmp_path / "d.jsonl", tmp_path / "m"])
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize(
    "name", ["precious.txt", "config.yaml", "metrics.jsonl", "checkpoints/latest", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_of_another_is_left_alone(tmp_path: Path, name: str, resume: str | None) -> None:
    (tmp_path / "o" / name).parent.mkdir(parents=True)
    (tmp_path / "o" / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is no run's folder and holds"):
        held(tmp_path / "o", resume=resume)
    assert contents(tmp_path) == before


def test_new_empty_and_own_folders_are_taken(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "empty" / ".gitkeep").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / LOCK).touch()  # killed before it wrote its name
    (tmp_path / "killed" / temporary_name("probe")).mkdir()
    (run / "notes.txt").write_text("what I thought of it")  # in a folder of a run everything else is left alone
    (run / "base").symlink_to(tmp_path)
    copied = shutil.copytree(run, tmp_path / "copied", symlinks=True)
    for folder in (copied, tmp_path / "new" / "er", tmp_path / "empty", tmp_path / "link", tmp_path / "killed", run):
        assert held(folder) == [] and held(folder) == []
    assert (run / "notes.txt").read_text() == "what I thought of it"
    assert sorted(p.name for p in (tmp_path / "new" / "er").iterdir()) == [LOCK]


def test_a_result_is_not_replaced_by_another_run(run: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run .step-000001.; go on with resume=.auto., or choose"):
        held(run, resume=None)
    held(run)
    (run / "checkpoints").rename(run.parent / "elsewhere")
    for resume in (None, "auto"):
        with pytest.raises(InputError, match=r"holds adapter_model\.safetensors of a run, and no checkpoint to go on"):
            held(run, resume=resume)


@pytest.mark.parametrize("name", ["", "a\0b", "\udcff", "file", "file/below", "loop", "dangling", "pipe"])
def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("no/where")
    os.mkfifo("pipe")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"^out "):
        held(name)
    assert contents(tmp_path) == before


# What a file system cannot do.


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **more: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_without_fsync_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    write_text(tmp_path / "x", "whole")
    assert (tmp_path / "x").read_text() == "whole"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_it_runs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    (notice,) = held(tmp_path / "o")
    assert "cannot be locked: start no second run in it" in notice


def test_room_is_counted_before_the_first_step(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = fourbit.load(tiny_folder, quant_type=None)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    config = fourbit.SFTConfig(out=str(tmp_path), steps=1)
    trainer, weights = fourbit.SFTTrainer(model, tokenizer, train=rows, config=config), adapter_state(model).values()
    needed = 4 * sum(tensor.nbytes for tensor in weights)  # in the checkpoint with two moments, and in the result
    for free in (needed - 1, 10 * needed):
        usage = shutil._ntuple_diskusage(free, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if free >= needed:
            assert trainer.train(display=None).steps == 1
            continue
        with pytest.raises(DiskError, match=rf"need [\d,]+ bytes in .* and {free:,} are free: free some space"):
            trainer.train(display=None)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    written = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert needed < sum(written) < needed + 24_000  # names, padding and the state of random numbers


def test_names_of_a_run_differ_in_more_than_case(run: Path) -> None:
    """On a file system that does not tell A from a, no file of a run takes another's place."""
    names = [str(path.relative_to(run)).lower() for path in run.rglob("*")]
    assert len(set(names)) == len(names)


# The library.


def test_whole_writes_follow_no_link_and_take_no_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to("victim")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(InputError, match="is a link, a pipe, a device or a folder"):
            write_text(tmp_path / name, "new")
    monkeypatch.setattr("fourbit.files.temporary_name", lambda label: "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_nothing_is_saved_into_the_models_folder(tiny_folder: Path, rows: Path, tmp_path: Path, inner: str) -> None:
    model, tokenizer = fourbit.load(tiny_folder, quant_type=None)
    before = contents(tiny_folder)
    with pytest.raises(InputError, match="is read"):
        save_model(model, tiny_folder / inner, tokenizer)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    with pytest.raises(InputError, match="is read"):
        fourbit.save_adapter(model, tiny_folder / inner)
    config = fourbit.SFTConfig(out=str(tiny_folder / inner), steps=1)
    with pytest.raises(InputError, match="is read"):
        fourbit.SFTTrainer(model, tokenizer, train=rows, config=config).train(display=None)
    assert contents(tiny_folder) == before


def test_a_trainer_writes_beside_no_data(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(rows.read_bytes())
    model, tokenizer = fourbit.load(tiny_folder, quant_type=None)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    config = fourbit.SFTConfig(out=str(tmp_path), steps=1)
    with pytest.raises(InputError, match=r"is no run's folder and holds d\.jsonl"):
        fourbit.SFTTrainer(model, tokenizer, train=tmp_path / "d.jsonl", config=config).train(display=None)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
