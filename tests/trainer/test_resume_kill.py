"""SIGKILL at random moments: the run that is taken up again ends bit for bit like one that was never killed.

Five kills in every run of the tests, twenty with `-m slow`. A process that has imported everything and never trained
forks each run, so a run starts in milliseconds; this file is that process' program too. Dropout, packing, shuffling and
evaluation are on, and every second step is saved, so that many kills fall into a save.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit
from fourbit.trainer.checkpoint import load_checkpoint, newest_checkpoint, verify_checkpoint

STEPS = 12


def run(model: str, rows: str, val: str, out: str) -> None:
    """One training run, or the rest of one."""
    loaded, tokenizer = fourbit.load(model, quant_type="nf4")
    fourbit.attach(loaded, fourbit.LoRAConfig(rank=4, alpha=8, dropout=0.2))
    config = fourbit.SFTConfig(
        out=out, steps=STEPS, batch_size=4, lr=1e-2, eval_every=3, save_every=2, seed=5, resume="auto"
    )
    fourbit.SFTTrainer(loaded, tokenizer, train=rows, val=val, config=config).train(display=None)


def serve() -> None:
    """For each line (arguments of `run`, seconds until it is killed or null) fork a run and print its exit status."""
    for late in ("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        import_module(late)  # what a run imports on its way is imported here, once
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(**arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # nobody has waited for it yet, so the number is still its own
        print(os.waitpid(child, 0)[1], flush=True)


class Runs:
    """Runs in children of the forking process, to the end or to a kill."""

    def __init__(self, process: subprocess.Popen[str], arguments: dict[str, str]) -> None:
        self.process, self.arguments = process, arguments

    def finish(self, out: Path) -> None:
        assert self._status(out, None) == 0, "the run failed; its traceback is on stderr"

    def killed_after(self, seconds: float, out: Path) -> bool:
        """Whether SIGKILL came before the end."""
        status = self._status(out, seconds)
        assert status in (0, signal.SIGKILL)
        return status == signal.SIGKILL

    def _status(self, out: Path, seconds: float | None) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([{**self.arguments, "out": str(out)}, seconds]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture
def runs(tiny_folder: Path, rows: Path, val_rows: Path) -> Iterator[Runs]:
    process = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Runs(process, {"model": str(tiny_folder), "rows": str(rows), "val": str(val_rows)})
    process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("wanted", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills(runs: Runs, assert_same_runs: Any, tmp_path: Path, wanted: int) -> None:
    whole = tmp_path / "whole"
    runs.finish(tmp_path / "warm-up")
    start = time.perf_counter()
    runs.finish(whole)
    duration = time.perf_counter() - start
    tensors, _ = load_checkpoint(whole / "checkpoints" / f"step-{STEPS:06d}")
    assert tensors.keys() == {"weights", "optimizer", "rng", "best"}
    assert_same_runs(whole, tmp_path / "warm-up", STEPS)
    dice, kills, resumed_from = random.Random(0), 0, set()
    for trial in range(3 * wanted):
        out = tmp_path / str(trial)
        killed = runs.killed_after(dice.uniform(0, duration), out)
        if not killed:
            duration *= 0.8  # the machine was busier when it was measured
        if killed and dice.random() < 0.3:  # once more, while it is being taken up
            killed = runs.killed_after(dice.uniform(0, duration / 2), out)
        kills += killed
        checkpoints = out / "checkpoints"
        newest, reasons = newest_checkpoint(checkpoints)
        assert reasons == []
        for path in checkpoints.glob("step-*"):
            verify_checkpoint(path)
        resumed_from.add(newest.name if newest else None)
        runs.finish(out)
        assert newest_checkpoint(checkpoints) == (checkpoints / f"step-{STEPS:06d}", [])
        assert_same_runs(whole, out, STEPS)
        assert not list(checkpoints.glob(".tmp*"))
        if kills == wanted:
            break
    assert kills == wanted, "too few kills came before the end of their runs"
    assert len(resumed_from) >= 2 + wanted // 10, resumed_from  # the moments were spread over the run


if __name__ == "__main__":
    serve()
