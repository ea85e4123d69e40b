"""4-bit folders at the command line: used as they are, and made."""

from pathlib import Path

import pytest

import fourbit
from fourbit.cli.main import main
from fourbit.lora.quantize import quantize_


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
