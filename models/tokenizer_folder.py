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

TOKENIZER_BYTES = 256 << 20  # the largest in use (262k tokens) has 34 MB
JSON_BYTES = 64 << 20
TEMPLATE_BYTES = 1 << 20


def folder_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer` that a folder describes; InputError names the file that is missing or malformed."""
    backend = _backend(folder)
    config = _optional_json(folder, "tokenizer_config.json")
    older = _optional_json(folder, "special_tokens_map.json")
    names = {key: _token(folder, config, older, key) for key in ("bos_token", "eos_token", "pad_token")}
    _check_added(folder, config, backend)
    return {"backend": backend, "chat_template": _chat_template(folder, config), "stop_ids": _stop_ids(folder), **names}


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


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name, JSON_BYTES) if (folder / name).exists() else {}


def _token(folder: Path, config: dict[str, Any], older: dict[str, Any], key: str) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    value = config.get(key) if config.get(key) is not None else older.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: {key} must be a string or an object with 'content'.")
    return value


def _check_added(folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Tokens that only the config lists would be cut into pieces: refused, since the model knows them whole."""
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return
    for index, token in added.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or backend.token_to_id(content) is None:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: added token {index} ({content!r}) is not in tokenizer.json. "
                "Write both again with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template's source; of several named ones, the one called "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, TEMPLATE_BYTES)
    template = config.get("chat_template")
    where = folder / "tokenizer_config.json"
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
        if template is None:
            raise InputError(f"{where}: chat_template has no entry named 'default', only {sorted(map(str, named))}.")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{where}: chat_template must be a string or a list of named templates.")
    return template


def _stop_ids(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or where that is silent of config.json: a number or a list."""
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder, name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(index, int) or isinstance(index, bool) for index in ids):
            raise InputError(
                f"{folder / name}: eos_token_id must be a token id or a list of them, got {str(value)[:80]}."
            )
        return ids
    return []
