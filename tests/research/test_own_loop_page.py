"""docs/own-loop.md keeps its word: its blocks run, one after the other."""

import re
import runpy
import shutil
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "own-loop.md"


def test_the_page_runs(tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(rows, tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    assert len(blocks) == 4
    (tmp_path / "page.py").write_text("\n".join(blocks))
    runpy.run_path("page.py")
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\.\d+ \d\.\d+ \d+\.\d+ state/step-000006", first)
    assert second.startswith("6 ['") and third == "True"
