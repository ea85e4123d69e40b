"""The special tokens of a Hugging Face folder, added to its tokenizer as transformers adds them.

tokenizer.json lists added tokens with flags (whether blanks beside them belong to them, whether text is normalised
first); `added_tokens_decoder` of tokenizer_config.json may say other flags, and wins. Tokens that have a name
(`bos_token`) or stand in `extra_special_tokens` are found whole in a text even where tokenizer.json has them as words.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..errors import InputError, shown
from ..settings import checked
from .tokenizer import NEEDED

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
AGAIN = "Write both again with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."


def add_special_tokens(
    where: Path, config: Mapping[str, Any], older: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, str]:
    """Add to `backend` what tokenizer_config.json (`where`) and the older special_tokens_map.json say.
    Returns the texts of the tokens that have a name. Raises InputError for an entry of a wrong type, and for a token
    that is needed and not in the vocabulary, or has another id there."""
    listed = _listed(where, config.get("added_tokens_decoder"))
    if config.get("added_tokens_decoder") is None:
        config = {**config, **older}
    named, extra = _named(where, config), config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if isinstance(extra, dict):
        named |= {key: _token(where, key, value) for key, value in extra.items()}
        extra = config.get("additional_special_tokens")
    if not isinstance(extra, list | None):
        raise InputError(f"{where}: extra_special_tokens must be a list or an object, got {shown(extra)}.")
    extras = [_token(where, "extra_special_tokens", token) for token in extra or []]
    has, theirs = list(backend.get_added_tokens_decoder().values()), {token.content for token in listed.values()}
    for token in [*(named[key] for key in NEEDED if key in named), *extras]:
        if backend.token_to_id(token.content) is None and token.content not in theirs:
            what = f"the special token {shown(token.content)} is not in the tokenizer's vocabulary"
            raise InputError(f"{where}: {what}. {AGAIN}")
    # Another named one may have no id, as CodeLlama's <FILL_ME>: it is a name alone, which no text of the model holds.
    special = [token for token in [*named.values(), *extras] if backend.token_to_id(token.content) is not None]
    same = set(map(repr, has))
    added = [token for _, token in sorted(listed.items()) if repr(token) not in same]
    known, names = {token.content for token in [*has, *added]}, {token.content for token in named.values()}
    for token in special:
        if token.content not in known and token not in added:  # with other flags: the last one counts
            added.append(token)
    for token in added:
        token.special |= token.content in names
    backend.add_tokens(added)
    for index, token in listed.items():
        if (found := backend.token_to_id(token.content)) != index:
            what = f"the added token {shown(token.content)} has id {index}, in tokenizer.json {found}"
            raise InputError(f"{where}: {what}. {AGAIN}")
    return {key: token.content for key, token in named.items()}


def _listed(where: Path, value: Any) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: tokens by id."""
    if not isinstance(value, dict | None):
        raise InputError(f"{where}: added_tokens_decoder must be an object, got {shown(value)}.")
    found = {}
    for index, token in (value or {}).items():
        if not index.isdecimal() or len(index) > 10 or not isinstance(token, dict):
            entry = f"{shown(index)}: {shown(token)}"
            raise InputError(f"{where}: added_tokens_decoder must have objects under token ids, got {entry}.")
        found[int(index)] = _token(where, f"added_tokens_decoder[{index}]", token)
    return found


def _named(where: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens under keys that end in `_token`; other values than tokens only where the key is no standard one."""
    return {
        key: _token(where, key, value)
        for key, value in {**dict.fromkeys(STANDARD), **config}.items()  # the order counts where flags differ
        if key.endswith("_token") and value is not None and (key in STANDARD or isinstance(value, str | dict))
    }


def _token(where: Path, key: str, value: Any) -> AddedToken:
    """A token written as its text, or as an object with `content` and flags."""
    given = {"content": value, "special": True, "normalized": False} if isinstance(value, str) else value
    content = given.get("content") if isinstance(given, dict) else None
    if not isinstance(content, str) or (not content.isprintable() and "\ud800" <= max(content) <= "\udfff"):
        raise InputError(f"{where}: {key} must be a token's text or an object with its 'content', got {shown(value)}.")
    flags = {name: checked(f"{where}: {name} of {key}", given[name], bool) for name in FLAGS if name in given}
    return AddedToken(content, **flags)
