"""Saving a whole model: a folder that we and transformers read back to the bit, in one file or several, or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends

from fourbit import files
from fourbit.errors import DiskError, InputError, NumericError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.quantize import quantize_
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.load import load
from fourbit.models.save import save_model
from fourbit.models.tokenizer import Tokenizer

Oracle = Callable[..., Any]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(Backend(backends.BPE({"a": 0, "b": 1}, [])), eos_token="b", chat_template="{{ messages }}")


def ours(theirs: Any) -> Decoder:
    model = Decoder(read_spec(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    return model


@pytest.mark.parametrize("shard_bytes", [1 << 30, 25_000])
def test_a_saved_model_comes_back(
    oracle: Oracle, kind: str, tokenizer: Tokenizer, shard_bytes: int, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    theirs = oracle(kind)
    model = ours(theirs)
    save_model(model, tokenizer, tmp_path / "new" / "folder", shard_bytes=shard_bytes)
    folder = tmp_path / "new" / "folder"
    weights = sorted(folder.glob("*.safetensors"))
    assert (len(weights) > 1) == (shard_bytes == 25_000) == (folder / "model.safetensors.index.json").exists()
    assert all(path.stat().st_size < shard_bytes + 3000 for path in weights)  # a header beside the tensors
    again, words = load(folder)
    assert again.spec == model.spec and again.settings() == model.settings()
    assert (words.eos_token, words.chat_template) == ("b", "{{ messages }}") and words.encode("ab") == [0, 1]
    peer = LlamaForCausalLM.from_pretrained(folder)
    expected = theirs.state_dict()
    for state in (again.state_dict(), peer.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    torch.testing.assert_close(peer(torch.arange(20)[None]).logits, theirs(torch.arange(20)[None]).logits)


def test_what_an_earlier_save_left_does_not_win(oracle: Oracle, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = (ours(oracle("tied", seed=seed)) for seed in (0, 1))
    for model, shard_bytes in ((first, 1 << 30), (second, 25_000), (first, 1 << 30)):
        save_model(model, tokenizer, tmp_path, shard_bytes=shard_bytes)
        again, _ = load(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def spoiled(model: Decoder) -> Decoder:
    model.model.norm.weight.data[-1] = torch.inf
    return model


def adapted(model: Decoder) -> Decoder:
    attach(model, LoRAConfig(rank=2))
    return model


def quantised(model: Decoder) -> Decoder:
    quantize_(model)
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (spoiled, NumericError, "'model.norm.weight' holds NaN or infinity"),
        (adapted, InputError, "only a dense model without an adapter"),
        (quantised, InputError, "only a dense model without an adapter"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_model(
    oracle: Oracle, tokenizer: Tokenizer, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64}
    save_model(ours(oracle(**shape)), tokenizer, tmp_path, shard_bytes=25_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        save_model(change(ours(oracle(seed=1, **shape))), tokenizer, tmp_path, shard_bytes=25_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_old_weights_whole(
    oracle: Oracle, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(ours(oracle()), tokenizer, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(DiskError, match=r"could not write the model in .* No space left"):
        save_model(ours(oracle(seed=1)), tokenizer, tmp_path / "a")
    for path in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == len(list((tmp_path / "b").iterdir()))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "llama"
