"""`fourbit plan`: quick, and from little."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fourbit.cli.main import main
from fourbit.trainer.planner import Case

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


def test_a_plan_that_fits_the_smallest_card_looks_for_no_way_to_less(
    config_only: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, step = list[str](), Case._step
    monkeypatch.setattr(Case, "_step", lambda case, keep, layers: asked.append(keep) or step(case, keep, layers))
    flags = ["--device", "cuda", "--lengths", "64", "--json"]
    assert main(["plan", "--model", config_only, *flags, "--memory", "24GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {*asked} == {"products"} and {*found["fits"].values()} == {"as it is"} and not found["saves"]
    assert main(["plan", "--model", config_only, *flags, "--memory", "5GiB"]) == 0
    assert {*asked} >= {"products", "input"} and json.loads(capsys.readouterr().out)["saves"]


def test_a_plan_of_a_run_s_settings_trains_nothing(here: Path, typed: Any) -> None:
    typed("sft --model m --data rows.jsonl --steps 1 --out run")
    assert "dry_run" not in (here / "run" / "config.yaml").read_text()
    (here / "old.yaml").write_text("dry_run: false\n")  # as runs wrote once
    for line in ("run/config.yaml", "old.yaml --model m --data rows.jsonl", "run/config.yaml --no-dry-run"):
        assert "peak" in typed(f"plan {line} --out new") and not (here / "new").exists()


def test_the_plan_in_the_readme_is_what_is_printed(config_only: str) -> None:
    """By a process of its own, as a reader's is: after most of the suite one counted half as many operations."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.partition("$ fourbit plan --model M ")[2]
    flags, _, rest = shown.partition("\n")
    command = [sys.executable, "-P", "-m", "fourbit", "plan", "--model", config_only, *flags.split()]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert printed.strip() == rest.partition("\n```")[0]


def test_rows_of_lengths_share_nothing(config_only: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "--model", config_only, "--lengths", "3", "--batch-size", "600", "--steps", "2", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["tokens"] == 3 * 600 * 2


@pytest.mark.parametrize(("given", "words"), [(["--lengths", "1"], "300,2000"), (["--data", "a"], "leave out lengths")])
def test_lengths_are_numbers_and_stand_for_data(
    given: list[str], words: str, config_only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", config_only, "--lengths", "9", *given]) == 2
    assert words in capsys.readouterr().err
