"""`fourbit plan`: quick, and from little."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fourbit.cli.main import main

LLAMA = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
TICKETS = Path(__file__).parents[2] / "examples" / "tickets" / "train.jsonl"


def test_a_plan_is_made_in_seconds(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.process_time()
    assert main(["plan", "--model", str(smollm2), "--data", str(TICKETS)]) == 0
    assert time.process_time() - begun < 10  # 13 with torch's fake tensors, 4 to 6 here
    assert "fits 8 GiB" in capsys.readouterr().out


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("config-only")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


def test_a_config_alone_does(config_only: str, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> dict[str, Any]:
        common = [
            "plan",
            "--model",
            config_only,
            "--device",
            "cuda",
            "--memory",
            "24GiB",
            "--batch-size",
            "16",
            "--json",
        ]
        assert main([*common, *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = said("--lengths", "1000,4000")
    assert found["tokens"] == 16 * (1000 + 4000)
    assert found["parts"]["base"] > 4e9 and found["peak_bytes"] <= 24 << 30
    assert found["fits"]["80 GiB"] == "as it is" and "--checkpointing on" in found["fits"]["12 GiB"]
    huge = said("--lengths", "4000", "--full")
    assert huge["fits"]["8 GiB"].startswith("does not fit: ") and huge["fits"]["8 GiB"].endswith(" GiB at least")


@pytest.mark.parametrize(("given", "words"), [(["--lengths", "1"], "300,2000"), (["--data", "a"], "leave out lengths")])
def test_lengths_are_numbers_and_stand_for_data(
    given: list[str], words: str, config_only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", config_only, "--lengths", "9", *given]) == 2
    assert words in capsys.readouterr().err
