"""SentencePiece vocabularies (Llama 2, Mistral, Gemma, Phi-3) as tokenizers of the `tokenizers` library, and the reader
of their files, `tokenizer.model`. GGUF metadata holds the same vocabularies in other words.

A vocabulary is tokens with scores. BPE starts from characters and joins, again and again, the two neighbours whose join
is the token of the highest score (Kudo and Richardson, 2018, section 3.1); Unigram takes the cut of the highest sum
(Kudo, 2018), where two cuts of one sum may come out either way. Blanks are "▁", and characters without a token are
spelt as bytes. Tokens found whole split a text, and what follows one begins like a text, with "▁" before it if the
vocabulary asks for that: so do llama.cpp and the tokenizer.json files of these models.
"""

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import InputError, shown
from ..files import read_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of tokens, in GGUF too
FILE_BYTES = 8 << 20  # the largest in use (262k tokens) has 5 MB
MAX_FIELDS = 1 << 20  # that one takes 0.8 million
LONGEST = 512  # characters of a token; each of its splits is tried
INSTEAD = "Convert it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."


class Vocabulary(NamedTuple):
    """Of each token its text, score and type; `prefix`: "▁" before a text; `collapse`: runs of blanks are one, and
    none at the ends."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unigram: bool = False
    prefix: bool = True
    collapse: bool = False


def sentencepiece_backend(where: str, found: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary, tokens that are found whole still to be added. Raises InputError, which begins
    with `where`, for tokens that contradict each other, and scores of BPE that leave the order of joins open."""
    texts, types, vocab = found.texts, found.types, ids_of(where, found.texts)
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    if unknown is None and (found.unigram or types.count(BYTE) < 256):
        raise InputError(f"{where} has no unknown token and not all 256 bytes, so that letters would vanish.")
    if not all(map(math.isfinite, found.scores)):
        raise InputError(f"{where} has a token whose score is NaN or infinite. The file is damaged: get it again.")
    if longest := next((text for text in texts if len(text) > LONGEST), None):
        raise InputError(f"{where} has a token of {len(longest)} characters; at most {LONGEST} are taken.")
    bytes_too = BYTE in types
    if found.unigram:
        pieces = list(zip(texts, found.scores, strict=True))
        backend = tokenizers.Tokenizer(models.Unigram(pieces, unknown, byte_fallback=bytes_too))
        if bytes_too:  # a text may spell the name of a byte: cut in two it is no token
            backend.pre_tokenizer = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    else:
        name, merges = None if unknown is None else texts[unknown], _merges(where, found)
        joins = models.BPE(vocab, merges, unk_token=name, fuse_unk=True, byte_fallback=bytes_too)
        backend = tokenizers.Tokenizer(joins)
    single = [normalizers.Replace(Regex(r"\A +|[ ▁]+\z| +(?= )"), "")] if found.collapse else []
    start = [normalizers.Prepend("▁")] if found.prefix else []
    backend.normalizer = normalizers.Sequence([*single, *start, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if found.prefix else back)
    return backend


def ids_of(where: str, texts: Sequence[str]) -> dict[str, int]:
    """Token -> id; InputError for one that occurs twice."""
    vocab = {text: index for index, text in enumerate(texts)}
    if len(vocab) != len(texts):
        twice = next(text for index, text in enumerate(texts) if vocab[text] != index)
        raise InputError(f"{where} holds {shown(twice)} more than once.")
    return vocab


def whole_tokens(where: str, texts: Sequence[str], types: Sequence[int], rstrip: bool = False) -> list[AddedToken]:
    """Control, unknown and user-defined tokens, which are found in a text before any word is cut. `rstrip`: blanks
    behind them belong to them, as in Phi-3, but for those that begin or end a whole text."""
    found = [pair for pair in zip(texts, types, strict=True) if pair[1] in (UNKNOWN, CONTROL, USER_DEFINED)]
    if any(not text for text, _ in found):
        raise InputError(f"{where} has an empty control or user-defined token.")
    bare = ("<unk>", "<s>", "<|endoftext|>")
    return [
        AddedToken(text, special=type != USER_DEFINED, normalized=False, rstrip=rstrip and text not in bare)
        for text, type in found
    ]


def _merges(where: str, found: Vocabulary) -> list[tuple[str, str]]:
    """Every split of every token in two, by the token's score: the joins in the order in which they are made."""
    score = {text: s for text, s, type in zip(*found[:3], strict=True) if type == NORMAL}
    splits = {}
    for text in score:
        pairs = [(text[:at], text[at:]) for at in range(len(text) - 1, 0, -1)]
        if possible := [pair for pair in pairs if pair[0] in score and pair[1] in score]:
            splits[text] = possible
    order = sorted(splits, key=lambda text: -score[text])
    for first, second in itertools.pairwise(order):
        if score[first] == score[second]:
            raise InputError(
                f"{where}: tokens {shown(first)} and {shown(second)} have one score, {score[first]:g}, so that nothing "
                "says which is joined first. Load the model from its Hugging Face folder, with a tokenizer.json."
            )
    return [pair for text in order for pair in splits[text]]


def read_sentencepiece(file: Path) -> tuple[Vocabulary, dict[str, str]]:
    """The vocabulary in a `tokenizer.model` (protobuf, sentencepiece_model.proto), and its special tokens under their
    names in tokenizer_config.json.

    Raises InputError for a damaged or too large file, and by name for settings that are not computed here."""
    tokens: list[tuple[str, float, int]] = []
    # A tag is 8 x the field's number + 2 for bytes and messages, + 5 for four bytes, + 0 for a number.
    parts = dict[int, dict[int, Any]]({18: {}, 26: {}, 42: {}})
    data, count = memoryview(read_bytes(file, FILE_BYTES)), itertools.count()
    try:
        for tag, value in _fields(data, count):
            if tag in parts:
                parts[tag] |= _fields(value, count)
            if tag == 10:
                token = dict(_fields(value, count))
                score = struct.unpack("<f", token.get(21, bytes(4)))[0]
                tokens.append((str(token.get(10, b""), "utf-8"), score, token.get(24, NORMAL)))
                if not tokens[-1][0] or not NORMAL <= tokens[-1][2] <= BYTE:
                    raise ValueError("a token has no text, or an unknown type")
        trainer, normalizer, back = parts.values()
        if not (tokens and trainer and normalizer):  # which come last
            raise ValueError("it is cut short")
    except ValueError as error:
        raise InputError(f"{file}: no readable SentencePiece model: {error}. Get the file again.") from None
    refused = {
        "trainer_spec.model_type is neither unigram nor bpe": trainer.get(24, 1) not in (1, 2),
        "trainer_spec.treat_whitespace_as_suffix is true": trainer.get(192, 0),
        "normalizer_spec.escape_whitespaces is false": not normalizer.get(40, 1),
        "normalizer_spec.precompiled_charsmap rewrites characters": len(normalizer.get(18, b"")),
        "denormalizer_spec.precompiled_charsmap rewrites characters": len(back.get(18, b"")),
    }
    if wrong := [what for what, applies in refused.items() if applies]:
        raise InputError(f"{file}: {wrong[0]}, which is not supported. {INSTEAD}")
    texts, scores, types = zip(*tokens, strict=True)
    named = {"unk_token": trainer.get(320, 0), "bos_token": trainer.get(328, 1), "eos_token": trainer.get(336, 2)}
    named["pad_token"] = trainer.get(344, len(texts))  # -1, which is none, comes as a number of 64 bits
    found = Vocabulary(
        texts, scores, types, trainer.get(24, 1) == 1, bool(normalizer.get(24, 1)), bool(normalizer.get(32, 1))
    )
    return found, {key: texts[index] for key, index in named.items() if index < len(texts)}


def _fields(data: Any, count: Iterator[int]) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: tag and value, a number or bytes. ValueError where it is cut or no message, and
    where `count`, which goes on from message to message, has come to too many."""
    at = 0
    while at < len(data):
        if next(count) >= MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        tag, at = _number(data, at)
        kind, value, size = tag & 7, None, {1: 8, 5: 4}.get(tag & 7)
        if kind in (0, 2):
            value, at = _number(data, at)
        if kind != 0:
            size = value if kind == 2 else size
            if size is None or size > len(data) - at:
                raise ValueError(f"field {tag >> 3} is of an unknown kind, or has more bytes than there are")
            value, at = data[at : at + size], at + size
        yield tag, value


def _number(data: Any, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends; ValueError for more than ten bytes."""
    if at < len(data) and data[at] < 128:
        return data[at], at + 1
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("a number is cut short, or has more than ten bytes")
