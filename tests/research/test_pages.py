"""Pages of the docs whose code blocks are one script: it runs, in a folder with a small model and rows."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PEERS = {
    "from-other-tools.md": ("peft", "bitsandbytes", "trl", "datasets"),
    "adapters.md": (),
    "own-adapter.md": (),
    "transformers-models.md": ("transformers",),
}


@pytest.mark.filterwarnings("ignore")  # what other tools warn of is theirs
@pytest.mark.parametrize("page", PEERS)
def test_the_page_runs(
    page: str, tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for peer in PEERS[page]:
        pytest.importorskip(peer)  # what the page compares with
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(rows, tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.S | re.M)
    assert len(blocks) >= 3
    (tmp_path / "page.py").write_text("\n".join(blocks))
    runpy.run_path("page.py")
