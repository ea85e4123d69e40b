"""`tokenizer.model` against the sentencepiece library, on models that it trains here; and bad files."""

import functools
import io
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from fourbit.errors import InputError
from fourbit.models.save import save_tokenizer
from fourbit.text.sentencepiece import MAX_FIELDS, read_sentencepiece
from fourbit.text.tokenizer import Tokenizer
from fourbit.text.tokenizer_folder import folder_tokenizer

SENTENCES = """The quick brown fox jumps over the lazy dog, and then it doesn't stop running.
def encode(text: str) -> list[int]:\n    return [ord(letter) for letter in text if letter != "x"]
Les élèves français ont déjà goûté à la crème brûlée; où étaient-ils?
Привет, мир! Как дела сегодня? Всё хорошо, спасибо.
日本語のテキストをトークンに分けます。東京は日本の首都です。
한국어 문장도 토큰으로 나뉩니다. 서울은 한국의 수도입니다.
مرحبا بالعالم، كيف حالك اليوم؟
नमस्ते दुनिया, आप कैसे हैं?
Ο γρήγορος σκύλος τρέχει. 1234567890 3.14159 1,000,000 aaaa bbbbbb ==== ----""".splitlines()
SCRIPTS = [(32, 127), (97, 123), (0xA1, 0x17F), (0x370, 0x400), (0x400, 0x460), (0x5D0, 0x5EB), (0x620, 0x64B)]
SCRIPTS += [(0x904, 0x93A), (0xE01, 0xE30), (0x3041, 0x3097), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F600, 0x1F650)]


def texts(count: int, seed: int = 0) -> list[str]:
    """Strings of words of the corpus, random letters of many scripts, blanks, and runs of a letter."""
    rng, words = random.Random(seed), " ".join(SENTENCES).split()
    made = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 8)):
            low, high = rng.choice(SCRIPTS)
            letters = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6)))
            parts.append(rng.choice([letters, letters[0] * rng.randint(1, 9), rng.choice(words)]))
            parts.append(rng.choice([" ", " ", "", "  ", "   ", "\n", "\t", " \n ", "▁"]))
        made.append("".join(parts))
    return made


SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe"},
    "gemma": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["<b>", "</b>", "[@X@]"]},
    "blanks collapsed": {"model_type": "bpe", "remove_extra_whitespaces": True},
    "no bytes": {"model_type": "bpe", "byte_fallback": False},
    "special ids": {"model_type": "bpe", "bos_id": 2, "eos_id": 0, "unk_id": 1, "pad_id": 3, "vocab_size": 600},
    "unigram": {"model_type": "unigram"},
    "unigram, blanks collapsed, no prefix": {"model_type": "unigram", "remove_extra_whitespaces": True}
    | {"add_dummy_prefix": False},
}
NFKC = {"unigram of NFKC": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"}}
COMMON = {"vocab_size": 550, "byte_fallback": True, "character_coverage": 0.98, "num_threads": 1, "minloglevel": 2}
COMMON |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False}


@functools.cache
def trained(kind: str) -> bytes:
    written = io.BytesIO()
    options = COMMON | (SETTINGS | NFKC)[kind]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES * 3), model_writer=written, **options)
    return written.getvalue()


def proto(raw: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(raw)


def folder(path: Path, raw: bytes, **files: Any) -> Path:
    (path / "tokenizer.model").write_bytes(raw)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", SETTINGS)
def test_2000_strings_equal_sentencepiece_there_and_back(kind: str, tmp_path: Path) -> None:
    """Of Unigram without runs of a letter, of whose cuts several may have the one highest sum."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
    ours = folder_tokenizer(folder(tmp_path, trained(kind)))
    assert ours.vocab_size == theirs.vocab_size()
    for text in [*texts(2000), "a <0x0A> b", "<0x41>", "\0", "▁", "", " "]:
        if "unigram" in kind:
            text = re.sub(r"([^\s▁])\1\1+", r"\1\1", text)
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, text
        if "no bytes" not in kind:  # sentencepiece writes " ⁇ " for unknown characters
            assert ours.decode(expected) == theirs.decode(expected), text


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return folder_tokenizer(folder(tmp_path_factory.mktemp("spm"), trained("llama")))


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
@settings(max_examples=150)
def test_any_text_comes_back_from_bytes(text: str, llama: Tokenizer) -> None:
    text = text.replace("▁", " ")
    assert llama.decode(llama.encode(text), skip_special=False) == text


def test_it_is_saved_as_a_tokenizer_json_that_transformers_reads(llama: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(llama, tmp_path)
    again, theirs = folder_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.named_tokens, again.stop_ids) == (llama.named_tokens, llama.stop_ids)
    for text in [*texts(200), "<s>a</s> b"]:
        ids = llama.encode(text)
        assert again.encode(text) == theirs(text, add_special_tokens=False).input_ids == ids, text
        assert again.decode(ids) == llama.decode(ids)


def test_special_tokens_are_found_whole_and_have_the_names_that_the_model_gives(tmp_path: Path) -> None:
    raw = trained("special ids")
    plain = folder_tokenizer(folder(tmp_path, raw))
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (2, 0, 3)
    assert plain.named_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert plain.stop_ids == (0,)
    # What follows a whole token begins like a text; offsets are characters of the text.
    ids, spans = plain.encode_with_offsets("<s>dog 😀</s>  x")
    assert (
        ids[0] == 2
        and ids[1 : ids.index(0)] == plain.encode("dog 😀")
        and ids[ids.index(0) + 1 :] == plain.encode("  x")
    )
    emoji = [span for span in spans if span == (7, 8)]
    assert len(emoji) == 4 and spans[0] == (0, 3)
    config = {"eos_token": {"content": "x", "normalized": True}, "pad_token": None}
    ours = folder_tokenizer(folder(tmp_path, raw, tokenizer_config=config, added_tokens={"<new>": 600}))
    assert ours.eos_token == "x" and ours.pad_id is None and ours.vocab_size == 601
    assert ours.encode("a<new>b<s>c") == [*ours.encode("a"), 600, *ours.encode("b"), 2, *ours.encode("c")]


def test_a_config_may_take_the_prefix_away(tmp_path: Path) -> None:
    plain = folder_tokenizer(folder(tmp_path, trained("llama")))
    bare = folder_tokenizer(folder(tmp_path, trained("llama"), tokenizer_config={"add_prefix_space": False}))
    assert bare.encode(" the") == plain.encode("the") != bare.encode("the")


def changed(kind: str, change: Callable[[Any], Any]) -> bytes:
    model = proto(trained(kind))
    change(model)
    return bytes(model.SerializeToString())


def several(*changes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: [change(model) for change in changes]


def one_score(model: Any) -> None:
    first, second = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) == 2][:2]
    first.score = second.score


def piece(text: str = "dog", score: float = 0.0, type: int = 1) -> Callable[[Any], Any]:
    return lambda model: model.pieces.add(piece=text, score=score, type=type)


def setting(part: str, name: str, value: Any) -> Callable[[Any], Any]:
    return lambda model: setattr(getattr(model, part), name, value)


CHARSMAP = "precompiled_charsmap"
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no readable SentencePiece model"),
    "text": (b"hello world, this is no model", "no readable SentencePiece model"),
    "cut": (trained("llama")[:5000], "no readable SentencePiece model"),
    "a group": (b"\x0b\x0c", "field 1 is of an unknown kind"),
    "a number without end": (b"\x80" * 40, "more than ten bytes"),
    "2^63 bytes": (b"\x0a" + b"\xff" * 8 + b"\x7f", "more bytes than there are"),
    "a token that is cut": (b"\x0a\x05\x0a\x09abc", "more bytes than there are"),
    "a token without text": (b"\x0a\x02\x18\x01", "a token has no text, or an unknown type"),
    "a token of type 7": (b"\x0a\x05\x0a\x01a\x18\x07", "a token has no text, or an unknown type"),
    "a token not UTF-8": (b"\x0a\x04\x0a\x02\xff\xfe", "utf-8"),
    "no tokens": (b"\x12\x02\x18\x02", "no readable SentencePiece model"),
    "four million fields": (b"\x38\x01" * (4 << 20), f"more than {MAX_FIELDS} fields"),
    "nine megabytes": (bytes(9 << 20), "must be at most 8,388,608 bytes"),
    "a token twice": (changed("llama", several(piece(), piece())), "holds 'dog' more than once"),
    "a score of NaN": (changed("llama", piece("qqq", float("nan"))), "a token whose score is NaN or infinite"),
    "a token of 600 letters": (changed("llama", piece("a" * 600)), "a token of 600 characters; at most 512 are taken"),
    "one score for two tokens": (changed("llama", one_score), "have one score"),
    "no unknown token": (
        changed("no bytes", lambda model: setattr(model.pieces[0], "type", 1)),
        "letters would vanish",
    ),
    "unigram, none": (changed("unigram", lambda model: setattr(model.pieces[0], "type", 3)), "letters would vanish"),
    "words": (changed("llama", setting("trainer_spec", "model_type", 3)), "model_type is neither unigram nor bpe"),
    "suffixes": (changed("llama", setting("trainer_spec", "treat_whitespace_as_suffix", True)), "whitespace_as_suffix"),
    "bare blanks": (changed("llama", setting("normalizer_spec", "escape_whitespaces", False)), "escape_whitespaces"),
    "a normaliser": (changed("llama", setting("normalizer_spec", CHARSMAP, b"\x04")), f"normalizer_spec.{CHARSMAP}"),
    "a way back": (changed("llama", setting("denormalizer_spec", CHARSMAP, b"\x04")), f"denormalizer_spec.{CHARSMAP}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_models_are_refused_in_one_line_and_five_seconds(case: str, tmp_path: Path) -> None:
    raw, words = REFUSED[case]
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        folder_tokenizer(folder(tmp_path, raw))
    assert time.process_time() - began < 5
    assert words in str(caught.value) and str(tmp_path / "tokenizer.model") in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_transformers_converts_what_is_not_supported(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = folder(tmp_path, trained("unigram of NFKC"), tokenizer_config={"tokenizer_class": "T5Tokenizer"})
    with pytest.raises(InputError, match=r"AutoTokenizer.from_pretrained\(folder\).save_pretrained\(folder\)"):
        folder_tokenizer(path)
    AutoTokenizer.from_pretrained(path).save_pretrained(path)
    assert folder_tokenizer(path).encode("ﬁn") == folder_tokenizer(path).encode("fin")


def test_every_setting_that_the_reader_knows_is_where_protobuf_puts_it(tmp_path: Path) -> None:
    """All of them away from their defaults, written by protobuf; tokens of every type and score."""

    def change(model: Any) -> None:
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = True
        model.trainer_spec.pad_id, model.trainer_spec.bos_id = 5, -1
        model.pieces[4].type, model.pieces[4].score = 5, -2.5

    raw = changed("unigram", change)
    found, named = read_sentencepiece(folder(tmp_path, raw) / "tokenizer.model")
    pieces = proto(raw).pieces
    assert list(zip(*found[:3], strict=True)) == [(piece.piece, piece.score, piece.type) for piece in pieces]
    assert (found.unigram, found.prefix, found.collapse) == (True, False, True)
    assert named == {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": pieces[5].piece}


@given(st.lists(st.tuples(st.integers(0, 9000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_changed_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    raw = trained("llama")
    for at, run in changes:
        raw = raw[:at] + run + raw[at + len(run) :]
    try:
        ours = folder_tokenizer(folder(tmp_path_factory.getbasetemp(), raw))
        ours.decode(ours.encode("The dog 😀</s>"))
    except InputError as error:
        assert len(str(error)) < 2000


def test_the_score_counts_and_not_the_place(tmp_path: Path) -> None:
    """Two joins that exclude each other: ab + c or a + bc, as the scores say, whatever the ids."""
    for scores, cut in (((-1.0, -2.0), ["▁", "ab", "c"]), ((-2.0, -1.0), ["▁", "a", "bc"])):
        model = proto(trained("llama"))
        del model.pieces[259:]
        for text, score in zip(["bc", "ab", "▁", "a", "b", "c"], (scores[1], scores[0], -9, -9, -9, -9), strict=True):
            model.pieces.add(piece=text, score=score)
        ours = folder_tokenizer(folder(tmp_path, bytes(model.SerializeToString())))
        assert ours.backend.encode("abc", add_special_tokens=False).tokens == cut
