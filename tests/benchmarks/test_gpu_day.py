"""The first minutes on a GPU: every part in small form, and that no part stops another, whatever becomes of it."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day, tune
from benchmarks.gpu_parts import RUN
from benchmarks.gpu_probe import Day
from benchmarks.shapes import Grid

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry form is that of a machine without a GPU")
FOUND = {
    "probe": {"machine": 1, "chosen": 3, "packed row": 6, "one more token": 4},
    "tests": {"tests": 1},
    "repeat": {"linear": 2, "training": 2},
    "bench": {"file": 1},
    "tune": {"border": 1},
    "profile": {"step": 1, "step by kernel, all": 1, "step by kernel": 5},
    "decode": {"generate": 4, "8 tokens by kernel, all": 1, "8 tokens by kernel": 5},
}


def lines_of(part: str, out: Path) -> list[dict[str, Any]]:
    RUN[part](Day(part, out, 60.0, dry=True))
    return gpu_day.read(out)


@pytest.mark.filterwarnings("default")  # a peer may warn
@pytest.mark.usefixtures("small_ceilings")
@pytest.mark.parametrize("part", [name for name in FOUND if name not in ("tune", "tests")])
def test_every_part_runs_without_a_gpu(part: str, tmp_path: Path) -> None:
    lines = lines_of(part, tmp_path)
    whats = [line["what"] for line in lines]
    assert {what: whats.count(what) for what in whats} == FOUND[part]
    assert all(line["part"] == part for line in lines)
    if part == "repeat":
        assert not any(line["differ"] for line in lines)
        assert [line.get("deterministic") for line in lines] == [None, None, False, True]
        assert not torch.are_deterministic_algorithms_enabled()
    if part == "probe":
        assert "first_ms" in next(line for line in lines if line.get("way") == "ours, packed")
    assert f"== {part}: did not end\n" in gpu_day.summary(lines)


def test_tuning_writes_a_copy_of_the_table(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tuning that finds, in a line of it, what it is to find; the table of the checkout stays as it is."""
    before = (gpu_day.CHECKOUT / "kernels" / "border.py").read_text()

    def found(*arguments: Any) -> int:
        print('a point\n    "NVIDIA X7": 48,  # here')
        return 0

    monkeypatch.setattr(tune, "main", found)
    (line,) = lines_of("tune", tmp_path)
    assert line["complete"] and line["points"] == 1
    made: dict[str, Any] = {}
    exec(compile((tmp_path / "border.py").read_text(), "border.py", "exec"), made)  # noqa: S102
    assert made["border"]("NVIDIA X7", "sm_90") == 48 and made["border"]("another", "sm_90") == made["SAFE"]
    monkeypatch.setattr(tune, "main", lambda *arguments: print("out of time at 4 rows: nothing is known of more") or 1)
    assert not lines_of("tune", tmp_path)[-1]["complete"]
    assert (gpu_day.CHECKOUT / "kernels" / "border.py").read_text() == before


def test_no_part_stops_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One fails, one is ended with its child, one writes half a line; time that is left goes to those after."""
    child = tmp_path / "child"
    programs = {
        "probe": "raise SystemExit(3)",
        "tests": "import subprocess, sys, time, pathlib\n"
        f"child = subprocess.Popen(['sleep', '60']); pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "print('begun', flush=True); time.sleep(60)",
        "repeat": f"open({str(tmp_path / 'o' / 'results.jsonl')!r}, 'a').write('{{\"part\": \"rep\\n')",
    }
    limits = []

    def command(name: str, out: Path, limit: float, dry: bool) -> list[str]:
        limits.append(limit)
        return [sys.executable, "-c", programs[name]]

    monkeypatch.setattr(gpu_day, "command", command)
    monkeypatch.setattr(gpu_day, "PARTS", {"probe": 4.0, "tests": 1.0, "repeat": 1.0})
    assert gpu_day.main(["--out", str(tmp_path / "o"), "--seconds", "5", "--dry"]) == 1
    ended = {line["part"]: line["how"] for line in gpu_day.read(tmp_path / "o")}
    assert ended == {"probe": "failed with exit code 3", "tests": "out of time", "repeat": "ok"}
    assert limits[1] > 1.2, "what the first left"
    assert (tmp_path / "o" / "tests.txt").read_text() == "begun\n"
    time.sleep(0.1)
    gone = Path(f"/proc/{child.read_text()}/stat")
    assert not gone.exists() or gone.read_text().split(") ")[1][0] == "Z"
    assert "== tests: out of time" in (tmp_path / "o" / "summary.txt").read_text()


def test_a_part_is_a_process_that_finds_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    how = ["--out", str(tmp_path), "--dry", "--parts"]
    assert gpu_day.main([*how, "tests"]) == 0, (tmp_path / "tests.txt").read_text()
    line = gpu_day.read(tmp_path)[0]
    assert line["passed"] > 10 and line["failed"] == line["error"] == line["late"] == 0
    assert os.path.samefile(tmp_path / "path" / "fourbit", gpu_day.CHECKOUT)
    with pytest.raises(SystemExit):
        gpu_day.main([*how, "decode,nope"])


def test_the_day_fits_its_machine() -> None:
    assert sum(gpu_day.PARTS.values()) <= gpu_day.SECONDS <= 555 and list(RUN) == list(gpu_day.PARTS) == list(FOUND)
