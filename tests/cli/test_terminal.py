"""The command as a process: signals and their exit codes, colours on a terminal, a closed pipe."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourbit.cli.main import main
from fourbit.cli.show import working
from fourbit.trainer.interrupt import remembered_ctrl_c

FOURBIT = [sys.executable, "-P", "-m", "fourbit"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
STEPS = 60


def sft_args(model: Path, rows: Path, out: Path) -> list[str]:
    shape = ["--steps", str(STEPS), "--batch-size", "4", "--rank", "4", "--dropout", "0.1", "--lr", "1e-2"]
    return ["sft", "--model", str(model), "--data", str(rows), "--out", str(out), *shape]


def wait_for(file: Path, lines: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_then_ends_the_same(
    tiny_folder: Path, rows: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    cut, whole = tmp_path / "cut run", tmp_path / "whole"
    args = [*FOURBIT, *sft_args(tiny_folder, rows, cut)]
    with subprocess.Popen(args, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(cut / "metrics.jsonl", 3, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    command = shlex.split(said.strip().splitlines()[-1])
    assert command == ["fourbit", "sft", str(cut / "config.yaml"), "--resume"]
    assert not (cut / "adapter_model.safetensors").exists(), "a half-trained adapter looks like a finished one"
    sources = (cut / "config.yaml").read_bytes()
    assert main(command[1:]) == 0
    assert (cut / "config.yaml").read_bytes() == sources, "resuming lost the record of where settings came from"
    assert main(sft_args(tiny_folder, rows, whole)) == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


def test_ctrl_c_before_the_first_step(tiny_folder: Path, tmp_path: Path) -> None:
    """While data is still being read: nothing to save, one line, 130."""
    pipe = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "b"}]}
    pipe.write_text((json.dumps(row) + "\n") * 50_000)
    args = [*FOURBIT, *sft_args(tiny_folder, pipe, tmp_path / "out")]
    with subprocess.Popen(args, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("reading data")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("stopped by Ctrl-C\n") and not (tmp_path / "out" / "metrics.jsonl").exists()


class Victim:
    """Dies while Ctrl-C is pressed."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_inside_a_finaliser_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Python drops the exception there; the command must still end."""
    with remembered_ctrl_c():
        victim: Victim | None = Victim()
        with pytest.raises(KeyboardInterrupt), working("reading data"):
            del victim
            went_on = True
    assert went_on and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with remembered_ctrl_c():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def on_terminal(args: list[str], **environment: str) -> str:
    """Everything a command prints on a terminal of its own."""
    leader, follower = pty.openpty()
    env = {name: value for name, value in ENVIRONMENT.items() if name != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", **environment}
    with subprocess.Popen([*FOURBIT, *args], env=env, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        parts = []
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # Linux: the other side has closed
                break
            if not part:
                break
            parts.append(part)
    os.close(leader)
    assert process.returncode == 0
    return b"".join(parts).decode()


def test_colours_on_a_terminal_and_marks_without(tiny_folder: Path, rows: Path) -> None:
    args = ["data", str(rows), "--model", str(tiny_folder), "--rows", "1"]
    coloured, plain = on_terminal(args), on_terminal(args, NO_COLOR="1")
    assert "\x1b[1;32m" in coloured and "{+" not in coloured
    assert "\x1b[" not in plain and "{+" in plain


def test_a_live_line_on_a_terminal(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    args = sft_args(tiny_folder, rows, tmp_path / "out")
    shown = on_terminal([*args, "--steps", "3"])
    assert "3/3" in shown and "tok/s" in shown and "last loss" in shown


def test_a_closed_pipe_is_no_error(tiny_folder: Path, rows: Path) -> None:
    args = [*FOURBIT, "data", str(rows), "--model", str(tiny_folder), "--rows", "22"]
    with subprocess.Popen(args, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0 and "Traceback" not in said and "Exception" not in said
