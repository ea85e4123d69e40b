"""Tokenizers from Hugging Face folders: the files that may hold each thing, the traps in them, and bad files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fourbit.errors import InputError
from fourbit.models.tokenizer_folder import folder_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = len(LETTERS) + 2, len(LETTERS) + 3


def backend() -> tokenizers.Tokenizer:
    """A byte-level tokenizer with every trap switched on: added BOS, truncation, padding, trimmed offsets."""
    vocab = {letter: id for id, letter in enumerate([*LETTERS, "he", "Ġhe"])}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "he")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    adds_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    built.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), adds_bos])
    built.enable_truncation(4)
    built.enable_padding(length=16)
    return built


def write(folder: Path, **files: Any) -> Path:
    """A folder with tokenizer.json and `files` (name without .json -> object; None leaves one out)."""
    everything = {"tokenizer": json.loads(backend().to_str()), **files}
    for name, content in everything.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": "T"}


def test_everything_is_gathered(tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer_config=CONFIG))
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<s>", BOS)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", EOS)
    assert (tokenizer.pad_token, tokenizer.pad_id) == (None, None)
    assert tokenizer.chat_template == "T"
    assert tokenizer.stop_ids == (EOS,)
    assert tokenizer.vocab_size == EOS + 1


def test_nothing_is_added_cut_off_padded_or_trimmed(tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(write(tmp_path))
    text = "he he he he he</s>"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert [text[start:end] for start, end in offsets] == ["he", " he", " he", " he", " he", "</s>"]
    assert tokenizer.decode(ids) == "he he he he he"


def test_dropout_in_the_file_does_not_make_encoding_random(tmp_path: Path) -> None:
    data = json.loads(backend().to_str())
    data["model"]["dropout"] = 0.9
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer=data))
    assert {tuple(tokenizer.encode("he he he")) for _ in range(20)} == {(BOS - 2, BOS - 1, BOS - 1)}


def test_older_names_of_special_tokens_are_read(tmp_path: Path) -> None:
    older = {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "pad_token": "</s>"}
    tokenizer = folder_tokenizer(write(tmp_path, special_tokens_map=older, tokenizer_config={"eos_token": "</s>"}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (BOS, EOS, EOS)  # the config wins for eos


@pytest.mark.parametrize(("value", "stops"), [(7, (7, EOS)), ([9, 7, 9], (7, 9, EOS)), ([], (EOS,)), (None, (5, EOS))])
def test_stop_ids_come_from_the_generation_config_then_the_config(value: Any, stops: Any, tmp_path: Path) -> None:
    files = {"generation_config": {"eos_token_id": value}, "config": {"eos_token_id": 5}}
    assert folder_tokenizer(write(tmp_path, tokenizer_config=CONFIG, **files)).stop_ids == stops


def test_the_template_file_wins_and_of_named_templates_the_default_one(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]
    write(tmp_path, tokenizer_config=CONFIG | {"chat_template": named})
    assert folder_tokenizer(tmp_path).chat_template == "A"
    (tmp_path / "chat_template.jinja").write_text("\ufeffC é", encoding="utf-8")
    assert folder_tokenizer(tmp_path).chat_template == "C é"


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(tmp_path)
    ours = folder_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.chat_template) == (BOS, EOS, EOS, "{{ messages }}")
    for text in ("he said: 12 é😀", "<s>he</s> he", "", " \n "):
        assert ours.encode(text) == fast(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


def test_a_sentencepiece_style_tokenizer_json_is_read(tmp_path: Path) -> None:
    """Llama 2's kind: blanks as U+2581, a blank put before the text, unknown bytes as <0xNN>."""
    vocab = {
        "<unk>": 0,
        **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)},
        "▁": 257,
        "h": 258,
        "e": 259,
        "▁he": 260,
        "he": 261,
    }
    built = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("h", "e"), ("▁", "he")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    tokenizer = folder_tokenizer(write(tmp_path, tokenizer=json.loads(built.to_str())))
    assert tokenizer.encode("he he") == [260, 260]
    ids, offsets = tokenizer.encode_with_offsets("he é")
    assert tokenizer.decode(ids) == "he é" and offsets[0] == (0, 2) and offsets[-2:] == [(3, 4), (3, 4)]


# ---- bad files


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs tokenizer\.json, found none"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(InputError, match=r"found only tokenizer.model.*AutoTokenizer.from_pretrained"):
        folder_tokenizer(tmp_path)


RAW: dict[str, tuple[str, bytes, str]] = {
    "tokenizer.json empty": ("tokenizer.json", b"", "not a readable tokenizer"),
    "tokenizer.json no JSON": ("tokenizer.json", b"{", "not a readable tokenizer"),
    "tokenizer.json an array": ("tokenizer.json", b"[]", "not a readable tokenizer"),
    "tokenizer.json without model": ("tokenizer.json", b'{"version": "1.0"}', "not a readable tokenizer"),
    "tokenizer.json not UTF-8": ("tokenizer.json", b'{"version": "\xff"}', "must be UTF-8"),
    "tokenizer.json nested deep": ("tokenizer.json", b"[" * 20000, "not a readable tokenizer"),
    "config no JSON": ("tokenizer_config.json", b"{'a': 1}", "must be JSON"),
    "config an array": ("tokenizer_config.json", b"[]", "must be a JSON object"),
    "config nested deep": ("tokenizer_config.json", b'{"a":' * 20000, "must be JSON"),
    "config not UTF-8": ("tokenizer_config.json", b'{"bos_token": "\xff"}', "must be UTF-8"),
    "generation config no JSON": ("generation_config.json", b"eos", "must be JSON"),
    "template not UTF-8": ("chat_template.jinja", b"\xff\xfe{\0", "must be UTF-8"),
    "template of 1 MiB + 1": ("chat_template.jinja", b"x" * ((1 << 20) + 1), "at most 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", RAW)
def test_an_unreadable_file_is_named(case: str, tmp_path: Path) -> None:
    name, raw, expected = RAW[case]
    (write(tmp_path) / name).write_bytes(raw)
    with pytest.raises(InputError) as caught:
        folder_tokenizer(tmp_path)
    assert expected in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 1000


VALUES: dict[str, tuple[str, Any, str]] = {
    "bos a number": ("tokenizer_config", {"bos_token": 3}, "bos_token must be a string"),
    "eos an object without content": ("tokenizer_config", {"eos_token": {"content": 1}}, "eos_token must be a string"),
    "eos unknown": ("tokenizer_config", {"eos_token": "<|eos|>"}, "eos_token is '<|eos|>', which is not in"),
    "a template's name a list": ("tokenizer_config", {"chat_template": [{"name": [], "template": "x"}]}, "only ['[]']"),
    "template a number": ("tokenizer_config", {"chat_template": 3}, "chat_template must be a string"),
    "templates without default": (
        "tokenizer_config",
        {"chat_template": [{"name": "rag", "template": "x"}]},
        "only ['rag']",
    ),
    "a token only the config knows": (
        "tokenizer_config",
        {"added_tokens_decoder": {"300": {"content": "<|new|>"}}},
        "added token 300 ('<|new|>') is not in tokenizer.json",
    ),
    "an added token of no shape": ("tokenizer_config", {"added_tokens_decoder": {"300": 3}}, "added token 300 (None)"),
    "stop ids as text": ("generation_config", {"eos_token_id": ["</s>"]}, "eos_token_id must be a token id or a list"),
    "stop id true": ("generation_config", {"eos_token_id": True}, "eos_token_id must be a token id or a list"),
    "stop id outside": ("generation_config", {"eos_token_id": [10**6]}, "stop token id 1000000 lies outside"),
    "stop id negative": ("generation_config", {"eos_token_id": -1}, "stop token id -1 lies outside"),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_bad_value_is_named(case: str, tmp_path: Path) -> None:
    name, content, expected = VALUES[case]
    write(tmp_path, **{name: content})
    with pytest.raises(InputError) as caught:
        folder_tokenizer(tmp_path)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_fifo_in_the_folder_does_not_hang(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "chat_template.jinja":  # no regular file: as if absent
        assert folder_tokenizer(tmp_path).chat_template is None
        return
    with pytest.raises(InputError, match="needs"):
        folder_tokenizer(tmp_path)


JSON = backend().to_str().encode()
CHANGES = st.lists(st.tuples(st.integers(0, len(JSON) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=200)
@given(CHANGES)
def test_a_changed_tokenizer_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    raw = bytearray(JSON)
    for at, value in changes:
        raw[at] = value
    folder = tmp_path_factory.getbasetemp()
    (folder / "tokenizer.json").write_bytes(bytes(raw))
    try:
        tokenizer = folder_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("he 12 é😀</s>"))
    except InputError:
        pass
