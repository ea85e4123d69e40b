"""A byte-level BPE tokenizer from GGUF metadata.

A GGUF holds tokens and merges but only a *name* for the rule that cuts text into words first (`tokenizer.ggml.pre`).
A wrong rule gives ids the model never saw in training and no error, so an unknown name is refused. The rules are those
of llama.cpp (src/llama-vocab.cpp) for the same names, and of the models' own tokenizer.json files.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import InputError
from ..text.tokenizer import NEEDED, Tokenizer
from .config import Settings

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type; 1 normal, 5 unused, 6 byte

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> the patterns that split the text one after the other. Each match becomes a word, and so does
# what lies between matches.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "default": _DEFAULT,
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}  # a word that is a token is taken as it is, unmerged
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # trained on NFC text


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """InputError for another kind than byte-level BPE, an unknown pre-tokenizer, a missing or malformed key, or tokens
    and merges that contradict each other.
    """
    keys = Settings(metadata, "GGUF metadata", prefix="tokenizer.ggml.")
    other = "'gpt2' (byte-level BPE; load any other model from its Hugging Face folder, which has a tokenizer.json)"
    keys.one_of("model", ("gpt2",), other)
    tokens = _strings(keys, "tokens")
    backend = _backend(keys, tokens)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise InputError("GGUF metadata: tokenizer.chat_template must be a string.")
    bos, eos, pad, *stops = (_token_id(keys, name, len(tokens)) for name in ("bos", "eos", "padding", "eot", "eom"))
    named = {name: tokens[i] for name, i in zip(NEEDED, (bos, eos, pad), strict=True) if i is not None}
    stop_ids = [stop for stop in stops if stop is not None]
    return Tokenizer(backend, chat_template=template, named_tokens=named, stop_ids=stop_ids)


def _backend(keys: Settings, tokens: list[str]) -> tokenizers.Tokenizer:
    known = sorted(_SPLITS)
    why = "words cut by another rule are tokens that the model was not trained on"
    pre = keys.one_of("pre", known, f"one of {', '.join(known)} ({why}: load it from its Hugging Face folder)")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise InputError(f"GGUF metadata: tokenizer.ggml.tokens holds {twice!r} more than once.")
    model = models.BPE(vocab=vocab, merges=_merges(keys, vocab), ignore_merges=pre in _WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_whole_tokens(keys, tokens))
    return backend


def _whole_tokens(keys: Settings, tokens: list[str]) -> list[AddedToken]:
    """Control and user-defined tokens, found in the text before any word is cut."""
    types = keys.get("token_type")
    if types is None:
        return []
    whole = isinstance(types, np.ndarray) and types.dtype.kind in "iu" and len(types) == len(tokens)
    if not whole or not np.isin(types, range(7)).all():
        raise InputError(
            f"GGUF metadata: tokenizer.ggml.token_type must be an array of {len(tokens)} whole numbers, each 0 to 6."
        )
    found = np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    if any(not tokens[index] for index in found):
        raise InputError("GGUF metadata: tokenizer.ggml.tokens has an empty control or user-defined token.")
    return [AddedToken(tokens[i], special=types[i] != _USER_DEFINED, normalized=False) for i in found]


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


def _token_id(keys: Settings, name: str, count: int) -> int | None:
    value = keys.get(f"{name}_token_id")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count):
        raise keys.refusal(f"{name}_token_id", f"a token id below {count}")
    return value
