"""The README keeps its word: its example runs, its commands, flags and files exist."""

import importlib
import re
import runpy
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import fourbit
from fourbit.cli.config_file import read_config
from fourbit.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
KINDS = {name: importlib.import_module(f"fourbit.cli.{name}").Options for name in COMMANDS}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.S | re.M)
    return [text for name, text in found if name == language]


def test_the_library_example_runs(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) == 12
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(rows, tmp_path / "train.jsonl")
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py", run_name="__main__")
    assert re.match(r"loss \d+\.\d+:.* -> ", capsys.readouterr().out, flags=re.S)
    model, _ = fourbit.load(tmp_path / "model", quant_type="nf4")
    assert fourbit.load_adapter(model, tmp_path / "adapter") == fourbit.load_adapter(model, tmp_path / "run")


def test_the_yaml_example_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    assert KINDS["sft"](**read_config(str(tmp_path / "run.yaml"))[0]).lr == 2e-4


def test_commands_and_flags_exist() -> None:
    shell = "\n".join(blocks("sh"))
    assert set(re.findall(r"^fourbit (\w+)", shell, flags=re.M)) == set(COMMANDS)
    known = {field.name.replace("_", "-") for kind in KINDS.values() for field in fields(kind)}
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) - known <= {"help", "extra-index-url"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"^make ([a-z-]+)", shell, flags=re.M)) <= targets


def tree_of(block: str) -> set[str]:
    """The paths that a tree names: folders and files at its margin, files of the folder above them further in."""
    found, folder = set[str](), ""
    for line in filter(str.strip, block.splitlines()):
        inside, words = line.startswith(" "), line.split()
        names = [word for i, word in enumerate(words) if i == 0 or all(w.endswith(".py") for w in words[: i + 1])]
        folder = folder if inside else names[0] if names[0].endswith("/") else ""
        found |= {(folder if inside else "") + name for name in names}
    return found


def test_the_file_tree_is_the_tree() -> None:
    """Every file of the package has its line, and `x_triton.py` that of the `x.py` beside it."""
    (tree,) = [block for block in blocks("") if "__init__.py" in block]
    listed = tree_of(tree)
    assert {name for name in listed if not (ROOT / name).exists()} == set(), "named but not there"
    layers = sorted(
        path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("benchmarks", "build")
    )
    files = [*ROOT.glob("*.py"), *(path for layer in layers for path in (ROOT / layer).rglob("*.py"))]
    there = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py" or path.parent == ROOT}
    twins = {name for name in there if name.endswith("_triton.py") and name.replace("_triton.py", ".py") in there}
    assert there - twins - listed == set(), "not named in README's tree"
    assert {f"{layer}/" for layer in layers} | {"tests/", "benchmarks/", "examples/", "docs/"} <= listed


def test_a_tree_is_read_as_it_looks() -> None:
    tree = "a.py      one\n\nb/        two\n  c.py d.py  three of e.py\n  f/g.py   four\nh/        five\n"
    assert tree_of(tree) == {"a.py", "b/", "b/c.py", "b/d.py", "b/f/g.py", "h/"}


def test_files_that_contributing_names_are_there() -> None:
    named = set(re.findall(r"`([a-z_]+/[\w/.]+\.(?:py|md|json))`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 20 and {name for name in named if not (ROOT / name).exists()} == set()


def test_links_lead_somewhere() -> None:
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (ROOT / target).exists(), target
