"""Saving a whole model: a folder that we and transformers read back to the bit, in one file or several, or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from torch import nn

import fourbit
from fourbit import files
from fourbit.errors import DiskError, InputError, NumericError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.models.decoder import Decoder
from fourbit.models.load import load
from fourbit.models.save import save_model
from fourbit.text.tokenizer import Tokenizer

Oracle = Callable[..., Any]
Ours = Callable[..., Decoder]
BIG = 1 << 30


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(
        Backend(backends.BPE({"a": 0, "b": 1}, [])), named_tokens={"eos_token": "b"}, chat_template="{{ messages }}"
    )


@pytest.mark.parametrize("shard_bytes", [BIG, 25_000])
def test_a_saved_model_comes_back(
    oracle: Oracle, ours: Ours, kind: str, tokenizer: Tokenizer, shard_bytes: int, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    theirs = oracle(kind)
    model = ours(theirs)
    save_model(model, tmp_path / "new" / "folder", tokenizer, shard_bytes=shard_bytes)
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


def test_what_an_earlier_save_left_does_not_win(ours: Ours, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Nor does it stay, unless no index of ours names it."""
    from transformers import LlamaForCausalLM

    first, second = (ours("tied", seed=seed) for seed in (0, 1))
    tmp_path.joinpath("mine.safetensors").write_text("mine")
    for model, limit in zip([first, second] * 3, [BIG, 25_000, 25_000, 40_000, BIG, BIG], strict=True):
        save_model(model, tmp_path, tokenizer, shard_bytes=limit)
        again, _ = load(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (limit != BIG)
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {path.name for path in tmp_path.glob("*.safetensors")} == {*named, "mine.safetensors"}


def test_wrappers_leave_no_trace(oracle: Oracle, ours: Ours, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = ours(oracle("tied"))
    save_model(model, tmp_path / "a", tokenizer)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        save_model(wrapped, tmp_path / "b", tokenizer)
        for file in (tmp_path / "a").iterdir():
            assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_an_index_of_a_stranger_costs_no_file_but_shards(ours: Ours, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    names = ["../out.safetensors", "adapter_model.safetensors", "model-00001-of-00001.safetensors"]
    for name in names:
        folder.joinpath(name).write_text(name)
    index = folder / "model.safetensors.index.json"
    for text in (json.dumps({"weight_map": dict(zip("abc", names, strict=True))}), "broken"):
        index.write_text(text)
        save_model(ours(), folder, tokenizer)
        assert [folder.joinpath(name).exists() for name in names] == [True, True, False] and not index.exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.model.norm.weight.data[-1:].fill_(torch.inf), NumericError, r"norm.weight' holds NaN or infinity"),
        (lambda m: attach(m, LoRAConfig(rank=2)), InputError, r"q_proj' carries an adapter, .*fourbit\.remove_adapter"),
        *(
            (
                lambda m, dtype=dtype: m.register_buffer("own", torch.zeros(3).to(dtype)),
                InputError,
                rf"own \({dtype}\) is of a type that `load_model` does not read: cast it",
            )
            for dtype in (torch.float8_e4m3fn, torch.complex64, torch.int8)
        ),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_model(
    ours: Ours, tokenizer: Tokenizer, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64}
    save_model(ours(**shape), tmp_path, tokenizer, shard_bytes=25_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = ours(seed=1, **shape)
    change(model)
    with pytest.raises(error, match=message):
        save_model(model, tmp_path, tokenizer, shard_bytes=25_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("after", [BIG, 25_000])
@pytest.mark.parametrize("before", [BIG, 25_000])
def test_a_full_disk_leaves_the_old_weights_whole(
    ours: Ours, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Whichever of the new files it has no room for, and nothing of the new ones stays."""
    folder, new = tmp_path / "a", tmp_path / "b"
    save_model(ours(seed=1), new, tokenizer, shard_bytes=after)
    save_model(ours(), folder, tokenizer, shard_bytes=before)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    sync = files.sync
    for room in range(len(list(new.glob("model*")))):
        seen: list[Path] = []

        def full(path: Path, seen: list[Path] = seen, room: int = room) -> None:
            seen += [path] * path.is_file()
            if len(seen) > room:
                raise OSError(28, "No space left on device")
            sync(path)

        monkeypatch.setattr(files, "sync", full)
        with pytest.raises(DiskError, match=r"could not write the model in .* No space left"):
            save_model(ours(seed=1), folder, tokenizer, shard_bytes=after)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert json.loads(old["config.json"])["model_type"] == "llama"


@pytest.mark.parametrize("before", [BIG, 25_000])
def test_a_disk_that_fails_after_the_index_leaves_whole_weights(
    ours: Ours, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    first, second = (ours(seed=seed) for seed in (0, 1))
    save_model(first, tmp_path, tokenizer, shard_bytes=before)
    sync = files.sync

    def failing(path: Path) -> None:
        index = tmp_path / "model.safetensors.index.json"
        if path.is_dir() and index.exists() and not ({*json.loads(index.read_text())["weight_map"].values()} & old):
            raise OSError(5, "Input/output error")
        sync(path)

    old = {path.name for path in tmp_path.glob("*.safetensors")}
    monkeypatch.setattr(files, "sync", failing)
    with pytest.raises(DiskError, match="could not write the model"):
        save_model(second, tmp_path, tokenizer, shard_bytes=25_000)
    expected = first if before == BIG else second
    assert torch.equal(load(tmp_path)[0].lm_head.weight, expected.lm_head.weight)


def test_a_merged_save_is_what_merging_in_place_saves(tiny_folder: Path, tmp_path: Path) -> None:
    """One tensor at a time, dense; the model stays as it is; the head that an adapter changes is untied."""
    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4", dtype="bfloat16")
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, target=["q_proj", "down_proj", "lm_head"]), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fourbit.save_model(model, tmp_path / "streamed", tokenizer, merge=True, shard_bytes=30_000)
    assert len([*(tmp_path / "streamed").glob("model-*.safetensors")]) > 1
    assert isinstance(model.model.layers[0].self_attn.q_proj, fourbit.AdapterLayer)
    fourbit.save_model(fourbit.dequantize(fourbit.merge(model)), tmp_path / "whole", tokenizer)
    streamed, whole = (fourbit.load(tmp_path / name)[0].state_dict() for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys() and all(torch.equal(streamed[name], whole[name]) for name in whole)
    texts = [(tmp_path / name / "config.json").read_text() for name in ("streamed", "whole")]
    assert texts[0] == texts[1] and '"tie_word_embeddings": false' in texts[0]
