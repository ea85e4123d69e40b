"""Comparisons on a CPU as docs/numbers.md shows them."""

import json
from pathlib import Path

import pytest

from benchmarks import CHECKOUT, compared

RUN = {
    "speed_ratio": 2.914,
    "rss_ratio": 0.523,
    "against": "peer:float32",
    "tokens_per_second": {"peer:bfloat16": 250.0, "ours:bfloat16": 860.5, "peer:float32": 306.0},
    "peak_rss": {"ours:bfloat16": 1},
    "versions": {"torch": "2.13.0"},
    "cpu": "AMD EPYC, AVX512",
}


def test_the_page_has_the_table_of_the_files() -> None:
    page = (CHECKOUT / "docs" / "numbers.md").read_text()
    found = compared.read(sorted(compared.FOLDER.glob("*.json")))
    assert compared.table(found) == page.partition("<!-- compared -->\n")[2].partition("\n<!-- end -->")[0]
    assert bool(found) == ("(../benchmarks/results/cpu/compared.svg)" in page) == compared.PICTURE.exists()


def test_generation_has_a_row_for_each_number_of_prompts(tmp_path: Path) -> None:
    rates = {"ours": (40.0, 400.0), "packed": (13.0, 90.0), "peer": (42.0, 180.0), "dense": (30.0, 200.0)}
    figures = {f"{name}_rows_{n}": pair[i] for i, n in enumerate((1, 8)) for name, pair in rates.items()}
    figures |= {f"ours_over_{name}_rows_{n}": 0.95 for n in (1, 8) for name in ("peer", "dense")}
    figures |= {f"{name}_peak_rss": 5 if name == "ours" else 10 for name in rates} | {"cpu": "X", "dtype": "float32"}
    (tmp_path / "generate_cpu.json").write_text(json.dumps(figures))
    rows = compared.table(compared.read([tmp_path / "generate_cpu.json"])).splitlines()[2:]
    assert rows == [
        "| generate_cpu, 1 rows: ours | 40 tokens/s | peer: 42 | 0.95x | 0.50x | X, float32 |",
        "| generate_cpu, 8 rows: ours | 400 tokens/s | dense: 200 | 0.95x | 0.50x | X, float32 |",
    ]


def test_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compared, "PICTURE", tmp_path / "made" / "compared.svg")
    (tmp_path / "sft_cpu-bf16.json").write_text(json.dumps(RUN))
    plain = {k: v for k, v in RUN.items() if k != "against"} | {"pairs_per_second": {"peer": 1.0, "ours": 3.5}}
    del plain["tokens_per_second"]
    (tmp_path / "dpo_cpu.json").write_text(json.dumps(plain))
    compared.main([str(tmp_path / name) for name in ("sft_cpu-bf16.json", "dpo_cpu.json")])
    rows = capsys.readouterr().out.splitlines()
    about = "0.52x | AMD EPYC, AVX512, 2.13.0 |"
    assert rows[2] == f"| sft_cpu-bf16: ours:bfloat16 | 860.5 tokens/s | peer:float32: 306 | 2.91x | {about}"
    assert rows[3] == f"| dpo_cpu: ours | 3.5 pairs/s | peer: 1 | 2.91x | {about}"
    once = compared.PICTURE.read_bytes()
    compared.main([str(tmp_path / name) for name in ("sft_cpu-bf16.json", "dpo_cpu.json")])
    assert once == compared.PICTURE.read_bytes() and b"<svg" in once
