"""docs/numbers.md says what the result files say, and the levels the checks hold."""

import re

import pytest

from benchmarks import CHECKOUT, held_to, report

PAGE = (CHECKOUT / "docs" / "numbers.md").read_text()
RESULTS = CHECKOUT / "benchmarks" / "results"


def test_tables_are_those_of_the_files() -> None:
    names = re.findall(r"`benchmarks/results/(\S+\.jsonl)`", PAGE)
    assert len(names) == PAGE.count("```text") > 0
    for name in names:
        lines = report.read(RESULTS / name)
        assert f"```text\n{report.heading(lines)}\n\n{report.table(report.figures_of(lines))}\n```" in PAGE


def test_every_level_is_on_the_page_with_its_numbers() -> None:
    rows = PAGE.partition("| at least | aim |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    levels = [(float(row[1]), float(row[2].split()[0]) if row[2] else None) for row in cells]
    assert levels == [(check.least, check.aim) for check in held_to.CHECKS]


def test_every_committed_result_can_be_read() -> None:
    """Figures passed their gate, none of ours was refused, and each line says where it comes from."""
    paths = sorted(RESULTS.glob("*.jsonl"))
    assert paths
    for path in paths:
        lines = report.read(path)
        assert not [line for line in lines if line["kind"] == "refused" and line["variant"].startswith("ours")]
        for line in report.figures_of(lines):
            assert line["gate"] <= 1 and line["date"] and line["versions"]["torch"] and line["commit"]


@pytest.mark.parametrize(("length", "gflop"), [(2048, 32.1), (8192, 37.8)])
def test_the_steps_ceiling_is_counted_as_the_page_says(length: int, gflop: float) -> None:
    from benchmarks.shapes import LLAMA_8B
    from benchmarks.step import flops_a_token

    assert flops_a_token(LLAMA_8B, 16, length) / 1e9 == pytest.approx(gflop, abs=0.06)
