"""`fourbit adapter`: show, diff, resize."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Typed, AsJson = Callable[..., str], Callable[[str], dict[str, Any]]


@pytest.fixture
def run(typed: Typed) -> str:
    """The folder of a trained run."""
    typed("sft --model m --data rows.jsonl --steps 2 --lr 1e-2 --rank 6 --out run")
    return "run"


def test_an_adapter_is_shown_compared_and_made_smaller(run: str, typed: Typed, as_json: AsJson) -> None:
    """By its files alone; what is smaller still answers, with its template."""
    values = as_json(f"adapter show {run}")
    assert values["kind"] == "lora" and values["base_form"] == "nf4" and values["dead"] == []
    assert len(values["layers"]) == 14 and {layer["rank"] for layer in values["layers"].values()} == {6}
    assert values["norm"] ** 2 == pytest.approx(sum(layer["norm"] ** 2 for layer in values["layers"].values()))
    said = typed(f"adapter show {run}", out=True)
    assert "model.layers.1.mlp.down_proj" in said and "effective_rank" in said
    made = as_json(f"adapter resize {run} --rank 2 --out small")
    assert {layer["rank"] for layer in made["layers"].values()} == {2}
    assert Path("small/chat_template.jinja").read_bytes() == Path("run/chat_template.jinja").read_bytes()
    apart = as_json(f"adapter diff {run} small")
    for path, layer in apart["layers"].items():
        assert layer["difference"] == pytest.approx(made["layers"][path]["error"] * layer["a"], rel=1e-3, abs=1e-7)
    assert "note" not in typed("eval --model m --adapter small --data val.jsonl --match none").replace("note: tr", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show", "what must be show DIR, diff A B or resize DIR, got ('show',)"),
        ("diff a", "what must be show DIR"),
        ("look run", "what must be show DIR"),
        ("show run --rank 3", "show writes nothing: leave out --rank and --out"),
        ("resize run --rank 3", "resize takes --rank and --out"),
        ("resize run --rank 0 --out x", "--rank must be at least 1"),
        ("show nowhere", "'nowhere' is no folder; an adapter is a folder with"),
    ],
)
def test_what_is_refused(here: Path, typed: Typed, line: str, message: str) -> None:
    assert message in typed(f"adapter {line}", code=2)
