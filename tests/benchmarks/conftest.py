"""The checkout on `sys.path` until the benchmarks are found, which take it off again; and a grid of toy sizes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import benchmarks
from benchmarks import ceilings, shapes, tune
from benchmarks.cases import Setting
from benchmarks.tune_table import dump
from fourbit.kernels import dispatch, plan

assert str(benchmarks.CHECKOUT) not in sys.path


@pytest.fixture(scope="session")
def grid() -> shapes.Grid:
    """Sizes that take milliseconds."""
    decoder = shapes.Decoder("toy", 64, 128, 2, 1, 32, 300, 2)
    return replace(
        shapes.CPU,
        projections=decoder.projections()[1:3],
        rows=(1, 3),
        dropouts=(0.0, 0.05),
        decoder=decoder,
        tokens=(16,),
        seconds=600,
        case_seconds=0.0,
        least_rounds=1,
    )


@pytest.fixture
def setting() -> Setting:
    return Setting(torch.device("cpu"), torch.float32, cache_bytes=1 << 12)


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (1 << 16, 32)})
    monkeypatch.setattr(ceilings, "SECONDS", {"cpu": 0.01})


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dispatch table of one GPU, which is said to be here, with two small configurations and nothing measured."""
    path = tmp_path / "table.json"
    made = {"BM": 16, "BN": 64, "BK": 64, "warps": 4, "stages": 2}
    made |= {"copies": 1, "direct": False, "programs": 1, "instructions": 6.0}
    fused = [{"M": 8, "scale_on": "sums", **made}, {"M": 64, "scale_on": "weight", **made}]
    path.write_text(dump({"sm_90": plan.table()["sm_90"] | {"fused": fused, "measured": []}}))
    monkeypatch.setattr(tune, "TABLE", path)
    monkeypatch.setattr(plan, "table", cache(lambda: json.loads(path.read_text())))
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    clear()
    yield path
    clear()


def clear() -> None:
    plan.linear.cache_clear()
    plan.lora.cache_clear()
