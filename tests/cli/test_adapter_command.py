"""`fourbit adapter`: show, diff, resize."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit

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


def test_an_adapter_is_extracted_from_two_models(here: Path, typed: Typed, as_json: AsJson) -> None:
    """Of a whole training, and the model with it is the tuned one."""
    model, tokenizer = fourbit.load("m")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                torch.manual_seed(0)
                parameter += torch.randn(len(parameter), 3) @ torch.randn(3, parameter.shape[1]) / 30
    fourbit.save_model(model, "tuned", tokenizer)
    values = as_json("adapter extract m tuned --rank 3 --out made")
    assert len(values["layers"]) == 6 and all(layer["error"] < 1e-3 for layer in values["layers"].values())
    again, _ = fourbit.load("m")
    fourbit.load_adapter(again, "made")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show", "what must be show DIR, diff A B, resize DIR or extract BASE TUNED, got ('show',)"),
        ("diff a", "what must be show DIR"),
        ("look run", "what must be show DIR"),
        ("show run --rank 3", "show writes nothing: leave out --rank and --out"),
        ("resize run --rank 3", "resize takes --rank and --out"),
        ("resize run --rank 0 --out x", "--rank must be at least 1"),
        ("extract q m --rank 2 --out x", "extract takes dense models, and q is in 4 bits"),
        ("extract m m --rank 2 --out x", "differs in no linear layer: there is nothing to extract"),
        ("show nowhere", "'nowhere' is no folder; an adapter is a folder with"),
    ],
)
def test_what_is_refused(here: Path, typed: Typed, line: str, message: str) -> None:
    if " q " in line:
        typed("quantize --model m --out q")
    assert message in typed(f"adapter {line}", code=2)
