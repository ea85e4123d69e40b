"""The checkout on `sys.path` until the benchmarks are found, which take it off again; and a grid of toy sizes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import benchmarks
from benchmarks import ceilings, shapes
from benchmarks.cases import Setting

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
