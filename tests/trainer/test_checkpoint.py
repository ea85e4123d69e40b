"""What a training checkpoint promises: it reads back bit for bit, or it is refused with a reason."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourbit import files
from fourbit.errors import DiskError, EnvironmentProblem, InputError, NumericError
from fourbit.outputs import lock_folder
from fourbit.trainer import checkpoint
from fourbit.trainer.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]
OPENED: list[str] | None = None  # paths opened while a list is here


@pytest.fixture(autouse=True, scope="module")
def quick_fsync() -> Iterator[None]:
    """No machine dies in these tests; test_checkpoint_faults.py is about what must be synced before what."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def sample(seed: int = 0) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    adapter = {"b.lora_B": torch.randn(3, 5, generator=generator), "a.lora_A": torch.randn(5, 7, generator=generator)}
    moments = {f"{kind}.{name}": value.square() for name, value in adapter.items() for kind in ("first", "second")}
    state = {"step": seed, "losses": [0.1, 1 / 3, 1e-300], "cursor": {"epoch": 1}, "note": "é\u2028", "best": None}
    return {"adapter": adapter, "optimizer": moments, "rng": {"torch": generator.get_state()}}, state


def assert_loads(path: Path | None, expected: tuple[dict[str, dict[str, Tensor]], dict[str, Any]]) -> None:
    assert path is not None
    tensors, state = load_checkpoint(path)
    assert {g: {n: bits(t) for n, t in members.items()} for g, members in tensors.items()} == {
        g: {n: bits(t) for n, t in members.items()} for g, members in expected[0].items()
    }
    assert state == expected[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_every_dtype_and_shape_reads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[torch.dtype], shape: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    members = {
        f"{i}.{dtype}": (torch.randn(shape, generator=generator) * 50).to(dtype) for i, dtype in enumerate(dtypes)
    }
    folder = tmp_path_factory.mktemp("c")
    path = save_checkpoint(folder, 7, {"any": members}, {})
    assert_loads(path, ({"any": members}, {}))
    other = safetensors.torch.load((path / "any.safetensors").read_bytes())  # a strict reader that is not ours
    assert {name: bits(value) for name, value in other.items()} == {
        name: bits(value) for name, value in members.items()
    }


def test_views_scalars_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    members = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": base[:1].expand(3, 6),
        "shared": base,
        "scalar": torch.tensor(3, dtype=torch.uint8),
        "negative zero": torch.tensor([-0.0]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
    }
    assert_loads(
        save_checkpoint(tmp_path, 0, {"adapter": members, "none": {}}, {}), ({"adapter": members, "none": {}}, {})
    )


def test_tensors_do_not_depend_on_the_files_any_more(tmp_path: Path) -> None:
    expected, _ = sample()
    path = save_checkpoint(tmp_path, 1, *sample())
    loaded, _ = load_checkpoint(path)
    for file in path.glob("*.safetensors"):
        os.truncate(file, 0)  # a view of the mapped file would crash or change
    assert bits(loaded["adapter"]["a.lora_A"]) == bits(expected["adapter"]["a.lora_A"])


def test_equal_inputs_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors, state = sample()
    turned = {g: dict(reversed(members.items())) for g, members in reversed(tensors.items())}
    one = save_checkpoint(tmp_path / "one", 5, tensors, state)
    two = save_checkpoint(tmp_path / "two", 5, turned, dict(reversed(state.items())))
    assert contents(one) == contents(two)
    assert sorted(contents(one)) == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]


def test_one_changed_byte_anywhere_is_found_and_the_previous_one_is_used(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, 2, *sample(2))
    newer = save_checkpoint(tmp_path, 4, *sample(4))
    dice = random.Random(0)
    places = [(file, at) for file, data in contents(newer).items() for at in range(len(data))]
    for name, at in dice.sample(places, 200):
        file, whole = newer / name, (newer / name).read_bytes()
        torn = bytearray(whole)
        torn[at] ^= 1 << dice.randrange(8)
        file.write_bytes(torn)
        found, reasons = newest_checkpoint(tmp_path)
        assert found == older and name in reasons[0] and str(newer) in reasons[0]
        with pytest.raises(InputError, match="torn"):
            load_checkpoint(newer)
        file.write_bytes(whole)
    assert_loads(newest_checkpoint(tmp_path)[0], sample(4))


def test_a_cut_or_grown_or_missing_file_is_found(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, 2, *sample(2))
    newer = save_checkpoint(tmp_path, 4, *sample(4))
    for name, data in contents(newer).items():
        for cut in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", None):
            if cut is None:
                (newer / name).unlink()
            else:
                (newer / name).write_bytes(cut)
            found, reasons = newest_checkpoint(tmp_path)
            assert found == older and len(reasons) == 1 and name in reasons[0]
            (newer / name).write_bytes(data)
    assert newest_checkpoint(tmp_path) == (newer, [])


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "step-000009").mkdir()
    found, reasons = newest_checkpoint(tmp_path)
    assert found is None and "manifest.json" in reasons[0]


def test_a_whole_checkpoint_of_another_format_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", "fourbit checkpoint 1")
        path = save_checkpoint(tmp_path / "checkpoints", 2, *sample())
    with pytest.raises(InputError, match="of format 'fourbit checkpoint 1', written by another version") as error:
        load_checkpoint(path)
    assert "torn" not in str(error.value)
    for resume in (None, "auto"):
        with pytest.raises(InputError, match="written by another version"):
            checkpoint.checkpoint_to_resume(tmp_path, resume, [])


def test_a_checkpoint_that_stepped_aside_can_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (4, 4):
        save_checkpoint(folder, step, *sample())
    assert checkpoint.checkpoint_to_resume(tmp_path, str(folder / "step-000004.1"), []) == folder / "step-000004.1"
    for other in (folder, folder / "step-000005", tmp_path):
        with pytest.raises(InputError, match="resume must be auto or a checkpoint folder"):
            checkpoint.checkpoint_to_resume(tmp_path, str(other), [])


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_in_the_folder_is_never_opened(tmp_path: Path) -> None:
    global OPENED
    path, canary = save_checkpoint(tmp_path, 1, *sample()), tmp_path / "canary"
    bombs = ["rng_state.pth", "optimizer.pt", "scheduler.pt", "adapter.bin", "training_args.bin"]
    for name in bombs:
        torch.save(Bomb(canary), path / name)
    sys.addaudithook(_record)
    OPENED = []
    try:
        assert newest_checkpoint(tmp_path) == (path, [])
        assert_loads(path, sample())
        save_checkpoint(tmp_path, 2, *sample(), keep=1)
        opened = OPENED
    finally:
        OPENED = None
    assert any("state.json" in name for name in opened)
    assert not any(bomb in name for name in opened for bomb in bombs)
    assert not canary.exists() and all((path / name).exists() for name in bombs)


@pytest.mark.parametrize(
    "name",
    [
        "rng_state.pth",
        "../state.json",
        "/etc/passwd",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "x.safetensors\n",
        "x\0.safetensors",
        "",
        "manifest.json",
        "Adapter.safetensors",
        "\ud800.safetensors",
    ],
)
def test_a_manifest_that_names_other_files_is_refused(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, 1, *sample())
    _, listed = checkpoint._read_manifest(path)
    listed |= {name: listed["state.json"]}
    (path / "manifest.json").write_bytes(checkpoint._dump_manifest(checkpoint.FORMAT, 1, 1, listed))
    with pytest.raises(InputError, match="may name only") as caught:
        load_checkpoint(path)
    str(caught.value).encode()  # printable


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", "[" * 20_000, '{"files": {"state.json": {"bytes": Infinity}}}', '{"files": 3}', "\xff"],
)
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = save_checkpoint(tmp_path, 1, *sample())
    (path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"manifest\.json"):
        load_checkpoint(path)


def test_links_pipes_and_huge_manifests_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run", 1, *sample())
    for name in ("state.json", "adapter.safetensors", "manifest.json"):
        kept = (path / name).rename(tmp_path / name)
        (path / name).symlink_to(kept)
        with pytest.raises(InputError, match=r"regular file|link out of its folder"):
            load_checkpoint(path)
        (path / name).unlink()
        os.mkfifo(path / name)  # opening it would wait for ever
        with pytest.raises(InputError, match=r"regular file|link out of its folder"):
            load_checkpoint(path)
        (path / name).unlink()
        kept.rename(path / name)
    assert_loads(path, sample())
    (path / "manifest.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(InputError, match="must be at most 1,048,576 bytes"):
        load_checkpoint(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_tensors_are_refused_by_name(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    good = save_checkpoint(tmp_path, 1, *sample(1))
    tensors, state = sample(2)
    tensors["optimizer"]["layers.3.second"] = torch.tensor([1.0, bad]).to(dtype)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NumericError, match=r"optimizer/layers\.3\.second"):
        save_checkpoint(tmp_path, 2, tensors, state)
    assert sorted(tmp_path.iterdir()) == before and newest_checkpoint(tmp_path) == (good, [])


@pytest.mark.parametrize(
    ("tensors", "state"),
    [
        ({}, {"best": float("nan")}),
        ({}, {"x": torch.ones(1)}),
        ({"a": {"x": torch.ones(2).to_sparse()}}, {}),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, tensors: Any, state: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        save_checkpoint(tmp_path, 1, tensors, state)
    assert list(tmp_path.iterdir()) == []


def test_impossible_step_and_keep(tmp_path: Path) -> None:
    for step, keep in ((-1, 2), (1, 0)):
        with pytest.raises(ValueError, match="step must be 0 or more and keep 1 or more"):
            save_checkpoint(tmp_path, step, {}, {}, keep=keep)


def test_prune_keeps_the_newest_and_everything_unknown(tmp_path: Path) -> None:
    strangers = [tmp_path / "notes", tmp_path / "step-1", tmp_path / "step-000001.bak", tmp_path / "step-000000"]
    for stranger in strangers:
        stranger.mkdir()
        (stranger / "precious.txt").write_text("mine")
    touched = save_checkpoint(tmp_path, 4, *sample(4), keep=2)
    (touched / "precious.txt").write_text("mine")
    for step in (6, 8, 10):
        save_checkpoint(tmp_path, step, *sample(step), keep=2)
    kept = {p.name for p in tmp_path.iterdir() if p.name.startswith("step-")}
    assert kept == {"step-000000", "step-1", "step-000001.bak", "step-000004", "step-000008", "step-000010"}
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert all((stranger / "precious.txt").read_text() == "mine" for stranger in [*strangers, touched])
    for path, step in ((touched, 4), (tmp_path / "step-000008", 8)):
        assert_loads(path, sample(step))


def test_a_branch_from_an_older_step_is_the_newest(tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, step, *sample(step), keep=9)
    save_checkpoint(tmp_path, 3, *sample(30), keep=9)  # resumed from step 2: older by step, newer by serial
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-000003"
    again = save_checkpoint(tmp_path, 4, *sample(40), keep=9)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-000004", [])
    assert_loads(again, sample(40))
    assert_loads(tmp_path / "step-000004.1", sample(4))
    shutil.rmtree(again)
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-000003"
    save_checkpoint(tmp_path, 5, *sample(5), keep=1)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-000005"]


def test_leftovers_of_dead_runs_are_removed_and_all_else_is_kept(tmp_path: Path) -> None:
    """The folder is locked for this run, so what has such a name is a dead one's."""
    dead = [files.temporary_name(label) for label in ("000003", "old")]
    names = dict.fromkeys(dead, False) | dict.fromkeys([".fourbit-mine", dead[0] + "x", ".tmp-000003-0123abcd"], True)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    nested = tmp_path / files.temporary_name("000005")
    (nested / "folder").mkdir(parents=True)  # not ours whatever its name says: left, and no reason to fail
    save_checkpoint(tmp_path, 4, *sample(4))
    assert {name: (tmp_path / name).exists() for name in names} == names and nested.exists()


def test_a_real_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, 1, *sample(1))
    before = sorted(tmp_path.iterdir())
    tensors = {"adapter": {"x": torch.zeros(1_000_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the kernel refuses the second megabyte
    try:
        with pytest.raises(DiskError, match=r"step 2.*It needs 4,000,\d\d\d bytes") as caught:
            save_checkpoint(tmp_path, 2, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 5 and os.strerror(errno.EFBIG) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before and newest_checkpoint(tmp_path) == (good, [])


def test_the_bytes_named_are_the_bytes_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, 1, *sample())
    written = sum(len(data) for data in contents(path).values())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskError, match="No space left") as caught:
        save_checkpoint(tmp_path, 2, *sample())
    needed = int(str(caught.value).split("It needs ")[1].split(" bytes")[0].replace(",", ""))
    assert written <= needed <= written + 1200  # headers and the manifest are reckoned


def test_a_second_run_is_refused_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"):
        with (
            pytest.raises(EnvironmentProblem, match=f"in use by process {os.getpid()} on"),
            lock_folder(tmp_path / "out"),
        ):
            pass
        with lock_folder(tmp_path / "other"):
            pass
    program = (
        "import sys, time\nfrom fourbit.outputs import lock_folder\n"
        "with lock_folder(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", program, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with (
            pytest.raises(EnvironmentProblem, match=f"in use by process {child.pid} "),
            lock_folder(tmp_path / "out"),
        ):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with lock_folder(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / "run.lock").read_text()


def test_a_lock_that_is_a_link_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out" / "run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(EnvironmentProblem, match="symbolic links; choose another"), lock_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    with pytest.raises(InputError, match="is no folder"), lock_folder(tmp_path / "victim" / "out"):
        pass


def test_the_manifest_holds_no_clock_and_no_machine(tmp_path: Path) -> None:
    body = json.loads((save_checkpoint(tmp_path, 1, *sample()) / "manifest.json").read_text())
    assert sorted(body) == ["files", "format", "serial", "sha256", "step"]
    assert all(sorted(entry) == ["bytes", "sha256"] for entry in body["files"].values())
