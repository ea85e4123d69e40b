"""The folder that hostile cases begin with, and the process that runs them; both are made once a session."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))  # for harness and the tables

from harness import Case, Forks

PAIRS = '{"prompt": "hi", "chosen": "yo", "rejected": "no"}\n{"prompt": "ho", "chosen": "ye", "rejected": "na"}\n'
ROWS = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    process = Forks(tmp_path_factory.mktemp("streams"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def start(tiny_folder: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a folder `m` and a file `m.gguf`, rows, and what commands made of them: a run with a checkpoint and
    a reward model.
    """
    from gguf_bytes import tiny_gguf

    here = tmp_path_factory.mktemp("start") / "start"
    here.mkdir()
    shutil.copytree(tiny_folder, here / "m")
    (here / "good.jsonl").write_text(ROWS + ROWS.replace("hi", "ho"))
    (here / "pairs.jsonl").write_text(PAIRS)
    (here / "m.gguf").write_bytes(tiny_gguf(load_file(here / "m" / "model.safetensors"), here / "m"))
    common = ("--model", "m", "--steps", "2", "--save-every", "1", "--rank", "2")
    made = {
        "run": ("sft", *common, "--data", "good.jsonl", "--out", "run"),
        "rm": ("reward", *common, "--data", "pairs.jsonl", "--out", "rm"),
        "gguf": ("chat", "--model", "m.gguf"),
        "good": ("chat", "--model", "m", "--adapter", "run"),
    }
    for name, argv in made.items():
        outcome = forks.run(Case(name, lambda here: None, argv), here, seconds=120)
        assert outcome.code == 0, outcome.err.decode()
        forks.level = max(forks.level, outcome.peak_kib) if name == "good" else forks.level
    for name in ("tmp", "home"):
        shutil.rmtree(here / name, ignore_errors=True)
    shutil.rmtree(here / "run" / "tensorboard", ignore_errors=True)
    return here
