"""Tuning: the border it finds, that a wrong kernel ends it, and a whole toy run in the interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.shapes import Grid
from benchmarks.tune import Point
from fourbit.kernels import dispatch

CPU = torch.device("cpu")


@pytest.fixture
def small(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> Grid:
    """One shape, few rows, small tiles, one round."""
    monkeypatch.setattr(tune, "DTYPES", (torch.float16,))
    monkeypatch.setattr(tune, "ROWS", (1, 3))
    monkeypatch.setattr(tune, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(tune, "POINT_SECONDS", 0.0)
    monkeypatch.setattr(tune.machine, "cache_bytes", lambda device: 1)
    from fourbit.kernels import matmul4bit_triton

    for constant, value in {"COLUMNS": 32, "WARPS": 2, "COPIES": 4}.items():
        monkeypatch.setattr(matmul4bit_triton, constant, value)
    return replace(grid, projections=grid.projections[:1])


def test_the_border_is_where_the_first_point_is_slower() -> None:
    points = [Point(1, 3.0), Point(1, 2.0), Point(8, 1.5), Point(8, 0.99), Point(32, 1.2), Point(32, 0.9)]
    assert tune.border_of(points) == 8
    assert tune.border_of(points[:4]) == 8 and tune.border_of(points[:2]) == 1
    assert tune.border_of([Point(1, 0.5), Point(8, 2.0)]) == 0


def test_a_whole_run_ends_with_the_tables_line(
    small: Grid, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "SLOWER", 0.0)  # whatever the interpreter takes
    monkeypatch.setattr(dispatch, "model", lambda device: "NVIDIA X7")
    with dispatch.force_path("triton"):
        assert tune.main([], small, CPU) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].startswith('    "NVIDIA X7": 3,  # ')
    with dispatch.force_path("triton"):
        assert tune.main(["--minutes", "0"], small, CPU) == 1
    assert "out of time at 1 rows" in capsys.readouterr().out


def test_a_wrong_kernel_is_no_candidate(small: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourbit.kernels import matmul4bit_triton

    multiply = matmul4bit_triton.matmul

    def faulty(*arguments: Any, **options: Any) -> torch.Tensor:
        return 1.1 * multiply(*arguments, **options)

    monkeypatch.setattr(matmul4bit_triton, "matmul", faulty)
    with dispatch.force_path("triton"), pytest.raises(SystemExit, match=r"WRONG: .*times its bound"):
        tune.main([], small, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "torch sees none here" in capsys.readouterr().err
