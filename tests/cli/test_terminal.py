"""The command as a process: signals and their exit codes, colours on a terminal, a closed pipe."""

import contextlib
import gc
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

STEPS = 40


class Started:
    """The command in a process of its own, forked from this one, which has imported all it needs; what it prints goes
    to `shown`, that of a terminal or of a pipe."""

    def __init__(self, args: list[str], *, terminal: bool = False, **environment: str) -> None:
        if terminal:
            self.pid, reader = pty.fork()
        else:
            reader, writer = os.pipe()
            self.pid = os.fork()
            if not self.pid:
                os.dup2(writer, 1)
                os.dup2(writer, 2)
            os.close(writer)
        if not self.pid:
            code = 1
            try:
                code = self._run(args, environment)
            finally:
                os._exit(code)
        self.shown = os.fdopen(reader, "rb", buffering=0)

    @staticmethod
    def _run(args: list[str], environment: dict[str, str]) -> int:
        gc.callbacks.clear()  # hypothesis' own: Python drops a KeyboardInterrupt that is raised in one
        os.environ.pop("NO_COLOR", None)
        os.environ.update({"COLUMNS": "100", **environment})
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, os.fdopen(number, "w" if number else "r", 1, closefd=False))
        code = main(args)
        sys.stdout.flush()
        return code

    def wait_for(self, file: Path, lines: int) -> None:
        deadline = time.monotonic() + 120
        while not file.exists() or file.read_bytes().count(b"\n") < lines:
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), "the run ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> tuple[int, str]:
        """Its exit code, and all that it printed."""
        parts = list[bytes]()
        with self.shown, contextlib.suppress(OSError):  # Linux: the other side of a terminal has closed
            while part := os.read(self.shown.fileno(), 65536):
                parts.append(part)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), b"".join(parts).decode()


def sft_args(model: Path, rows: Path, out: Path) -> list[str]:
    shape = ["--steps", str(STEPS), "--batch-size", "4", "--rank", "4", "--dropout", "0.1", "--lr", "1e-2"]
    return ["sft", "--model", str(model), "--data", str(rows), "--out", str(out), *shape]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(sft_args(tiny_folder, rows, out)) == 0
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_then_ends_the_same(
    tiny_folder: Path,
    rows: Path,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    cut = tmp_path / "cut run"
    command = Started(sft_args(tiny_folder, rows, cut))
    command.wait_for(cut / "metrics.jsonl", 3)
    command.send(number)
    ended, said = command.ended()
    assert ended == code, said
    advised = shlex.split(said.strip().splitlines()[-1])
    assert advised == ["fourbit", "sft", str(cut / "config.yaml"), "--resume"]
    assert not (cut / "adapter_model.safetensors").exists(), "a half-trained adapter looks like a finished one"
    sources = (cut / "config.yaml").read_bytes()
    assert main(advised[1:]) == 0
    assert (cut / "config.yaml").read_bytes() == sources, "resuming lost the record of where settings came from"
    again = load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole) and again.keys() == whole.keys()


def test_ctrl_c_before_the_first_step(tiny_folder: Path, tmp_path: Path) -> None:
    """While data is still being read: nothing to save, one line, 130."""
    pipe = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "b"}]}
    pipe.write_text((json.dumps(row) + "\n") * 50_000)
    command = Started(sft_args(tiny_folder, pipe, tmp_path / "out"))
    assert command.shown.readline().startswith(b"reading data")
    command.send(signal.SIGINT)
    ended, said = command.ended()
    assert ended == 130, said
    assert said.endswith("stopped by Ctrl-C\n") and not (tmp_path / "out" / "metrics.jsonl").exists()


def on_terminal(args: list[str], **environment: str) -> str:
    """Everything a command prints on a terminal of its own."""
    ended, shown = Started(args, terminal=True, TERM="xterm-256color", **environment).ended()
    assert ended == 0
    return shown


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
    args = [sys.executable, "-P", "-m", "fourbit", "data", str(rows), "--model", str(tiny_folder), "--rows", "22"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0 and "Traceback" not in said and "Exception" not in said


def test_loading_shows_a_bar_on_a_terminal_and_a_line_on_a_pipe(tiny_folder: Path, val_rows: Path) -> None:
    args = ["eval", "--model", str(tiny_folder), "--data", str(val_rows), "--max-new-tokens", "1"]
    shown = on_terminal(args)
    assert "loading" in shown and "tensors" in shown and "/s" in shown
    ended, said = Started(args).ended()
    assert ended == 0 and "loading" in said and "tensors" not in said
