"""The checks on made-up figures: met, not met, not run, and what the worst point is."""

from typing import Any

import pytest

from benchmarks import held_to, ops_linear, ops_lora_cost, ops_memory, optimizers, shapes, step
from benchmarks.cases import OURS, Point
from benchmarks.peers import bnb, dense, peft_lora


def line(point: Point, variant: str, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    found = {"kind": "figure", "name": point.name, "variant": variant} | more
    return found if ratio is None else found | {"over_ours": [ratio, ratio, ratio]}


def finding(name: str, lines: list[dict[str, Any]], points: list[Point]) -> held_to.Finding:
    (found,) = [found for found in held_to.findings(lines, points) if found.check.name == name]
    return found


DECODE = [Point("dequantize", "m", name, 8192, 8192) for name in ("a", "b")]


@pytest.mark.parametrize(
    ("shares", "status", "aim"),
    [((0.94, 0.95), "met", True), ((0.86, 0.95), "met", False), ((0.84, 0.95), "not met", False)],
)
def test_the_worst_point_decides(shares: tuple[float, float], status: str, aim: bool) -> None:
    lines = [line(p, OURS, bandwidth_share=share) for p, share in zip(DECODE, shares, strict=True)]
    found = finding("decode: share of copy bandwidth", lines, DECODE)
    assert (found.status, found.aim_met, found.worst) == (status, aim, min(shares))
    assert found.where == DECODE[shares.index(min(shares))].name
    assert found.status in str(found) and ("aim too" in str(found)) == aim


def test_a_point_left_out_makes_it_not_run_but_a_miss_stays_a_miss() -> None:
    name = "decode: share of copy bandwidth"
    found = finding(name, [line(DECODE[0], OURS, bandwidth_share=0.99)], DECODE)
    assert (found.status, found.aim_met, found.points, found.expected) == ("not run", False, 1, 2)
    assert finding(name, [line(DECODE[0], OURS, bandwidth_share=0.5)], DECODE).status == "not met"
    assert finding(name, [], DECODE).status == "not run"


def test_small_matrices_and_other_ops_are_not_held_to_it() -> None:
    points = [Point("dequantize", "m", "small", 4096, 4096), Point("linear", "m", "a", 8192, 8192, 2048)]
    assert finding("decode: share of copy bandwidth", [], points).expected == 0


def test_bitsandbytes_counts_at_its_best() -> None:
    point = Point("linear", "m", "gate/up", 14336, 4096, 64)
    name = "8 to 512 rows: times bitsandbytes"
    lines = [
        line(point, OURS),
        line(point, bnb.NESTED, 2.5),
        line(point, bnb.PLAIN, 1.2),
        line(point, bnb.DECODED, 3.0),
    ]
    assert finding(name, lines, [point]).status == "not met"
    assert finding(name, lines[:2], [point]).aim_met
    far = Point("linear", "m", "gate/up", 14336, 4096, 512)
    lines = [line(point, bnb.NESTED, 2.1), line(far, bnb.NESTED, 1.4)]
    assert finding(name, lines, [point, far]).aim_met, "the aim holds for 16 to 128 rows only"


def test_every_point_is_held_to_our_fallback_too() -> None:
    point = Point("linear", "m", "k/v", 512, 3584, 4)
    name = "every point: times the best of bitsandbytes and our fallback"
    lines = [line(point, bnb.NESTED, 1.5), line(point, ops_linear.FALLBACK, 0.97)]
    assert finding(name, lines, [point]).status == "not met"
    lines[1] = line(point, ops_linear.FALLBACK, 0.985)
    assert finding(name, lines, [point]).status == "met"


@pytest.mark.parametrize(("rows", "least"), [(8192, 1.35), (2048, 1.4)])
def test_qlora(rows: int, least: float) -> None:
    point = Point("qlora", "m", "q/o", 4096, 4096, rows, 16)
    others = [Point("qlora", "m", "q/o", 4096, 4096, rows, 64), Point("qlora", "m", "k/v", 1024, 4096, rows, 16)]
    name = f"QLoRA linear, {rows} rows: times bitsandbytes + peft"
    for ratio, status in ((least, "met"), (least - 0.01, "not met")):
        found = finding(name, [line(point, peft_lora.QLORA, ratio)], [point, *others])
        assert (found.status, found.expected) == (status, 1)
    beside_dense = finding(
        f"QLoRA linear, {rows} rows: times dense without LoRA", [line(point, dense.NAME, 0.8)], [point]
    )
    assert beside_dense.status == ("met" if rows == 2048 else "not met")


@pytest.mark.parametrize(
    ("ratio", "status", "aim"), [(0.99, "met", True), (0.96, "met", False), (0.9, "not met", False)]
)
def test_lora_cost_is_at_most(ratio: float, status: str, aim: bool) -> None:
    point = Point("lora_cost", "m", "q/o", 4096, 4096, 8192, 16)
    found = finding("LoRA's cost, forward, 8192 rows", [line(point, ops_lora_cost.FROZEN, ratio)], [point])
    assert (found.status, found.aim_met) == (status, aim)
    assert found.worst == pytest.approx(1 / ratio - 1, abs=1e-4)


def test_memory_counts_workspaces_above_dense_layers() -> None:
    point = Point("memory", "m", "8 layers", 14336, 4096, 2048, 16)
    name = "memory: workspaces of the largest weight"
    ours = line(point, OURS, peak_bytes=1100, workspace_bytes=100)
    assert finding(name, [ours, line(point, ops_memory.DENSE, 1.0, peak_bytes=1000)], [point]).status == "met"
    assert finding(name, [ours, line(point, ops_memory.DENSE, 1.0, peak_bytes=900)], [point]).status == "not met"
    assert finding(name, [ours], [point]).status == "not run"


def optimizer(op: str, shape: shapes.Decoder, rank: int = 16, name: str = optimizers.ADAPTER) -> Point:
    return Point(op, shape.model, name, 0, 0, rank=rank)


@pytest.mark.parametrize(("ratio", "status"), [(10.5, "met"), (9.5, "not met")])
def test_optimizers_are_held_to_bitsandbytes_on_the_8b_adapter(ratio: float, status: str) -> None:
    point = optimizer(optimizers.EIGHT_BIT, shapes.LLAMA_8B)
    others = [
        optimizer(optimizers.ADAMW, shapes.LLAMA_8B),
        optimizer(optimizers.EIGHT_BIT, shapes.LLAMA_8B, name=optimizers.ADAPTER + optimizers.CLIPPED),
        optimizer(optimizers.EIGHT_BIT, shapes.LLAMA_70B, 64),
    ]
    lines = [line(point, bnb.optimizer_name(8), ratio), *(line(p, bnb.optimizer_name(8), 1.0) for p in others)]
    found = finding("8-bit AdamW, 448 tensors: times bitsandbytes", lines, [point, *others])
    assert (found.status, found.expected) == (status, 1)


def test_large_optimizers_are_held_to_bandwidth() -> None:
    large = [optimizer(optimizers.ADAMW, shapes.LLAMA_70B, 64), optimizer(optimizers.EIGHT_BIT, shapes.LLAMA_1B, 0)]
    lines = [line(p, OURS, bandwidth_share=share) for p, share in zip(large, (0.9, 0.69), strict=True)]
    found = finding("AdamW, 828 M and up: share of copy bandwidth", lines, large)
    assert (found.status, found.where) == ("not met", large[1].name)


@pytest.mark.parametrize(("ratio", "status"), [(1 / 1.14, "met"), (1 / 1.16, "not met")])
def test_paging_is_held_to_its_copies(ratio: float, status: str) -> None:
    point = optimizer(optimizers.PAGED, shapes.LLAMA_70B, 64)
    name = "paged AdamW, a quarter fits: times its copies"
    assert finding(name, [line(point, optimizers.COPIES, ratio)], [point]).status == status


@pytest.mark.parametrize(
    ("ratio", "status", "aim"), [(1.005, "met", True), (1.02, "met", False), (1.04, "not met", False)]
)
def test_paging_is_held_to_a_share_of_a_step(ratio: float, status: str, aim: bool) -> None:
    point = Point("step", shapes.LLAMA_8B.model, "", 0, 0, 2048, 16)
    found = finding("paged AdamW: share added to a step", [line(point, step.PAGED, ratio)], [point])
    assert (found.status, found.aim_met) == (status, aim)


def test_a_finding_is_one_line_of_the_result_file() -> None:
    found = finding("decode: share of copy bandwidth", [line(p, OURS, bandwidth_share=0.9) for p in DECODE], DECODE)
    assert found.fields() == {
        "kind": "check",
        "check": "decode: share of copy bandwidth",
        "status": "met",
        "aim_met": False,
        "at_least": 0.85,
        "aim": 0.93,
        "worst": 0.9,
        "where": DECODE[0].name,
        "points": [2, 2],
    }
