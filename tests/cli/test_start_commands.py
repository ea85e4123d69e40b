"""`fourbit sft --start ...`: trained, evaluated, saved, loaded again, gone on with."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourbit.cli.main import main

Typed, AsJson = Callable[..., str], Callable[[str], dict[str, Any]]
SFT = "sft --model m --data rows.jsonl --val val.jsonl --steps 3 --lr 3e-3 --rank 4 --micro-batch 8"
TOKENS = "pissa --train-tokens '<|im_end|>'"
EVAL = "eval --model m --data val.jsonl --match none"


@pytest.mark.parametrize("start", ["pissa", "pissa-4 --quant none", "olora --quant none", "loftq-2", "eva", TOKENS])
def test_a_run_with_a_start_is_trained_saved_and_loaded_again(typed: Typed, as_json: AsJson, start: str) -> None:
    """The loss that training ended with is the loss of what the file gives back; each 4-bit layer's error is said."""
    said = typed(f"{SFT} --start {start} --out run --no-keep-best")
    errors = re.findall(r"^start: (\S+)  error (\S+), was (\S+)$", said, re.MULTILINE)
    assert len(errors) == (0 if "none" in start or start == "eva" else 14)
    assert all(float(error) < float(alone) for _, error, alone in errors)
    ended = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][-1]
    values = as_json(f"{EVAL} --adapter run")
    assert values["loss"] == pytest.approx(ended["val_loss"], rel=1e-5)
    assert values["loss"] < values["base_loss"]
    assert "note" not in typed(f"{EVAL} --adapter run").replace("note: training is", "")


@pytest.mark.parametrize("start", ["loftq-2", "eva"])
def test_a_resumed_run_starts_alike(typed: Typed, start: str) -> None:
    """Two steps and a resumed third are the three steps, bit for bit."""
    typed(f"{SFT} --start {start} --out whole --save-every 2 --schedule constant")
    typed(f"{SFT} --start {start} --out parts --save-every 2 --schedule constant --steps 2")
    typed(f"{SFT} --start {start} --out parts --save-every 2 --schedule constant --resume")
    one, other = (Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("whole", "parts"))
    assert one == other


def test_training_goes_on_from_one(typed: Typed, as_json: AsJson) -> None:
    """With the rank and the codes that it had."""
    typed(f"{SFT} --start pissa --out first")
    typed("sft --model m --adapter first --data rows.jsonl --steps 1 --out second")
    first, second = (json.loads(Path(folder, "adapter_config.json").read_text()) for folder in ("first", "second"))
    assert first["r"] == second["r"] == 8 and first == second
    assert as_json(f"{EVAL} --adapter second")["loss"] < as_json(f"{EVAL} --adapter second")["base_loss"]


def test_what_is_said_of_an_adapter_is_what_its_kind_has(typed: Typed) -> None:
    sft = "sft --model m --data rows.jsonl --steps 1 --quant none"
    for flags, said in (
        ("", "adapter: rank 16, alpha 32, 14 layers,"),
        ("--kind dora --rank 2", "adapter: dora, rank 2, alpha 32, 14 layers,"),
        ("--kind vera --rank 2", "adapter: vera, rank 2, 14 layers,"),
        ("--kind ia3", "adapter: ia3, 14 layers,"),
    ):
        assert said in typed(f"{sft} {flags} --out run{flags.replace(' ', '')}")


def test_what_a_start_refuses(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ("--start pizza", "--start must be default, olora, eva, pissa, pissa-8, loftq or loftq-5, got 'pizza'"),
        ("--start loftq --quant none", "makes up for 4 bits"),
        ("--start pissa --full", "full training has no adapter: leave out rank, start"),
    ):
        assert main([*SFT.split(), "--out", "o", *flags.split()]) == 2
        assert message in capsys.readouterr().err


def test_preferences_are_compared_with_the_model_that_a_start_stands_for(typed: Typed) -> None:
    """Without the adapter it is still there, so the first loss is ln 2; without it, it would be a rest of a weight."""
    pairs = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x"} for w in ("ab", "c", "def", "gh")]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    typed("dpo --model m --data pairs.jsonl --steps 1 --rank 4 --start pissa --out run")
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_start_in_a_folder_of_4_bits_is_refused_and_another_form_is_said(typed: Typed) -> None:
    typed("quantize --model m --out q")
    assert "give this model's own dense weights" in typed(
        "sft --model q --data rows.jsonl --steps 1 --start pissa --out run", code=2
    )
    typed("sft --model m --data rows.jsonl --steps 1 --rank 4 --start pissa --out run")
    assert "was trained on nf4; on the dense base it will be somewhat off" in typed(
        f"{EVAL} --adapter run --quant none"
    )
    assert "was trained on nf4; on nf4-nodq it will be" in typed(f"{EVAL} --adapter run --quant nf4-nodq")
