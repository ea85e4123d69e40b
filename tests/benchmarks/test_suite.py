"""The suite end to end on toy sizes: what it writes, refuses, leaves out, compares and draws."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import ceilings, ops_linear, report, timing
from benchmarks.cases import OURS, Case, Point, Setting, Variant, Work
from benchmarks.peers import bnb, peft_lora
from benchmarks.run import Result, Runner, in_turn
from benchmarks.shapes import Grid
from fourbit.kernels import dispatch

FIELDS = (
    "kind name op model projection N K M rank dropout variant us us_quartiles rounds timed sets flops bytes dtype gate"
)
FACTS = "device gpu driver cuda cpu threads versions date commit"
OPS = "quantize dequantize linear qlora lora_cost adamw adamw8bit layer step"


def run(argv: list[str], grid: Grid, out: Path) -> tuple[int, list[dict[str, Any]]]:
    code = suite.main([*argv, "--device", "cpu", "--out", str(out)], grid)
    (path,) = out.glob("*.jsonl")
    return code, report.read(path)


@pytest.mark.filterwarnings("default")  # a peer may warn
@pytest.mark.usefixtures("small_ceilings")
def test_the_whole_suite(grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every op passes its gate for every tool that is here, and everything asked for is written."""
    code, lines = run([], replace(grid, projections=grid.projections[:1], rows=(3,)), tmp_path)
    said = capsys.readouterr()
    assert code == 0, said.out
    assert not [line for line in lines if line["kind"] == "refused"], said.out
    figures = report.figures_of(lines)
    assert {line["op"] for line in figures} == {*OPS.split()}
    for line in figures:
        assert line.keys() >= {*FIELDS.split(), *FACTS.split()}, line
        assert line["gate"] <= 1 and line["us"] > 0
        assert line["us_quartiles"][0] <= line["us"] <= line["us_quartiles"][1]
        assert (line["variant"] == OURS) == ("over_ours" not in line)
    assert {line["variant"] for line in figures} >= {OURS, bnb.NESTED, bnb.PLAIN, peft_lora.QLORA, ops_linear.FALLBACK}
    (limits,) = [line for line in lines if line["kind"] == "ceilings"]
    assert limits["copy_bandwidth"] > 0 and limits["matmul_rate"] > 0 and limits.keys() >= {*FACTS.split()}
    assert not [line for line in lines if line["kind"] == "check"], "the levels are those of a GPU"
    for name in ("roofline.png", "roofline.svg"):
        assert list(tmp_path.glob(f"*-{name}")), name
    assert "linear: 4-bit linear, forward" in said.out and "not here: Liger" in said.out


@pytest.mark.usefixtures("small_ceilings")
def test_only_and_compare(grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(["--only", "^linear .* M=1$"], grid, tmp_path / "a")
    assert code == 0
    assert {line["name"] for line in report.figures_of(lines)} == {"linear toy k/v M=1", "linear toy gate/up M=1"}
    (old,) = (tmp_path / "a").glob("*.jsonl")
    capsys.readouterr()
    assert run(["--only", "^linear toy k/v M=1$", "--compare", str(old)], grid, tmp_path / "b")[0] == 0
    said = capsys.readouterr().out
    assert "now/before" in said and "linear toy k/v M=1, ours" in said and "gate/up" not in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "nothing like it"], "nothing matches 'nothing like it'"),
        (["--only", "("], "is no regular expression"),
        (["--compare", "absent.jsonl"], "--compare"),
        (["--device", "tpu"], "invalid choice"),
        pytest.param(
            ["--device", "cuda"],
            "sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_wrong_arguments(
    argv: list[str], message: str, grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in argv else ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        suite.main([*argv, *device, "--out", str(tmp_path)], grid)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_compare_refuses_what_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text('{"kind": "run"}\n{"kind"\n')
    with pytest.raises(ValueError, match=r"old\.jsonl:2 is no JSON"):
        report.read(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"old\.jsonl:1 is no line"):
        report.read(path)


def figure(name: str, us: float, spread: float = 0.001, **more: Any) -> dict[str, Any]:
    quartiles = [us * (1 - spread), us * (1 + spread)]
    return {"kind": "figure", "name": name, "variant": OURS, "us": us, "us_quartiles": quartiles, "gpu": "A"} | more


def test_compare_calls_slower_what_is_beyond_both_spreads() -> None:
    old = [figure("a", 100), figure("b", 100), figure("c", 100), figure("d", 100, spread=0.5)]
    new = [figure("a", 120), figure("b", 80), figure("c", 101), figure("d", 120), figure("e", 1, gpu="B")]
    rows = report.compare(new, old).splitlines()
    assert [row.split()[-1] for row in rows[1:5]] == ["slower", "quicker", "1.010", "1.200"]
    assert "4 points" in rows[5]
    assert "CAREFUL" not in report.compare(new, old)
    assert "CAREFUL: not one machine: A, B" in report.compare([figure("a", 1, gpu="B")], old)
    assert report.compare(new[4:], old) == "no point of this run is in the earlier one"


def runner(setting: Setting, seconds: float = 60, **more: Any) -> Runner:
    limits = ceilings.Ceilings(timing.Timing((1.0,), "wall"), 1.0, timing.Timing((1.0,), "wall"), 1.0)
    deadline = time.monotonic() + seconds
    return Runner(setting, timing.WallClock(), limits, {}, 0.001, deadline, say=lambda text: None, **more)


def planted(*variants: Variant, op: str = "linear", priority: int = 1, name: str = "x") -> Case:
    return Case(Point(op, "toy", name, 1, 1, 1), priority, lambda: Work(list(variants), 1.0, 1.0))


def variant(name: str, worst: float, *, own: bool = False, raises: bool = False) -> Variant:
    def make() -> Any:
        if raises:
            raise RuntimeError("no such kernel\nand more")
        return lambda i: i

    return Variant(name, make, lambda result: worst, own)


def test_a_wrong_peer_is_refused_and_the_run_goes_on(setting: Setting) -> None:
    right, wrong, broken = variant(OURS, 0.5, own=True), variant("wrong", 1.5), variant("broken", 0.5, raises=True)
    result = runner(setting).run([planted(right, wrong, broken)])
    assert [line["variant"] for line in result.figures()] == [OURS]
    refused = {line["variant"]: line["problem"] for line in result.lines if line["kind"] == "refused"}
    assert refused == {"wrong": "error 1.5 times its bound", "broken": "RuntimeError: no such kernel"}
    assert not result.wrong


@pytest.mark.parametrize("bad", [variant(OURS, 1.5, own=True), variant(OURS, float("inf"), own=True)])
def test_a_wrong_op_of_ours_is_not_reported(bad: Variant, setting: Setting) -> None:
    result = runner(setting).run([planted(bad, variant("peer", 0.5))])
    assert [line["variant"] for line in result.figures()] == ["peer"]
    assert len(result.wrong) == 1 and "times its bound" in result.wrong[0]


@pytest.mark.usefixtures("small_ceilings")
def test_a_wrong_op_of_ours_ends_in_exit_code_1(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourbit import NF4Linear

    forward = NF4Linear.forward
    monkeypatch.setattr(NF4Linear, "forward", lambda self, x: 1.01 * forward(self, x))
    code, lines = run(["--only", "linear toy k/v M=3"], grid, tmp_path)
    assert code == 1
    assert [line["variant"] for line in lines if line["kind"] == "refused"] == [OURS]
    assert OURS not in {line["variant"] for line in report.figures_of(lines)}


def test_what_time_does_not_allow_for_is_named(setting: Setting) -> None:
    cases = [planted(variant(OURS, 0, own=True), name=f"p{i}") for i in range(3)]
    result = runner(setting, seconds=-1).run(cases)
    assert result.left_out == ["linear toy p0 M=1", "linear toy p1 M=1", "linear toy p2 M=1"]
    assert not result.lines


def test_cases_go_by_priority_and_then_an_op_at_a_time() -> None:
    cases = [planted(op="a", priority=2, name="1"), *(planted(op="a", name=n) for n in "23"), planted(op="b", name="4")]
    assert [case.point.projection for case in in_turn(cases)] == ["2", "4", "3", "1"]


def test_a_case_that_cannot_be_built_is_an_error_of_ours(setting: Setting) -> None:
    def build() -> Work:
        raise ValueError("bad shape")

    result: Result = runner(setting).run([Case(Point("linear", "toy", "x", 1, 1), 1, build)])
    assert result.wrong == ["linear toy x: ValueError: bad shape"]


@pytest.mark.parametrize("where", ["built", "judged", "timed"])
def test_what_does_not_fit_is_left_out_and_is_no_fault(where: str, setting: Setting) -> None:
    calls = []

    def call(i: int) -> torch.Tensor:
        calls.append(i)
        if where != "timed" or len(calls) > 1:
            raise torch.OutOfMemoryError("2 GiB wanted")
        return torch.zeros(1)

    def build() -> Work:
        if where == "built":
            raise torch.OutOfMemoryError("2 GiB wanted")
        return Work([Variant(OURS, lambda: call, lambda given: 0.0, own=True)], 0.0, 0.0, 1, ("wall",), {})

    result = runner(setting).run([Case(Point("linear", "toy", "x", 1, 1), 1, build)])
    assert not result.wrong and not result.figures()
    if where == "judged":
        assert [line["problem"].partition(":")[0] for line in result.lines] == ["does not fit in memory"]
    else:
        assert result.left_out == ["linear toy x"]


def test_every_line_is_kept_as_soon_as_it_is_there(setting: Setting) -> None:
    kept: list[dict[str, Any]] = []
    case = planted(variant(OURS, 0, own=True), variant("wrong", 2))
    result = runner(setting, keep=kept.append).run([case])
    assert kept == result.lines and json.dumps(kept)


def test_a_capture_that_fails_falls_back_to_the_queue(setting: Setting) -> None:
    class Clock(timing.WallClock):
        def sampler(self, call: Any, sets: int, way: str) -> Any:
            if way == "graph":
                raise RuntimeError("capturing")
            return super().sampler(call, sets, way)

    case = Case(Point("linear", "toy", "x", 1, 1), 1, lambda: Work([variant(OURS, 0)], 1.0, 1.0, 1, ("graph", "wall")))
    result = replace(runner(setting), clock=Clock()).run([case])
    assert [line["timed"] for line in result.figures()] == ["queue"]
    assert result.figures()[0]["us_with_launch"] > 0


@pytest.mark.usefixtures("small_ceilings")
@pytest.mark.filterwarnings("default")  # a peer may warn
def test_the_kernels_pass_their_gates_in_the_interpreter(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a GPU would run: the same cases over the Triton path, in fp16, whose rounding the interpreter has right."""
    monkeypatch.setattr(suite.machine, "cache_bytes", lambda device: 1)
    from fourbit.kernels import matmul4bit_triton

    for constant, value in {"COLUMNS": 32, "WARPS": 2, "COPIES": 4}.items():
        monkeypatch.setattr(matmul4bit_triton, constant, value)
    small = replace(grid, projections=grid.projections[:1], rows=(3,), dtype=torch.float16)
    pattern = "^(dequantize|linear|grouped|lora_cost|adamw(8bit)? toy adapter r=)|qlora.* p=0.05"
    if torch.cuda.is_available():
        pytest.skip("kernels run compiled where there is a GPU; `python -m benchmarks` gates them there")
    with dispatch.force_path("triton"):
        code, lines = run(["--only", pattern], small, tmp_path / "out")
    assert code == 0, capsys.readouterr().out
    ops = {line["op"] for line in report.figures_of(lines) if line["variant"] == OURS}
    assert ops == {"dequantize", "linear", "lora_cost", "qlora", "adamw", "adamw8bit"}
