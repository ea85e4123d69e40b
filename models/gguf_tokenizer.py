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
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "default": _DEFAULT,
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}  # a word that is a token is taken as it is, unmerged
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # trained on NFC text


def gguf_arguments(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Tokenizer` that a GGUF's metadata describe.

    Raises:
        InputError: no byte-level BPE, an unknown pre-tokenizer, a missing or malformed key, or tokens and merges that
            contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(
            f"GGUF metadata: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) can be read from GGUF. "
            "Load the model from its Hugging Face folder, which has a tokenizer.json."
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    backend = _backend(metadata, tokens)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError("GGUF metadata: tokenizer.chat_template must be a string.")
    stops = (_token_id(metadata, f"{name}_token_id", tokens) for name in ("eot", "eom"))
    return {
        "backend": backend,
        "chat_template": template,
        "bos_token": _special(metadata, "bos_token_id", tokens),
        "eos_token": _special(metadata, "eos_token_id", tokens),
        "pad_token": _special(metadata, "padding_token_id", tokens),
        "stop_ids": [stop for stop in stops if stop is not None],
    }


def _backend(metadata: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise InputError(
            f"GGUF metadata: tokenizer.ggml.pre is {pre!r}; the known pre-tokenizers are {', '.join(sorted(_SPLITS))}. "
            "Cutting words by another rule would give tokens that the model was not trained on; load it from its "
            "Hugging Face folder instead."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise InputError(f"GGUF metadata: tokenizer.ggml.tokens holds {twice!r} more than once.")
    merges = _merges(metadata, vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(backend, metadata, tokens)
    return backend


def _add_whole_tokens(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Control and user-defined tokens are found in the text before any word is cut."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise InputError(f"GGUF metadata: tokenizer.ggml.token_type must be an array of {len(tokens)} numbers.")
    whole = [
        AddedToken(tokens[index], special=types[index] != _USER_DEFINED, normalized=False)
        for index in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    ]
    if any(not token.content for token in whole):
        raise InputError("GGUF metadata: tokenizer.ggml.tokens has an empty control or user-defined token.")
    backend.add_tokens(whole)


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, merge in enumerate(_strings(metadata, "tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(
                f"GGUF metadata: tokenizer.ggml.merges[{number}] is {merge[:80]!r}; it must be two tokens of the "
                "vocabulary with one space between them, and their join a token too."
            )
        merges.append((left, right))
    return merges


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value:
        raise InputError(f"GGUF metadata: {key} is missing, empty or no array of strings; byte-level BPE needs it.")
    return value


def _token_id(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(tokens):
        raise InputError(f"GGUF metadata: tokenizer.ggml.{name} is {value!r}; it must be below {len(tokens)}.")
    return value


def _special(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    index = _token_id(metadata, name, tokens)
    return None if index is None else tokens[index]
