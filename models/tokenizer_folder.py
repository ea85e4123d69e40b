"""What the tokenizer files of a Hugging Face folder say, gathered from the five places where it may stand.

`tokenizer.json` is the tokenizer itself; `tokenizer_config.json` and the older `special_tokens_map.json` name the
special tokens; the chat template is in `chat_template.jinja` or in the config; more end tokens are in
`generation_config.json`. All of it is data: nothing here can name code or another file.
"""

from pathlib import Path
from typing import Any

import tokenizers

from ..errors import InputError
from ..files import read_json, read_text
from .tokenizer import Tokenizer

TOKENIZER_BYTES = 256 << 20  # the largest in use (262k tokens) has 34 MB
JSON_BYTES = 64 << 20
TEMPLATE_BYTES = 1 << 20
SPECIAL = ("bos_token", "eos_token", "pad_token")


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a folder describes; InputError names the file that is missing or malformed."""
    backend, where = _backend(folder), folder / "tokenizer_config.json"
    older, config = _optional_json(folder / "special_tokens_map.json"), _optional_json(where)
    config = {key: value for key, value in older.items() if key.endswith("_token")} | {
        key: value for key, value in config.items() if value is not None
    }
    _check_added(where, config, backend)
    return Tokenizer(
        backend,
        chat_template=_chat_template(where, config),
        **{key: _token(where, config, key) for key in SPECIAL},
        stop_ids=_stop_ids(folder),
        named_tokens=_named_tokens(config),
    )


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
        found = f"found only {others[0]}" if others else "found none"
        raise InputError(
            f"{folder}: needs tokenizer.json, {found}. Convert it once with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    text = read_text(path, TOKENIZER_BYTES)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a readable tokenizer: {error}.") from None
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # a training aid that would make every encoding random
    return backend


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file, JSON_BYTES) if file.exists() else {}


def _token(where: Path, config: dict[str, Any], key: str) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise InputError(f"{where}: {key} must be a string or an object with 'content'.")
    return value


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that have a name: keys that end in `_token`, and those of `extra_special_tokens`."""
    extra, told = config.get("extra_special_tokens"), {}
    named = (extra if isinstance(extra, dict) else {}) | {k: v for k, v in config.items() if k.endswith("_token")}
    for key, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            told[key] = text
    return told


def _check_added(where: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Tokens that only the config lists would be cut into pieces: refused, since the model knows them whole."""
    added = config.get("added_tokens_decoder")
    for index, token in added.items() if isinstance(added, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or backend.token_to_id(content) is None:
            raise InputError(
                f"{where}: added token {index} ({content!r}) is not in tokenizer.json. "
                "Write both again with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )


def _chat_template(where: Path, config: dict[str, Any]) -> str | None:
    """The template's source; of several named ones, the one called "default"."""
    file = where.with_name("chat_template.jinja")
    if file.is_file():
        return read_text(file, TEMPLATE_BYTES)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
        if template is None:
            raise InputError(f"{where}: chat_template has no entry named 'default', only {sorted(named)}.")
    if not isinstance(template, str | None):
        raise InputError(f"{where}: chat_template must be a string or a list of named templates.")
    return template


def _stop_ids(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or where that is silent of config.json: a number or a list."""
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(index, int) or isinstance(index, bool) for index in ids):
            raise InputError(
                f"{folder / name}: eos_token_id must be a token id or a list of them, got {str(value)[:80]}."
            )
        return ids
    return []
