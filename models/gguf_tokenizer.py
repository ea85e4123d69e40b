"""A tokenizer from GGUF metadata: byte-level BPE (`tokenizer.ggml.model` "gpt2") or SentencePiece ("llama").

Of byte-level BPE a GGUF holds tokens and merges but only a *name* for the rule that cuts text into words first
(`tokenizer.ggml.pre`). A wrong rule gives ids the model never saw in training and no error, so an unknown name is
refused. The rules are those of llama.cpp (src/llama-vocab.cpp) for the same names, and of the models' own
tokenizer.json files. To write a tokenizer is to find the metadata that gives its tokens again, by trying.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import InputError
from ..text import sentencepiece as kinds
from ..text.sentencepiece import Vocabulary, ids_of, sentencepiece_backend, whole_tokens
from ..text.tokenizer import NEEDED, Tokenizer, writes_bos
from .config import Settings

_TOKENS = "GGUF metadata: tokenizer.ggml.tokens"

_CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (  # words end where small letters are followed by capitals
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_TEKKEN = _CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = _TEKKEN.replace("|", _CONTRACTED + "?|", 2).replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# tokenizer.ggml.pre -> the patterns that split the text one after the other. Each match becomes a word, and so does
# what lies between matches.
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "mpt", "phi-2", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_LLAMA3.replace("{1,3}", ""),)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}  # words that are tokens
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # trained on NFC text


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """InputError for another kind than byte-level BPE and SentencePiece BPE, an unknown pre-tokenizer, a missing or
    malformed key, or tokens, merges and scores that contradict each other.
    """
    keys = Settings(metadata, "GGUF metadata", prefix="tokenizer.ggml.")
    other = "'gpt2' or 'llama' (byte-level or SentencePiece BPE; load another model from its folder, tokenizer.json)"
    spelt = keys.one_of("model", ("gpt2", "llama"), other) == "llama"
    tokens = _strings(keys, "tokens")
    types = _numbers(keys, "token_type", len(tokens)) if spelt or keys.get("token_type") is not None else []
    if not set(types) <= set(range(7)):
        raise InputError("GGUF metadata: tokenizer.ggml.token_type must be numbers from 0 to 6.")
    backend = _sentencepiece(keys, tokens, types) if spelt else _backend(keys, tokens)
    name = str(metadata.get("general.name")).lower()  # the one place where a GGUF tells of this
    backend.add_tokens(whole_tokens(_TOKENS, tokens, types, rstrip="phi-3" in name or "phi3" in name) if types else [])
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise InputError("GGUF metadata: tokenizer.chat_template must be a string.")
    every, rule = (None, *range(len(tokens))), f"a token id below {len(tokens)}"
    ids = {name: keys.one_of(f"{name}_token_id", every, rule) for name in ("bos", "eos", "padding", "eot", "eom")}
    if spelt and len(tokens) > 2:
        ids |= {name: id for name, id in {"bos": 1, "eos": 2}.items() if ids[name] is None}  # as in llama.cpp
    named = {name: tokens[i] for name, i in zip(NEEDED, ids.values(), strict=False) if i is not None}
    stop_ids = [id for name in ("eot", "eom") if (id := ids[name]) is not None]
    adds_bos = None if keys.get("add_bos_token") is None else keys.flag("add_bos_token")
    return Tokenizer(backend, chat_template=template, named_tokens=named, stop_ids=stop_ids, adds_bos=adds_bos)


def _sentencepiece(keys: Settings, tokens: list[str], types: list[Any]) -> tokenizers.Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        keys.one_of(key, (None, False), "absent: no SentencePiece BPE of llama.cpp has it")
    prefix = keys.get("add_space_prefix") is None or keys.flag("add_space_prefix")
    scores = _numbers(keys, "scores", len(tokens))
    return sentencepiece_backend(_TOKENS, Vocabulary(tokens, scores, types, prefix=prefix))


def _backend(keys: Settings, tokens: list[str]) -> tokenizers.Tokenizer:
    known = sorted(_SPLITS)
    why = "words cut by another rule are tokens that the model was not trained on"
    pre = keys.one_of("pre", known, f"one of {', '.join(known)} ({why}: load it from its Hugging Face folder)")
    vocab = ids_of(_TOKENS, tokens)
    model = models.BPE(vocab=vocab, merges=_merges(keys, vocab), ignore_merges=pre in _WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(keys: Settings, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, merge in enumerate(_strings(keys, "merges")):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(
                f"GGUF metadata: tokenizer.ggml.merges[{number}] is {merge[:80]!r}; it must be two tokens of the "
                "vocabulary with one space between them, and their join a token too."
            )
        merges.append((left, right))
    return merges


def _strings(keys: Settings, key: str) -> list[str]:
    value = keys.get(key)
    if not isinstance(value, list) or not value:
        raise keys.refusal(key, "an array of strings that is not empty")
    return value


def _numbers(keys: Settings, key: str, count: int) -> list[Any]:
    value = keys.get(key)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or len(value) != count:
        raise keys.refusal(key, f"an array of {count} numbers, one a token")
    return value.tolist()


PROBES = (  # what a tokenizer and the one written of it must cut alike
    "Hello World, it's 1234567 o'clock! Don't SHOUT, WE'LL see: $3.14 (50%)\n\nYes?\tNo... <b>x_1</b>",
    "  for i in range(10):\r\n\t\tif a[i] >= 0x1F and s != 'it''s':  # camelCase XMLHttp2\n\n\n    return {**d}  ",
    "Été é naïve İstanbul Привет 你好，世界。こんにちは 한국어 हिन्दी العربية ½① 😀‍🚀",
)


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, template: str | None = None) -> dict[str, Any]:
    """The metadata from which `gguf_tokenizer` makes this tokenizer again, with as many tokens as the model has `rows`;
    template: a chat template in the place of its own. The rule that cuts words, and where blanks belong, are found by
    trying. InputError for a tokenizer that no metadata gives again."""
    backend, template = tokenizer.backend, template or tokenizer.chat_template or ""
    model, added = json.loads(backend.to_str())["model"], backend.get_added_tokens_decoder()
    texts, types = [f"[PAD{i}]" for i in range(rows)], np.full(rows, kinds.UNUSED, np.int32)  # as llama.cpp fills up
    for text, id in backend.get_vocab(with_added_tokens=True).items():
        texts[id], types[id] = text, kinds.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else kinds.NORMAL
    for id, token in added.items():
        types[id] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    ends = [id for id in tokenizer.stop_ids if id in added and id != tokenizer.eos_id]
    ids = dict(zip(("eot", "eom"), ends, strict=False)) | {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids |= {"padding": tokenizer.pad_id, "unknown": backend.token_to_id(tokenizer.named_tokens.get("unk_token", ""))}
    said: dict[str, Any] = {f"{name}_token_id": id for name, id in ids.items() if id is not None} | {"tokens": texts}
    adds_bos = writes_bos(template) if template else tokenizer.adds_bos  # without one it was trained without BOS
    if adds_bos is not None:  # else llama.cpp has rules of its own
        said["add_bos_token"] = tokenizer.bos_id is not None and adds_bos
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    own, specials = backend.pre_tokenizer or pre_tokenizers.Sequence([]), " a".join((*tokenizer.special_tokens, ""))
    name, tried = Path(tokenizer.source).stem, list[dict[str, Any]]()
    if model["type"] == "BPE" and model["byte_fallback"]:  # scores in the order of merges
        if model["unk_token"] is not None:
            types[backend.token_to_id(model["unk_token"])] = kinds.UNKNOWN
        first = {left + right: -i for i, (left, right) in reversed([*enumerate(merges)])}
        scores = np.array([first.get(text, -len(merges) - id) for id, text in enumerate(texts)], np.float32)
        tried = [{"model": "llama", "scores": scores, "add_space_prefix": prefix} for prefix in (True, False)]
    elif model["type"] == "BPE":
        how = bool(model["ignore_merges"]), backend.normalizer is not None
        rules = [pre for pre in _SPLITS if (pre in _WHOLE_WORDS_FIRST, pre in _COMPOSED) == how]
        rules = [*{_SPLITS[pre]: pre for pre in reversed(rules)}.values()]  # by one name each
        tried = [{"model": "gpt2", "merges": [" ".join(merge) for merge in merges], "pre": pre} for pre in rules]
    other = {"tokenizer.chat_template": template} if template else {}
    for keys, called in ((keys, called) for keys in tried for called in (name, f"phi-3 {name}")):
        given = said | keys | {"token_type": types}
        found = {f"tokenizer.ggml.{key}": value for key, value in given.items()} | other | {"general.name": called}
        with contextlib.suppress(InputError):
            made = gguf_tokenizer(found)
            words = made.backend.pre_tokenizer or own
            alike = all(words.pre_tokenize_str(x) == own.pre_tokenize_str(x) for x in PROBES)
            if alike and all(made.encode(x) == tokenizer.encode(x) for x in (*PROBES, specials)):
                return found
    raise InputError(f"{tokenizer.source}: GGUF has no words for its tokenizer: save_model writes a folder")
