"""What came with the base leaves with a whole model that is saved: tokenizer, template, and where answers end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from fourbit.models.decoder import Decoder
from fourbit.models.generate import generate
from fourbit.models.gguf_tokenizer import gguf_tokenizer
from fourbit.models.load import load, load_tokenizer
from fourbit.models.save import save_model
from fourbit.text.tokenizer import Tokenizer

WORDS = ["t", "1", *(f"t{i}" for i in range(1, 93)), "<s>", "</s>", "<end>"]
BOS, EOS, END = 94, 95, 96
SAMPLING = {"do_sample": False, "temperature": 0.6, "max_length": 77}


def backend() -> Backend:
    made = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "t"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in WORDS[BOS:]])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    return made


def first_new(answer: list[int]) -> int:
    """A token of an answer that comes late and was not there before."""
    return next(token for i, token in enumerate(answer) if i > 1 and token not in answer[:i])


@pytest.fixture
def base(oracle: Callable[..., Any], tmp_path: Path) -> tuple[Path, list[int], int]:
    """A folder as transformers leaves it, a prompt, and the token that its generation config alone says ends answers:
    one that the model comes to.
    """
    folder = tmp_path / "base"
    oracle("tied", seed=3).save_pretrained(folder)
    backend().save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "t", "model_max_length": 99}
    told |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00\xff")
    model, _ = load(folder)
    prompt = [5, 17, 60]
    stop = first_new(generate(model, [prompt], max_new_tokens=30)[0])
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": [EOS, stop]}))
    return folder, prompt, stop


def stops_as_transformers(folder: Path, prompt: list[int]) -> list[int]:
    """The answer of a saved model: ours, and that of transformers' `generate`, which ends at the same token."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(folder)
    answer = generate(model, [prompt], max_new_tokens=30, stop_ids=tokenizer.stop_ids)[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0].tolist()
    assert ids[len(prompt) : -1] == answer and ids[-1] in tokenizer.stop_ids
    return answer


def test_what_came_with_a_folder_leaves_with_the_result(base: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, prompt, stop = base
    out = tmp_path / "out"
    model, tokenizer = load(folder)
    save_model(model, out, tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    generation, config = (json.loads((out / f"{name}config.json").read_text()) for name in ("generation_", ""))
    assert generation.items() >= (SAMPLING | {"eos_token_id": [EOS, stop], "bos_token_id": BOS}).items()
    assert config["eos_token_id"] == [EOS, stop] and config["bos_token_id"] == BOS
    assert len(stops_as_transformers(out, prompt)) < 30
    theirs, before = (AutoTokenizer.from_pretrained(path) for path in (out, folder))
    assert theirs("t3 t4</s>").input_ids == before("t3 t4</s>").input_ids
    assert theirs("t3").input_ids[0] == BOS and theirs.model_max_length == 99
    assert theirs.chat_template == before.chat_template


def test_what_came_with_a_gguf_file_leaves_with_the_result(
    oracle: Callable[..., Any], ours: Callable[..., Decoder], tmp_path: Path
) -> None:
    model, prompt = ours(oracle("tied", seed=3)), [5, 17, 60]
    model.source = str(tmp_path / "base.gguf")
    stop = first_new(generate(model, [prompt], max_new_tokens=30)[0])
    metadata: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": WORDS, "merges": ["t 1"]}
    metadata |= {"token_type": np.array([1] * 94 + [3] * 3), "bos_token_id": BOS, "eos_token_id": EOS}
    metadata |= {"eot_token_id": stop}
    given = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | {"tokenizer.chat_template": "{{ 1 }}"}
    save_model(model, tmp_path / "out", gguf_tokenizer(given))
    assert len(stops_as_transformers(tmp_path / "out", prompt)) < 30
    again = load_tokenizer(tmp_path / "out")
    assert again.stop_ids == tuple(sorted((EOS, stop))) and again.chat_template == "{{ 1 }}"
    assert (again.bos_id, again.eos_id) == (BOS, EOS)


def test_the_template_of_the_training_takes_the_place_of_the_base_s(base: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = load(base[0])
    out = tmp_path / "out"
    save_model(model, out, tokenizer, template="{{ 'trained' }}")
    assert load_tokenizer(out).chat_template == AutoTokenizer.from_pretrained(out).chat_template == "{{ 'trained' }}"
    save_model(model, out, tokenizer)  # and one that is saved over it has its own
    assert load_tokenizer(out).chat_template == tokenizer.chat_template


def test_a_base_that_is_gone_or_broken_costs_no_result(base: Any, tmp_path: Path) -> None:
    folder, prompt, _ = base
    model, tokenizer = load(folder)
    (folder / "generation_config.json").write_text("{")
    (folder / "tokenizer.json").unlink()
    save_model(model, tmp_path / "out", tokenizer)
    again = load_tokenizer(tmp_path / "out")
    assert again.stop_ids == tokenizer.stop_ids and again.chat_template == tokenizer.chat_template
    assert len(stops_as_transformers(tmp_path / "out", prompt)) < 30


def test_a_tokenizer_without_special_tokens_names_none(ours: Callable[..., Decoder], tmp_path: Path) -> None:
    save_model(ours("tied"), tmp_path, Tokenizer(Backend(models.BPE({"a": 0}, []))))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] is None and load(tmp_path)[1].stop_ids == ()
