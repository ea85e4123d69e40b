"""Outputs: what is read is never written, what is there is kept, what was finished is kept, streams stay streams."""

import errno
import io
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourbit.errors import DiskError, EnvironmentProblem, InputError
from fourbit.outputs import Output
from fourbit.trainer.report import draw_curves

Make = Callable[[Path], object]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in: a model `m` of two files, one of which is a link to a store, and rows `d.jsonl`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "store").write_text("weights")
    (tmp_path / "m" / "model.safetensors").symlink_to("../store")
    (tmp_path / "d.jsonl").write_text("rows")
    return tmp_path


def files(folder: Path) -> dict[str, Any]:
    """Every name below, and what it is."""
    return {
        os.path.relpath(path, folder): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def put(*lines: str, path: str = "o", **more: Any) -> Output:
    with Output(path, **more) as out:
        for line in lines:
            out.write(line)
    return out


def test_rows_are_there_once_written(here: Path) -> None:
    with Output("o") as out:
        out.write("one")
        assert (here / "o").read_text() == "one\n"
        out.write("zwei ü")
    assert (here / "o").read_text() == "one\nzwei ü\n"


def test_what_was_finished_is_kept_and_gone_on_from(here: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, Output("o") as out:
        out.write('{"n": 1}')
        out.write('{"n": 2}')
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == ["o keeps 2 finished rows; the same command with resume=True goes on"]
    with (here / "o").open("a") as file:
        file.write('{"n":')  # by a crash
    with pytest.raises(InputError, match="is there already: overwrite=True replaces it, resume=True goes on after"):
        Output("o")
    with Output("o", resume=True) as out:
        assert out.rows == [{"n": 1}, {"n": 2}]
        out.check([{"n": 1}, {"n": 2}, {"n": 3}])
        for wanted in ([{"n": 1}], [{"n": 1}, {"n": 3}], [{"m": 1}, {}]):
            with pytest.raises(InputError, match="holds other rows than those of this command"):
                out.check(wanted)
        out.write('{"n": 3}')
    assert (here / "o").read_text() == '{"n": 1}\n{"n": 2}\n{"n": 3}\n'


def test_an_end_without_a_row_leaves_all_as_it_was(here: Path) -> None:
    (here / "old").write_text("1\n2")
    before = files(here)
    for how in ({"path": "o"}, {"path": "old", "overwrite": True}):
        with pytest.raises(ValueError, match="x"), Output(**how):  # type: ignore[arg-type]
            raise ValueError("x")
    assert files(here) == before


def test_overwriting_begins_anew(here: Path) -> None:
    with pytest.raises(KeyError), Output("o") as out:
        out.write("a longer row than the new one")
        raise KeyError
    assert put("new", overwrite=True).rows == []
    assert (here / "o").read_text() == "new\n"
    with pytest.raises(InputError, match="is there already: overwrite=True replaces it"):
        put("again")
    (here / "o").chmod(0o600)
    put("again", overwrite=True)
    assert (here / "o").read_text() == "again\n" and stat.S_IMODE(os.stat("o").st_mode) == 0o600


def test_what_would_do_nothing_is_refused(here: Path) -> None:
    with pytest.raises(InputError, match="give one of them"):
        Output("o", overwrite=True, resume=True)
    for how in ("overwrite", "resume"):
        with pytest.raises(InputError, match=f"keeps no rows: leave out {how}=True"):
            Output("-", **{how: True})
    assert not (here / "o").exists()


@pytest.mark.parametrize("content", ["mine", "{}", "mine\n", "{" * 5000 + "\n", "\xff\n", "[1]\n", "null\n", "1\n{}\n"])
def test_what_holds_no_rows_is_not_gone_on_from(here: Path, content: str) -> None:
    (here / "o").write_text(content, encoding="latin-1")
    before = files(here)
    with pytest.raises(InputError, match="holds other rows than those of this command"):
        Output("o", resume=True)
    assert files(here) == before


def test_two_commands_never_write_one_file(here: Path) -> None:
    with Output("o") as first:
        first.write("one")
        with pytest.raises(EnvironmentProblem, match=r"o is in use by another command"):
            Output("o", resume=True)


INPUTS = ["d.jsonl", "m"]
READ: dict[str, tuple[Make, str]] = {  # places that are read, by another name
    "the file": (lambda here: None, "d.jsonl"),
    "by another path": (lambda here: None, "m/../d.jsonl"),
    "by a link": (lambda here: (here / "a").symlink_to("d.jsonl"), "a"),
    "by a link to a link": (lambda h: ((h / "a").symlink_to("b"), (h / "b").symlink_to("m/config.json")), "a"),
    "by a hard link": (lambda here: os.link(here / "d.jsonl", here / "a"), "a"),
    "by a link to its folder": (lambda here: (here / "n").symlink_to("m"), "n/config.json"),
    "a file of the folder": (lambda here: None, "m/config.json"),
    "what a file of the folder links to": (lambda here: None, "store"),
    "a file below the folder": (lambda h: ((h / "m/sub").mkdir(), (h / "m/sub/x").write_text("")), "m/sub/x"),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_never_written(here: Path, name: str) -> None:
    make, path = READ[name]
    make(here)
    before = files(here)
    with pytest.raises(InputError, match="read"):
        Output(path, inputs=INPUTS, overwrite=True)
    assert files(here) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_name_of_an_input_is_written(here: Path, data: st.DataObject) -> None:
    """However links, hard links and `..` are put together: an output is refused, or no input changes."""
    names, made = ["d.jsonl", "m/config.json", "store", "m/model.safetensors", "new"], Path(tempfile.mkdtemp(dir=here))
    for number in range(data.draw(st.integers(1, 4))):
        aim, new = data.draw(st.sampled_from(names)), f"{made.name}/{number}"
        hard = data.draw(st.booleans())
        if hard and os.path.isfile(aim):
            os.link(aim, new)
        else:
            os.symlink(f"../{aim}", new)
        names.append(new)
    path = data.draw(st.sampled_from(names))
    path = data.draw(st.sampled_from(["{}", "m/../{}", "./m/.././{}"])).format(path)
    inputs = [here / "d.jsonl", here / "m" / "config.json", here / "store"]
    before = [each.read_bytes() for each in inputs]
    aims = os.path.exists(path) and any(os.path.samefile(path, each) for each in inputs)
    try:
        put("x", path=path, inputs=["d.jsonl", "m"], overwrite=True)
    except InputError:
        assert aims
    else:
        assert not aims and Path(path).read_text() == "x\n"
    assert [each.read_bytes() for each in inputs] == before
    (here / "new").unlink(missing_ok=True)


def test_a_link_is_followed_and_stays(here: Path) -> None:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("m/../new")
    put("x", path="a")
    assert (here / "new").read_text() == "x\n" and (here / "a").is_symlink() and (here / "b").is_symlink()
    with pytest.raises(InputError, match="is there already"):
        put("y", path="a")
    put("y", path="a", overwrite=True)
    assert (here / "new").read_text() == "y\n" and (here / "a").is_symlink()


def test_a_pipe_gets_rows_and_stays(here: Path) -> None:
    os.mkfifo("p")
    reader = os.open("p", os.O_RDONLY | os.O_NONBLOCK)
    with Output("p", overwrite=True) as out:
        assert not out.regular and not out.stdout
        out.write("one")
        assert os.read(reader, 100) == b"one\n"
        os.close(reader)
        with pytest.raises(DiskError, match="Broken pipe"):
            out.write("two")
    assert stat.S_ISFIFO(os.stat("p").st_mode) and [*here.glob("p*")] == [here / "p"]


def test_a_device_gets_rows_and_stays(here: Path) -> None:
    put("x", path="/dev/null")
    (here / "a").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="No space left"):
        put("x", path="a")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and (here / "a").is_symlink()


def test_standard_output_by_any_name(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "a").symlink_to("/dev/stdout")
    for path in ("-", "/dev/stdout", "a", "/proc/self/fd/1"):
        sys.stdout.flush()
        assert put(path, path=path).stdout
    assert capfd.readouterr().out == "-\n/dev/stdout\na\n/proc/self/fd/1\n"


def test_standard_output_that_is_closed_or_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        with pytest.raises(InputError, match="closed"):
            Output("-")
    real = os.dup(1)
    try:
        os.dup2(os.open("d.jsonl", os.O_WRONLY | os.O_APPEND), 1)
        with pytest.raises(InputError, match="is read"):
            Output("-", inputs=["d.jsonl"])
    finally:
        os.dup2(real, 1)
        os.close(real)


def test_half_a_pipe_of_standard_output_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.BytesIO):
        def write(self, raw: Any) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Gone()))
    with pytest.raises(BrokenPipeError):
        put("x", path="-")
    monkeypatch.undo()


def _socket(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("a")


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda here: None, ""),
        (lambda here: None, "no/where"),
        (lambda here: None, "d.jsonl/x"),
        (lambda here: None, "a\0b"),
        (lambda here: None, "x" * 300),
        (lambda here: (here / "a").mkdir(), "a"),
        (lambda here: (here / "a").symlink_to("a"), "a"),
        (lambda here: (here / "a").symlink_to("no/where"), "a"),
        (_socket, "a"),
    ],
)
def test_no_place_to_write(here: Path, make: Make, path: str) -> None:
    make(here)
    before = files(here)
    with pytest.raises(InputError, match=r"^out "):
        Output(path, overwrite=True)
    assert files(here) == before


def test_curves_are_not_drawn_over_their_metrics(here: Path) -> None:
    (here / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (here / "loss.png").symlink_to("metrics.jsonl")
    for picture in ("metrics.jsonl", "loss.png"):
        with pytest.raises(InputError, match="is read"):
            draw_curves(here / "metrics.jsonl", here / picture)
    draw_curves(here / "metrics.jsonl", here / "loss.svg")
    assert (here / "loss.svg").read_text().startswith("<?xml")


def test_a_full_disk_keeps_the_rows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskError, match="No space left") as stopped, Output("o") as out:
        out.write('{"n": 1}')
        out._file.close()
        out._file = Full()
        out.write('{"n": 2}')
    assert stopped.value.__notes__[0].startswith("o keeps 1 finished rows")
    assert put('{"n": 2}', resume=True).rows == [{"n": 1}]
