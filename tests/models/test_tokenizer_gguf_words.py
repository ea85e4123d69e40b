"""Whole tokenizers through GGUF metadata: each as its original on 2,000 strings of many scripts.

Originals are trained here: by sentencepiece, and by the tokenizers library with each model's own pattern, as its
tokenizer.json has it.
"""

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from gguf import GGUFWriter
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from fourbit.errors import InputError
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_tokenizer import gguf_tokenizer, tokenizer_metadata
from fourbit.text.tokenizer import Tokenizer

CORPUS = """The quick brown fox jumps over the lazy dog, and it doesn't stop. I'LL GO, SHE'S HERE; they've gone.
def encodeText(inputText): return [ord(letter) for letter in inputText if letter != "x"] # HTTPServer/path/
Les élèves français ont déjà goûté à la crème brûlée; où étaient-ils? Die Straße heißt Überweg.
Привет, мир! Как дела сегодня? Всё хорошо, спасибо. Ο γρήγορος σκύλος τρέχει.
日本語のテキストをトークンに分けます。東京は日本の首都です。한국어 문장도 토큰으로 나뉩니다.
مرحبا بالعالم، كيف حالك اليوم؟ नमस्ते दुनिया, आप कैसे हैं? สวัสดีชาวโลก 1234567890 3.14159 1,000,000""".splitlines()
SCRIPTS = [(32, 127), (97, 123), (0xA1, 0x17F), (0x300, 0x400), (0x400, 0x460), (0x5D0, 0x5EB), (0x620, 0x66A)]
SCRIPTS += [(0x904, 0x970), (0xE01, 0xE60), (0x3041, 0x3097), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F600, 0x1F650)]


def texts(count: int) -> list[str]:
    """Strings of words of the corpus, random letters of many scripts, runs of one, and blanks."""
    rng, words = random.Random(0), " ".join(CORPUS).split()
    made = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 8)):
            low, high = rng.choice(SCRIPTS)
            letters = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6)))
            parts.append(rng.choice([letters, letters[0] * rng.randint(1, 9), rng.choice(words)]))
            parts.append(rng.choice([" ", " ", "", "  ", "   ", "\n", "\r\n", "\t", " \n "]))
        made.append("".join(parts))
    return made


CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = ENDINGS + r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "refact": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [LLAMA3],
    "smaug-bpe": [LLAMA3],
    "dbrx": [CL100K.replace(r"\s*[\r\n]|", r"\s*[\r\n]+|")],
    "qwen2": [LLAMA3.replace("{1,3}", "")],
    "tekken": [rf"{CASED}|{CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "gpt-4o": [rf"{CASED}{ENDINGS}?|{CAPITALS}{ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + BLANKS],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[一-龥ࠀ-一가-퟿]+",
        pre_tokenizers.Digits(individual_digits=True),
    ],
}


def original(pre: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    steps = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in SPLITS[pre]]
    steps += [] if pre in ("gpt-2", "refact") else [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, show_progress=False))
    return made


def through_gguf(tokens: list[str], path: Path, **keys: Any) -> Tokenizer:
    """The tokenizer of a file that gguf-py writes."""
    writer = GGUFWriter(path / "m.gguf", "llama")
    for name, value in {"tokens": tokens, **keys}.items():
        kind = {bool: "bool", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf_tokenizer(GGUFFile(path / "m.gguf").metadata)


@pytest.mark.parametrize("pre", SPLITS)
def test_2000_strings_of_every_rule_equal_their_original(pre: str, tmp_path: Path) -> None:
    theirs = original(pre)
    said = json.loads(theirs.to_str())["model"]
    tokens, merges = sorted(said["vocab"], key=said["vocab"].__getitem__), [" ".join(pair) for pair in said["merges"]]
    ours = through_gguf(tokens, tmp_path, model="gpt2", pre=pre, merges=merges)
    for text in texts(2000):
        assert ours.encode(text) == theirs.encode(text).ids, text


def again(tokenizer: Tokenizer) -> Tokenizer:
    """Through the metadata that we write of it."""
    return gguf_tokenizer(tokenizer_metadata(tokenizer, tokenizer.vocab_size + 5))


@pytest.mark.parametrize("pre", SPLITS)
def test_what_is_written_of_a_tokenizer_json_gives_it_again(pre: str) -> None:
    """The name of its rule for words stands nowhere in it."""
    theirs = Tokenizer(original(pre))
    ours = again(theirs)
    assert ours.vocab_size == theirs.vocab_size + 5  # as many as the model has rows
    for text in texts(500):
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize("how", ["another rule", "a prefix", "no merges", "unigram"])
def test_a_tokenizer_that_no_metadata_gives_again_is_refused(how: str) -> None:
    made = original("gpt-2")
    if how == "another rule":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("o", "isolated"), made.pre_tokenizer])
    elif how == "a prefix":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        model = models.BPE(made.get_vocab(), []) if how == "no merges" else models.Unigram([("a", 0.0), ("b", 0.0)], 0)
        made = tokenizers.Tokenizer(model)
    with pytest.raises(InputError, match="GGUF has no words for its tokenizer"):
        again(Tokenizer(made))


@functools.cache
def trained(**options: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, model_type="bpe", vocab_size=600, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return written.getvalue()


def sentencepiece_in_gguf(raw: bytes, path: Path, **keys: Any) -> Tokenizer:
    """As llama.cpp's converter writes it: user-defined tokens with plain blanks, and a score of -1000."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(raw).pieces
    tokens = [piece.piece.replace("▁", " ") if piece.type == 4 else piece.piece for piece in pieces]
    scores = [-1000.0 if piece.type == 4 else piece.score for piece in pieces]
    return through_gguf(
        tokens, path, model="llama", pre="default", scores=scores, token_type=[piece.type for piece in pieces], **keys
    )


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_2000_strings_equal_sentencepiece(kind: str, tmp_path: Path) -> None:
    """Gemma has no prefix, and whole tokens: runs of blanks, new lines, HTML."""
    options: dict[str, Any] = {}
    if kind == "gemma":
        options = {"add_dummy_prefix": False, "user_defined_symbols": ("<b>", "▁▁", "▁▁▁", "\n", "\n\n", "[@X@]")}
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(**options))
    ours = sentencepiece_in_gguf(trained(**options), tmp_path, add_space_prefix=kind == "llama")
    anew = again(ours)
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (1, 2, (2,))
    for text in [*texts(2000), "<b>x</b>   y\n\n\n[@X@]", "  a", "\n"]:
        expected = theirs.encode(text)
        assert ours.encode(text) == anew.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected), text


def test_whole_tokens_of_phi3_take_the_blanks_behind_them(tmp_path: Path) -> None:
    """llama.cpp goes by the model's name: a GGUF has no other place to say it."""
    plain = sentencepiece_in_gguf(trained(), tmp_path)
    metadata = dict(GGUFFile(tmp_path / "m.gguf").metadata)
    phi = gguf_tokenizer(metadata | {"general.name": "Phi-3 Mini 4k Instruct"})
    assert phi.encode("</s>\n a") == [2, *plain.encode("a")] != plain.encode("</s>\n a")
    assert phi.encode("<s>\n a") == plain.encode("<s>\n a")
    assert again(phi).encode("</s>\n a") == phi.encode("</s>\n a")


def test_tokens_without_an_order_of_joins_are_refused(tmp_path: Path) -> None:
    pieces = sentencepiece_model_pb2.ModelProto.FromString(trained()).pieces
    keys = {"model": "llama", "scores": [-1000.0] * len(pieces), "token_type": [piece.type for piece in pieces]}
    with pytest.raises(InputError, match="have one score, -1000, so that nothing says which is joined first"):
        through_gguf([piece.piece for piece in pieces], tmp_path, **keys)
