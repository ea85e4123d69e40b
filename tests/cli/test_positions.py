"""Texts that are longer than the model was made for are told: once, before the run, by every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Typed = Callable[..., str]
TRAINED = "--out o --steps 1 --rank 2"


@pytest.fixture
def short(here: Path) -> Path:
    """The folder's model `short`, made for 60 tokens; rows for preferences and prompts."""
    shutil.copytree(here / "m", here / "short")
    config = json.loads((here / "short" / "config.json").read_text())
    (here / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    (here / "pairs.jsonl").write_text('{"prompt": "ab", "chosen": "cd", "rejected": "e"}\n' * 4)
    row = {"messages": [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}]}
    (here / "long.jsonl").write_text((here / "rows.jsonl").read_text() + json.dumps(row) + "\n")
    (here / "prompt.jsonl").write_text('{"prompt": "ab"}\n')
    return here


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f"sft --model short --data long.jsonl {TRAINED}", "go beyond the model's 60 positions"),
        (f"sft --model short --data rows.jsonl --max-length 99 {TRAINED}", "up to 99 tokens go beyond the model's 60"),
        (f"dpo --model short --data pairs.jsonl --max-length 99 {TRAINED}", "up to 99 tokens go beyond the model's 60"),
        (f"reward --model short --data pairs.jsonl --max-length 99 {TRAINED}", "tokens go beyond the model's 60"),
        (f"distill --model m --teacher short --data long.jsonl {TRAINED}", "go beyond the teacher's 60 positions"),
        ("eval --model short --data long.jsonl --match none", "go beyond the model's 60 positions"),
        ("generate --model short prompt.jsonl --out a.jsonl --max-new-tokens 98", "go beyond the model's 60 positions"),
    ],
)
def test_a_text_beyond_the_positions_is_told_once(short: Path, typed: Typed, line: str, what: str) -> None:
    printed = typed(line)
    assert what in printed and printed.count("go beyond") == 1


@pytest.mark.parametrize(
    "line",
    [
        f"sft --model m --data long.jsonl {TRAINED}",
        f"sft --model short --data prompts.jsonl --max-length 60 {TRAINED}",
        "generate --model short prompt.jsonl --out a.jsonl --max-new-tokens 2",
    ],
)
def test_what_the_model_was_made_for_is_not_told(short: Path, typed: Typed, line: str) -> None:
    (short / "prompts.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n')
    assert "go beyond" not in typed(line)
