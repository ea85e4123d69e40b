"""A folder with a model and rows to be in, and the command line run there as its users type it."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fourbit.cli import generate
from fourbit.cli.main import main

Typed = Callable[..., str]


@pytest.fixture
def here(tiny_folder: Path, rows: Path, val_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model `m`, 22 rows to train on and 6 to validate with, under names of their own."""
    for name, target in (("m", tiny_folder), ("rows.jsonl", rows), ("val.jsonl", val_rows)):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def typed(here: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs a command line that ends with `code`; gives what it printed, stderr before stdout, or stdout alone."""

    def run(line: str, *, code: int = 0, out: bool = False) -> str:
        capsys.readouterr()
        ended = main(shlex.split(line))
        printed = capsys.readouterr()
        assert ended == code, printed.err
        return printed.out if out else printed.err + printed.out

    return run


@pytest.fixture
def as_json(typed: Typed) -> Callable[[str], dict[str, Any]]:
    """The one line that --json leaves on stdout."""

    def run(line: str) -> dict[str, Any]:
        (shown,) = typed(f"{line} --json", out=True).splitlines()
        values: dict[str, Any] = json.loads(shown)
        return values

    return run


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers whose last token counts as their end: a tiny model seldom draws one."""
    made = generate.sample_each
    monkeypatch.setattr(generate, "sample_each", lambda *a, **k: (replace(one, ended=True) for one in made(*a, **k)))
