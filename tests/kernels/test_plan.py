"""The dispatch table: what it must hold, that a measured point decides, and what the cost model does elsewhere."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.kernels import dispatch, plan
from fourbit.kernels.plan import FORMS, Size

ROOT = Path(__file__).parents[2]
ARCHITECTURES = sorted(plan.table(), key=lambda name: int(name[3:]))
TILE = {"BM": 64, "BN": 128, "BK": 64, "warps": 4, "stages": 3}
CONFIG = {"M": 64, **TILE, "scale_on": "weight", "copies": 1, "direct": False, "programs": 2, "instructions": 6.0}
sizes = st.builds(Size, st.integers(1, 20_000), st.integers(1, 1 << 17), st.integers(1, 1 << 17))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A table of one architecture that a test may write to."""
    made = {"sm_90": {**plan.table()["sm_90"], "fused": [CONFIG], "measured": []}}
    monkeypatch.setattr(plan, "table", lambda: made)
    plan.linear.cache_clear()
    plan.lora.cache_clear()
    yield made["sm_90"]
    plan.linear.cache_clear()
    plan.lora.cache_clear()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_is_complete(name: str) -> None:
    entry = plan.table()[name]
    assert entry["source"] and entry["gpu"]
    for ceiling in ("sms", "copy_bandwidth", "matmul_rate", "issue_rate"):
        assert entry[ceiling] > 0, ceiling
    served = [row["M"] for row in entry["fused"]]
    assert served and served == sorted(set(served)), "one configuration a range of M, in order"
    for row in entry["fused"]:
        assert set(row) == set(CONFIG) and row["instructions"] > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_measured_choice_is_slower_than_decoding(name: str) -> None:
    for point in plan.table()[name]["measured"]:
        if point["op"] == "linear":
            chosen = plan.linear(name, point["dtype"], Size(point["M"], point["N"], point["K"]))
            assert point[f"{chosen.path}_us"] <= point["decode_us"]


@given(st.sampled_from(ARCHITECTURES), sizes)
def test_the_cost_model_chooses_the_way_it_finds_quicker(name: str, size: Size) -> None:
    entry = plan.table()[name]
    if any((p["N"], p["K"]) == (size.N, size.K) for p in entry["measured"]):
        return
    chosen = plan.linear(name, "bfloat16", size)
    config = next((row for row in entry["fused"] if row["M"] >= size.M), None)
    if chosen.path == "fused":
        assert chosen.config == config
        assert plan.fused_seconds(entry, size, chosen.config) <= plan.decode_seconds(entry, size)
    elif config is not None:
        assert plan.fused_seconds(entry, size, config) > plan.decode_seconds(entry, size)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_one_row_is_fused_and_ten_thousand_are_not(name: str, N: int, K: int) -> None:
    assert plan.linear(name, "bfloat16", Size(1, N, K)).path == "fused"
    assert plan.linear(name, "bfloat16", Size(10_000, N, K)).path == "decode"


def test_a_measured_point_decides_for_its_shape_and_for_fewer_rows(table: dict[str, Any]) -> None:
    other = {**CONFIG, "BN": 64}
    point = {"op": "linear", "dtype": "bfloat16", "N": 4096, "K": 4096}
    table["measured"] += [
        {**point, "M": 16, "fused_us": 9.0, "decode_us": 5.0, "config": other},
        {**point, "M": 4096, "fused_us": 5.0, "decode_us": 9.0, "config": other},
    ]
    assert plan.linear("sm_90", "bfloat16", Size(16, 4096, 4096)) == plan.DECODE
    assert plan.linear("sm_90", "bfloat16", Size(9, 4096, 4096)) == plan.DECODE
    assert plan.linear("sm_90", "bfloat16", Size(17, 4096, 4096)) == ("fused", other)
    assert plan.linear("sm_90", "bfloat16", Size(4097, 4096, 4096)) == plan.DECODE  # beyond: the cost model
    assert plan.linear("sm_90", "float16", Size(16, 4096, 4096)).config == CONFIG  # other dtype: the cost model
    assert plan.linear("sm_90", "bfloat16", Size(16, 4096, 8192)).config == CONFIG


def test_a_measured_lora_point_decides(table: dict[str, Any]) -> None:
    point = {"op": "lora", "dtype": "bfloat16", "N": [4096, 1024], "K": 4096, "rank": 32, "M": 2048}
    table["measured"].append({**point, "addmm_us": 3.0, "augmented_us": 2.0, "fused_us": 1.0})
    assert plan.lora("sm_90", "bfloat16", 2048, (4096, 1024), 4096, 32) == "fused"
    assert plan.lora("sm_90", "bfloat16", 2048, (1024, 4096), 4096, 32) != "fused"


def test_lora_without_measurements() -> None:
    """A wide output or several projections of one input pay for copying x; a narrow output does not."""
    form = lambda M, rows, K: plan.lora("sm_90", "bfloat16", M, rows, K, 16 * len(rows))  # noqa: E731
    assert form(8192, (14336, 14336), 4096) == form(8192, (4096, 1024, 1024), 4096) == "augmented"
    assert form(8192, (4096,), 14336) == "addmm"
    assert form(1, (4096, 1024, 1024), 4096) == "fused"
    assert {form(8192, (14336, 14336), 4096), form(8192, (4096,), 14336), form(1, (4096,), 4096)} == set(FORMS)


def test_unlisted_gpus_take_the_next_older_entry_of_their_generation(table: dict[str, Any]) -> None:
    assert plan.entry("sm_90") is plan.entry("sm_95") is table
    assert plan.entry("sm_100") is plan.entry("sm_75") is plan.entry("") is None
    assert plan.linear("sm_75", "float16", Size(1, 4096, 4096)) == plan.DECODE
    assert plan.lora("", "bfloat16", 1, (4096,), 4096, 16) == "addmm"


def test_the_cpu_has_no_plan() -> None:
    assert dispatch.plan_linear(torch.zeros(1, 64), 64) == plan.DECODE
    assert dispatch.architecture(torch.device("cpu")) == ""


def test_every_path_of_the_table_has_a_test_that_names_it() -> None:
    """Each form and each way must occur as a string in a test file other than this one."""
    named = {
        node.value
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    scales = {row["scale_on"] for entry in plan.table().values() for row in entry["fused"]}
    missing = {*dispatch.PATHS, *FORMS, "decode", *scales} - named
    assert not missing, f"no test names {sorted(missing)}"
