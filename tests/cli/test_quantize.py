"""4-bit folders at the command line: used as they are, and made."""

import json
import re
from pathlib import Path

import pytest

import fourbit
from fourbit.cli.main import main
from fourbit.lora.quantize import quantize_
from fourbit.models.plan import REPORT


def test_a_4bit_folder_is_used_as_it_is(
    tiny_folder: Path, val_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its form is not nf4, and a layer of it is dense; an adapter's training says so, and goes on with it."""
    model, tokenizer = fourbit.load(tiny_folder)
    fourbit.save_model(quantize_(model, "fp4", blocksize=32, skip=["up_proj", "lm_head"]), tmp_path / "q", tokenizer)
    common = ["--model", str(tmp_path / "q"), "--data", str(val_rows)]
    assert main(["sft", *common, "--out", str(tmp_path / "run"), "--steps", "1", "--rank", "2"]) == 0
    assert "4 bits as it has them and float32" in capsys.readouterr().err
    assert main(["eval", *common, "--adapter", str(tmp_path / "run"), "--max-new-tokens", "1"]) == 0
    said = capsys.readouterr().err
    assert "4 bits as it has them" in said and "somewhat off" not in said
    assert main(["eval", *common, "--quant", "nf4"]) == 2


def test_quantize_writes_a_folder_that_commands_take(
    tiny_folder: Path, val_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "--model", str(tiny_folder), "--dtype", "float32"]
    plan = tmp_path / "plan.json"
    plan.write_text('{"down_proj": {"quant_type": "fp4"}}')
    flags = ["--skip", "o_proj", "--head", "--blocksize", "32", "--quant", "nf4-nodq", "--plan", str(plan)]
    assert main([*command, "--out", str(tmp_path / "q"), *flags]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^model\.layers\.0\.self_attn\.o_proj  dense .* error 0\.0000$", said, re.MULTILINE)
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj +fp4/64 +[0-9,]+ bytes, error 0\.1", said, re.MULTILINE)
    assert "nf4-nodq/32" in said and re.search(r"^weights: [0-9,]+ bytes \(.* GiB\) in ", said, re.MULTILINE)
    assert main([*command, "--out", str(tmp_path / "r"), "--plan", str(tmp_path / "q" / REPORT), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == json.loads((tmp_path / "q" / REPORT).read_text())
    assert result["bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert main(["eval", "--model", str(tmp_path / "r"), "--data", str(val_rows), "--max-new-tokens", "1"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "4"], "--budget must be a size above 0 with a unit, such as 4.0GiB, got '4'"),
        (["--budget", "1KiB"], "budget must be at least "),
        (["--blocksize", "48"], "blocksize must be a power of two from 32 to 4096, got 48"),
        (["--skip", "nope"], "plan key 'nope' matches none of the "),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--quant", "none"], "--quant must be one of"),
        (["--head", "--skip", "lm_head"], "'lm_head' is named twice, of --skip, --head, --embedding and --plan"),
    ],
)
def test_what_quantize_refuses(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["quantize", "--model", str(tiny_folder), "--out", str(tmp_path / "q"), *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("q/*.safetensors"))


def test_quantize_keeps_what_is_there(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a model, or with anything else, before any work; a failed attempt is no hindrance."""
    command = ["quantize", "--model", str(tiny_folder), "--out", str(tmp_path / "q")]
    assert main([*command, "--budget", "1KiB"]) == 2 and main(command) == 0
    before = (tmp_path / "q" / "model.safetensors").read_bytes()
    assert main([*command, "--quant", "fp4"]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main([*command[:-1], str(tmp_path / "other")]) == 2 and "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == before
