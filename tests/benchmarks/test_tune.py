"""Tuning: the table it writes, that wrong configurations are no candidates, and a whole toy run in the interpreter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import Setting
from benchmarks.shapes import Grid
from benchmarks.timing import WallClock
from benchmarks.tune_table import dump, merged
from fourbit.kernels import dispatch, plan

CPU = torch.device("cpu")


def tuner(known: dict[str, Any], **more: Any) -> tune.Tuner:
    setting = Setting(CPU, torch.float16, cache_bytes=1)
    return tune.Tuner(setting, WallClock(), known, float("inf"), 0.0, say=lambda text: None, **more)


def test_the_tables_own_text_comes_back() -> None:
    text = tune.TABLE.read_text()
    assert dump(json.loads(text)) == text


def test_a_table_survives_being_written() -> None:
    table = {
        "sm_90": {"gpu": 'an "H100"', "copy_bandwidth": 2.987654e12, "note": "x", "fused": [{"M": 1}], "measured": []}
    }
    assert json.loads(dump(table)) == table


def test_a_row_takes_the_place_of_the_one_for_its_point() -> None:
    def row(**more: Any) -> dict[str, Any]:
        return {
            "op": "linear",
            "dtype": "bfloat16",
            "N": 64,
            "K": 128,
            "M": 1,
            "fused_us": 5.0,
            "decode_us": 9.0,
        } | more

    entry = {"gpu": "A", "measured": [row(), row(M=16), row(op="lora", N=[64, 64], rank=32)]}
    new = merged(entry, [row(fused_us=4.0), row(M=4), row(op="lora", N=[64, 64], rank=16)])
    assert [(r["op"], r["M"], r.get("rank"), r["fused_us"]) for r in new["measured"]] == [
        ("linear", 1, None, 4.0),
        ("linear", 4, None, 5.0),
        ("linear", 16, None, 5.0),
        ("lora", 1, 16, 5.0),
        ("lora", 1, 32, 5.0),
    ]
    assert new["gpu"] == "A" and len(entry["measured"]) == 3


def test_candidates_are_near_the_models_best() -> None:
    rows = [{"M": M, "BM": BM, "instructions": 60.0} for M, BM in ((16, 16), (512, 128))]
    known = plan.table()["sm_90"] | {"fused": rows}
    few = tune.candidates(known, plan.Size(512, 4096, 4096))
    assert {config["BM"] for config in few} == {128}, "16 rows a tile would decode 32 times"
    assert {config["programs"] for config in few} == set(tune.PROGRAMS)
    assert {config["BM"] for config in tune.candidates(known, plan.Size(1, 4096, 4096))} >= {16}


@pytest.mark.usefixtures("small_ceilings")
def test_a_whole_run(table: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point gets a row, and the rows decide afterwards."""
    monkeypatch.setattr(tune, "DTYPES", (torch.float16,))
    monkeypatch.setattr(tune, "PROGRAMS", (1, 2))
    monkeypatch.setattr(tune.machine, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(tune, "LEAST_ROUNDS", 1)
    fused = json.loads(table.read_text())["sm_90"]["fused"]
    small = replace(grid, projections=grid.projections[:1], rows=(3,), ranks=(16,))
    with dispatch.force_path("triton"):
        assert tune.main([], small, CPU) == 0
    entry = json.loads(table.read_text())["sm_90"]
    assert entry["source"] == "measured" and entry["fused"] == fused
    linear, lora = entry["measured"]
    (shape,) = small.projections
    assert (linear["op"], linear["N"], linear["K"], linear["M"]) == ("linear", shape.N, shape.K, 3)
    assert linear["fused_us"] > 0 and linear["decode_us"] > 0 and linear["config"]["BN"] == 64
    assert (lora["op"], lora["N"], lora["rank"]) == ("lora", [shape.N], 16)
    assert lora["addmm_us"] > 0 and lora["augmented_us"] > 0
    chosen = plan.linear("sm_90", "float16", plan.Size(3, shape.N, shape.K))
    assert chosen.path == ("fused" if linear["fused_us"] <= linear["decode_us"] else "decode")
    assert plan.linear("sm_90", "float16", plan.Size(2, shape.N, shape.K)) == chosen


def test_a_wrong_configuration_is_refused(table: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault in one of two configurations: the other is the one that is written."""
    from fourbit.kernels import matmul4bit_triton

    multiply = matmul4bit_triton.matmul

    def faulty(x: Any, weight: Any, bias: Any, config: dict[str, Any], *rest: Any) -> torch.Tensor:
        y = multiply(x, weight, bias, config, *rest)
        return 1.01 * y if config["scale_on"] == "sums" else y

    monkeypatch.setattr(matmul4bit_triton, "matmul", faulty)
    monkeypatch.setattr(tune, "PROGRAMS", (1,))
    monkeypatch.setattr(tune, "LEAST_ROUNDS", 1)
    asked = tuner(json.loads(table.read_text())["sm_90"])
    with dispatch.force_path("triton"):
        row = asked.linear(grid.projections[0], 3)
    assert row is not None and row["config"]["scale_on"] == "weight"
    assert len(asked.wrong) == 1 and "times its bound" in asked.wrong[0]


def test_check_finds_a_choice_slower_than_decoding(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tuner(plan.table()["sm_90"])
    for ours, slower in ((2.0, True), (1.01, False), (0.5, False)):
        times = {"ours": tune.Timing((ours,), "wall"), "decode": tune.Timing((1.0,), "wall")}
        monkeypatch.setattr(tune.Tuner, "times", lambda self, calls, sets, M, times=times: times)
        assert (asked.check(grid.projections[0], 1) is not None) == slower


def test_points_beyond_the_time_keep_the_row_they_had() -> None:
    asked = replace(tuner({}), deadline=float("-inf"))
    assert asked.rows([lambda: {"op": "linear"}] * 3) == [] and asked.left_out == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "torch sees none here" in capsys.readouterr().err
