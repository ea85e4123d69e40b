"""The vision example: a 4-bit ViT, LoRA and a fresh head learn in one's own loop, and all of it is saved."""

import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file

FILE = Path(__file__).parents[2] / "examples" / "vision" / "classify.py"


def test_it_learns_and_saves_lora_and_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("vision_classify", FILE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(str(tmp_path), steps=30)
    assert before < 0.4 and after > 0.8
    assert f"right answers: {before:.1%} before, {after:.1%} after" in capsys.readouterr().out
    saved = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} < saved
    assert sum("patch_embeddings.projection.lora_A" in key for key in saved) == 1
