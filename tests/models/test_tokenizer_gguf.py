"""Tokenizers from made-up GGUF metadata: each pre-tokenizer's rule, whole tokens, and what is refused."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from fourbit.errors import InputError
from fourbit.models.gguf_tokenizer import gguf_tokenizer, tokenizer_metadata
from fourbit.models.save import save_tokenizer
from fourbit.text.tokenizer import Tokenizer
from fourbit.text.tokenizer_folder import folder_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 stand-ins for bytes
MERGES = ["h e", "Ġ he", "l l", "he ll"]
WORDS = ["he", "Ġhe", "ll", "hell", "Ġhello"]  # no merge makes the last one


def metadata(pre: Any = "gpt-2", extra: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """A vocabulary of bytes, a few words and `extra` tokens with their types; `keys` overrides, None takes away."""
    extra = {"<|end|>": 3, "<|im_end|>": 3, "<tool>": 4, "[PAD9]": 5} if extra is None else extra
    tokens = [*LETTERS, *WORDS, *extra]
    types = np.array([1] * (len(LETTERS) + len(WORDS)) + list(extra.values()), dtype=np.int32)
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": MERGES, **keys}
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return found | {"tokenizer.chat_template": keys.get("chat_template")}


NAMES = {name: id for id, name in enumerate(metadata()["tokenizer.ggml.tokens"])}


def build(pre: str = "gpt-2", **keys: Any) -> Tokenizer:
    return gguf_tokenizer(metadata(pre, **keys))


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


# ---- how each rule cuts text into words

CUTS: dict[str, dict[str, list[str]]] = {
    "gpt-2": {
        "a 1234 b": ["a", " 1234", " b"],
        "don't DON'T": ["don", "'t", " DON", "'", "T"],
        "hi!!\n\nyo": ["hi", "!!", "\n", "\n", "yo"],
        "(x) = y": ["(", "x", ")", " =", " y"],
        "a   b": ["a", "  ", " b"],
    },
    "smollm": {
        "a 1234 b": ["a", " ", "1", "2", "3", "4", " b"],
        "don't DON'T": ["don", "'t", " DON", "'", "T"],
        "x1!": ["x", "1", "!"],
    },
    "llama-bpe": {
        "a 1234 b": ["a", " ", "123", "4", " b"],
        "don't DON'T": ["don", "'t", " DON", "'T"],
        "hi!!\n\nyo": ["hi", "!!\n\n", "yo"],
        "(x) = y": ["(x", ")", " =", " y"],
        "a \n  b": ["a", " \n", " ", " b"],
    },
    "qwen2": {
        "a 1234 b": ["a", " ", "1", "2", "3", "4", " b"],
        "don't DON'T": ["don", "'t", " DON", "'T"],
        "hi!!\n\nyo": ["hi", "!!\n\n", "yo"],
    },
    "tekken": {
        "a 1234 b": ["a", " ", "1", "2", "3", "4", " b"],
        "don't DON'T": ["don", "'t", " DON", "'T"],
        "helloWorld HTTPServer": ["hello", "World", " HTTPServer"],
        "a/b/\n c": ["a", "/b", "/\n", " c"],
        "e\u0301te\u0301": ["e\u0301te\u0301"],
    },
    "gpt-4o": {
        "a 1234 b": ["a", " ", "123", "4", " b"],
        "don't DON'T we'll": ["don't", " DON'T", " we'll"],
        "helloWorld": ["hello", "World"],
        "hi!/\n\nyo": ["hi", "!/\n\n", "yo"],
    },
    "deepseek-coder": {
        "a 12\nb": ["a", " ", "1", "2", "\n", "b"],
        "x=(y), z": ["x", "=", "(", "y", "),", " z"],
        "\n\n": ["\n", "\n"],
        "日本 text": ["日本", " text"],
    },
    "default": {
        "a 1234 b": ["a", " ", "123", "4", " b"],
        "don't": ["don", "'", "t"],
        "(x) = y": ["(", "x", ")", " ", "=", " y"],
    },
}


@pytest.mark.parametrize(("pre", "text"), [(pre, text) for pre, cases in CUTS.items() for text in cases])
def test_words_are_cut_by_the_named_rule(pre: str, text: str) -> None:
    assert words(build(pre), text) == CUTS[pre][text]


OTHER_NAMES = dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm")
OTHER_NAMES |= dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), "llama-bpe")
OTHER_NAMES |= dict.fromkeys(("mpt", "phi-2", "trillion"), "gpt-2") | {"megrez": "qwen2", "llama4": "gpt-4o"}


@pytest.mark.parametrize(("name", "same"), OTHER_NAMES.items())
def test_other_names_of_a_rule(name: str, same: str) -> None:
    for text in CUTS[same]:
        assert words(build(name), text) == CUTS[same][text]


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "tekken", "smaug-bpe", "dbrx", "gpt-4o", "gpt-2"])
def test_llama3_takes_a_word_that_is_a_token_as_it_is(pre: str) -> None:
    """No merge leads to " hello"; Llama 3 (ignore_merges) finds it all the same, the others merge what they can."""
    tokens = build(pre).backend.encode(" hello").tokens
    assert tokens == (["Ġhello"] if pre in ("llama-bpe", "llama3", "tekken") else ["Ġhe", "ll", "o"])


def test_qwen2_composes_characters_and_no_other_rule_does() -> None:
    assert build("qwen2").decode(build("qwen2").encode("e\u0301")) == "\u00e9"
    assert build("llama-bpe").decode(build("llama-bpe").encode("e\u0301")) == "e\u0301"
    # The composed letter has the place of its base letter; the accent's own place belongs to no token.
    assert build("qwen2").encode_with_offsets("e\u0301x")[1] == [(0, 1), (0, 1), (2, 3)]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "default"])
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back_where_every_byte_has_a_token(pre: str, text: str) -> None:
    tokenizer = TOKENIZERS[pre]
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


TOKENIZERS = {pre: build(pre) for pre in ("gpt-2", "smollm", "llama-bpe", "default")}


# ---- tokens that are matched whole


def test_control_and_user_defined_tokens_are_whole_and_unused_ones_are_text() -> None:
    tokenizer = build()
    assert tokenizer.encode("he<|end|><tool>") == [NAMES["he"], NAMES["<|end|>"], NAMES["<tool>"]]
    assert NAMES["[PAD9]"] not in tokenizer.encode("[PAD9]")
    assert tokenizer.decode([NAMES["he"], NAMES["<|end|>"], NAMES["<tool>"]]) == "he<tool>"  # only control is special
    assert tokenizer.vocab_size == len(NAMES)


def test_whole_tokens_with_blanks_or_foreign_letters_keep_their_ids() -> None:
    tokenizer = build(extra={"<a b>": 4, "<｜end▁of▁sentence｜>": 3, "    ": 4, "<unk>": 2})
    text = "he<a b><｜end▁of▁sentence｜>    he"
    ids, offsets = tokenizer.encode_with_offsets(text)
    first = len(LETTERS) + len(WORDS)
    assert ids[1:4] == [first, first + 1, first + 2] and tokenizer.vocab_size == first + 4
    assert [text[start:end] for start, end in offsets[1:4]] == ["<a b>", "<｜end▁of▁sentence｜>", "    "]
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.encode("<unk>") == [first + 3]


def test_stop_ids_are_eos_end_of_turn_and_what_the_template_ends_turns_with() -> None:
    end, im_end, tool = NAMES["<|end|>"], NAMES["<|im_end|>"], NAMES["<tool>"]
    assert build().stop_ids == (im_end,)  # always an end; <|end|> only where the template writes it
    assert build(chat_template="{{ x }}<|end|>").stop_ids == (end, im_end)
    assert build(eos_token_id=end).stop_ids == (end, im_end)
    assert build(eot_token_id=tool, eom_token_id=0).stop_ids == (0, im_end, tool)
    assert build(extra={"<|im_end|>": 4}).stop_ids == (im_end - 1,)  # some converters call it user-defined
    assert build(extra={"<|im_end|>": 1}).stop_ids == ()  # an ordinary token of that name ends nothing


def test_whether_texts_begin_with_bos_is_kept(tmp_path: Path) -> None:
    """A template that says first that BOS is nothing writes none."""
    assert [build(add_bos_token=said).adds_bos for said in (None, False, True)] == [None, False, True]
    for said in (None, False, True):
        save_tokenizer(build(add_bos_token=said), tmp_path)
        assert folder_tokenizer(tmp_path).adds_bos is said
    empty = "{% set bos_token = '' %}{{ bos_token }}"
    for said, template, written in (
        (None, None, None),
        (True, None, True),
        (False, None, False),
        (None, "{{ bos_token }}", True),
        (True, empty, False),
    ):
        made = build(bos_token_id=0, add_bos_token=said, chat_template=template)
        assert tokenizer_metadata(made, made.vocab_size).get("tokenizer.ggml.add_bos_token") is written


def test_missing_types_and_special_ids_leave_a_plain_tokenizer() -> None:
    tokenizer = build(token_type=None)
    assert (tokenizer.bos_token, tokenizer.eos_id, tokenizer.pad_id, tokenizer.chat_template) == (None,) * 4
    assert tokenizer.stop_ids == ()
    assert len(tokenizer.encode("<|end|>")) > 1


# ---- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "WordPiece": ({"model": "bert"}, "tokenizer.ggml.model must be 'gpt2' or 'llama'"),
    "SentencePiece without scores": ({"model": "llama"}, "tokenizer.ggml.scores must be an array of 265 numbers"),
    "SentencePiece without types": (
        {"model": "llama", "token_type": None},
        "token_type must be an array of 265 numbers",
    ),
    "too few scores": ({"model": "llama", "scores": np.zeros(9, np.float32)}, "must be an array of 265 numbers"),
    "truth values as scores": (
        {"model": "llama", "scores": np.zeros(265, np.bool_)},
        "must be an array of 265 numbers",
    ),
    "SentencePiece, no unknown": ({"model": "llama", "scores": np.zeros(265, np.float32)}, "letters would vanish"),
    "a rule of blanks": (
        {"model": "llama", "remove_extra_whitespaces": True},
        "remove_extra_whitespaces must be absent: no SentencePiece BPE of llama.cpp has it, got True",
    ),
    "a normaliser": ({"model": "llama", "precompiled_charsmap": np.zeros(9, np.uint8)}, "precompiled_charsmap must be"),
    "a prefix of 1": ({"model": "llama", "add_space_prefix": 1}, "add_space_prefix must be true or false, got 1"),
    "an array as model": ({"model": np.arange(3)}, "tokenizer.json), got array([0, 1, 2])"),
    "no model": ({"model": None}, "tokenizer.json), got nothing"),
    "unknown rule": ({"pre": "smollm3"}, "tokenizer.ggml.pre must be one of codeshell, command-r, "),
    "no rule": ({"pre": None}, "Hugging Face folder), got nothing"),
    "a rule that is a list": ({"pre": ["smollm"]}, "Hugging Face folder), got ['smollm']"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens must be an array of strings that is not empty, got nothing"),
    "empty tokens": ({"tokens": []}, "that is not empty, got []"),
    "numbers as tokens": ({"tokens": np.arange(3)}, "must be an array of strings"),
    "a token twice": ({"tokens": [*LETTERS, "he", "he"], "token_type": None}, "holds 'he' more than once"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges must be an array of strings"),
    "a merge of one": ({"merges": ["h e", "he"]}, "tokenizer.ggml.merges[1] is 'he'; it must be two tokens"),
    "a merge of three": ({"merges": ["h e l"]}, "tokenizer.ggml.merges[0] is 'h e l'"),
    "a merge of strangers": ({"merges": ["h xyz"]}, "tokenizer.ggml.merges[0] is 'h xyz'"),
    "a merge without its join": ({"merges": ["q z"]}, "their join a token too"),
    "an empty merge": ({"merges": [""]}, "tokenizer.ggml.merges[0] is ''"),
    "types of another length": ({"token_type": np.ones(3, np.int32)}, "token_type must be an array of"),
    "types as text": ({"token_type": ["1"]}, "token_type must be an array of"),
    "a type of 7": ({"extra": {"<x>": 7}}, "token_type must be numbers from 0 to 6"),
    "eos outside": ({"eos_token_id": 100_000}, "eos_token_id must be a token id below 265, got 100000"),
    "bos negative": ({"bos_token_id": -1}, "bos_token_id must be a token id below 265, got -1"),
    "pad a truth value": ({"padding_token_id": True}, "padding_token_id must be a token id below 265, got True"),
    "eot a string": ({"eot_token_id": "<|eot|>"}, "eot_token_id must be a token id below 265, got '<|eot|>'"),
    "a template of numbers": ({"chat_template": 3}, "chat_template must be a string"),
    "an empty control token": ({"extra": {"": 3}}, "an empty control or user-defined token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_by_key(case: str) -> None:
    keys, expected = REFUSED[case]
    with pytest.raises(InputError) as caught:
        build(**keys)
    assert expected in str(caught.value)


def test_a_vocabulary_of_151000_tokens_is_built_in_seconds() -> None:
    pairs = [(left, right) for left in LETTERS for right in LETTERS]
    triples = [("".join(pair), letter) for letter in LETTERS[:2] for pair in pairs]
    pairs = [*pairs, *triples][: 151_000 - len(LETTERS)]
    tokens, merges = [*LETTERS, *map("".join, pairs)], list(map(" ".join, pairs))
    assert len(set(tokens)) == len(tokens) == 151_000
    tokens += [f"<|reserved_{number}|>" for number in range(256)]
    types = np.array([1] * 151_000 + [3] * 256, dtype=np.int32)
    began = time.process_time()
    tokenizer = build("llama-bpe", tokens=tokens, merges=merges, token_type=types)
    assert time.process_time() - began < 5
    assert tokenizer.vocab_size == 151_256
    text = "some text, 123 😀<|reserved_255|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
