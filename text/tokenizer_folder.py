"""What the tokenizer files of a Hugging Face folder say, gathered from the places where it may stand.

`tokenizer.json` is the tokenizer itself, and where that is missing a SentencePiece model, `tokenizer.model`;
`tokenizer_config.json` and the older `special_tokens_map.json` name the special tokens; the chat template is in
`chat_template.jinja` or in the config; more end tokens are in `generation_config.json`. All of it is data: nothing here
can name code or another file.
"""

import contextlib
import json
import re
import signal
import string
import subprocess
import tempfile
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import tokenizers

from ..child import child_command, child_environment
from ..errors import InputError, shown
from ..files import read_json, read_text, write_text
from ..settings import checked
from .sentencepiece import INSTEAD, read_sentencepiece, sentencepiece_backend, whole_tokens
from .special_tokens import AGAIN, add_special_tokens
from .tokenizer import Tokenizer, fenced

TOKENIZER_BYTES = 256 << 20  # the largest in use (262k tokens) has 34 MB
JSON_BYTES = 64 << 20
TEMPLATE_BYTES = 1 << 20
STOPS = 1 << 12  # end tokens of a model: a few


def as_tokenizer(given: object) -> Tokenizer:
    """A tokenizer of ours, or of the user's own making with what `data.protocol` asks, as it is; a fast one of
    transformers as the folder that it saves would be read, so that tokens, template and special tokens are the same.

    It is taken as it is now, with the end tokens of the folder it was loaded from. Files go to a temporary folder: for
    a loop convert once. Raises InputError for anything else: a slow one does not say where in a text its tokens stand.
    """
    if hasattr(given, "encode_with_offsets"):
        return cast(Tokenizer, given)
    if not (hasattr(given, "backend_tokenizer") and hasattr(given, "save_pretrained")):
        raise InputError(
            "a tokenizer is one that fourbit.load gives or a fast one of transformers (with .backend_tokenizer), got "
            f"{type(given).__name__}: take AutoTokenizer's, or fourbit.load's for the folder"
        )
    with contextlib.ExitStack() as kept:
        folder = kept.enter_context(tempfile.TemporaryDirectory(prefix="fourbit-tokens-", ignore_cleanup_errors=True))
        given.save_pretrained(folder)
        home, where = Path(getattr(given, "name_or_path", None) or folder), Path(folder) / "tokenizer_config.json"
        if (adds := _optional_json(home / where.name).get("add_bos_token")) is not None:  # which it does not save
            write_text(where, json.dumps(_optional_json(where) | {"add_bos_token": adds}))
        made = folder_tokenizer(Path(folder), home)
        made.source = folder  # its files go with what is saved, and are there as long as the tokenizer
        weakref.finalize(made, kept.pop_all().close)
    return made


def folder_tokenizer(folder: Path, home: Path | None = None) -> Tokenizer:
    """The tokenizer that a folder describes; InputError names the file that is missing or malformed.
    home: of a tokenizer that is open already, and was saved there: the folder of its model."""
    where, model = folder / "tokenizer_config.json", folder / "tokenizer.model"
    older, config = _optional_json(folder / "special_tokens_map.json"), _optional_json(where)
    if model.is_file() and not (folder / "tokenizer.json").exists():
        backend, config, older = *_from_sentencepiece(model, config, older), {}
    else:
        backend = _backend(folder, home is not None)
    with fenced(str(where)):
        named = add_special_tokens(where, config, older, backend)
    said: dict[str, Any] = {"chat_template": _chat_template(where, config), "stop_ids": _stop_ids(home or folder)}
    adds_bos = checked(f"{where}: add_bos_token", config.get("add_bos_token"), bool | None)
    tokenizer = Tokenizer(backend, named_tokens=named, adds_bos=adds_bos, **said)
    _check_letters(folder, tokenizer)
    return tokenizer


def _from_sentencepiece(
    file: Path, config: dict[str, Any], older: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a folder that has only a tokenizer.model, and its config with what that leaves unsaid: names of
    special tokens, and the tokens of the older added_tokens.json."""
    if config.get("added_tokens_decoder") is None:
        added = _optional_json(file.with_name("added_tokens.json")).items()
        config = {**config, **older, "added_tokens_decoder": {str(id): {"content": text} for text, id in added}}
    found, named = read_sentencepiece(file)
    prefix = checked(f"{file.parent}: add_prefix_space", config.get("add_prefix_space"), bool | None)
    with fenced(str(file)):
        backend = sentencepiece_backend(str(file), found if prefix is None else found._replace(prefix=prefix))
        backend.add_tokens(whole_tokens(str(file), found.texts, found.types))
    # Normalised, a token would have "▁" before it. Its text is looked for as it stands.
    plain = {"normalized": False}
    said = json.dumps(named | config)
    return backend, json.loads(said, object_hook=lambda item: item | plain if "content" in item else item)


def _backend(folder: Path, tried: bool) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("vocab.json", "vocab.txt") if (folder / name).exists()]
        way = "Get it from where the model is from (save_model writes that of its third argument)."
        way = INSTEAD if others else way
        found = f"only {others[0]}" if others else "none"
        raise InputError(f"{folder}: needs tokenizer.json or tokenizer.model, found {found}. {way}")
    text, now = read_text(path, TOKENIZER_BYTES), path.stat()
    if not tried and (fault := _tried(path.resolve(), now.st_ino, now.st_size, now.st_mtime_ns)):
        raise InputError(f"{path}: not a readable tokenizer: {fault}. Get the file again.")
    with fenced(f"{path}: not a readable tokenizer"):
        backend = tokenizers.Tokenizer.from_str(text)
    listed = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    for token in json.JSONDecoder().raw_decode(text, listed.end())[0] if listed else ():
        if (index := backend.token_to_id(token["content"])) != token["id"]:
            what = f"the added token {shown(token['content'])} has id {token['id']}, in the vocabulary {index}"
            raise InputError(f"{path}: {what}. {AGAIN}")
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # a training aid that would make every encoding random
    return backend


def _check_letters(folder: Path, tokenizer: Tokenizer) -> None:
    """InputError where texts would vanish without an error: no letter or digit has a token, nor has the unknown."""
    try:
        if any(tokenizer.encode(letter) for letter in string.ascii_letters + string.digits):
            return
    except InputError:  # at what it cannot encode: no silence
        return
    what = "has no token for any letter or digit, so that texts would vanish"
    raise InputError(f"{folder / 'tokenizer.json'} {what}: give its model an unk_token of its vocabulary.")


@lru_cache(maxsize=64)
def _tried(path: Path, *version: int) -> str:
    """What happened when a process of its own opened the tokenizer.json of this version under limits; "": nothing."""
    program = child_command(Path(__file__).with_name("tokenizer_child.py"), ["tokenizers"], str(path))
    one_thread = {**child_environment(), "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, env=one_thread)
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "it takes a text of a few characters longer than a second, or to open far longer than others of its size"
    if ended.returncode < 0:
        return "it takes more than 256 MB for a text of a few characters, or 16 times its size for itself"
    return ended.stdout.decode(errors="replace").strip()


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file, JSON_BYTES) if file.exists() else {}


def _chat_template(where: Path, config: dict[str, Any]) -> str | None:
    """The template's source; of several named ones, the one called "default"."""
    file = where.with_name("chat_template.jinja")
    if file.is_file():
        return read_text(file, TEMPLATE_BYTES)
    template = config.get("chat_template")
    named: dict[str, Any] = {file.stem: None for file in where.parent.glob("additional_chat_templates/*.jinja")}
    if isinstance(template, list):
        named |= {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is None and (named or config.get("chat_template") is not None):
        raise InputError(f"{where}: chat_template has no entry named 'default', only {sorted(named)}.")
    found: str | None = checked(f"{where}: chat_template", template, str | None)
    return found


def _stop_ids(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or where that is silent of config.json: a number or a list."""
    for name in ("generation_config.json", "config.json"):
        if (value := _optional_json(folder / name).get("eos_token_id")) is not None:
            ids = value if isinstance(value, list) else [value]
            if len(ids) > STOPS:
                raise InputError(f"{folder / name}: eos_token_id must be at most {STOPS:,} ids, got {len(ids):,}")
            return [checked(f"{folder / name}: eos_token_id", index, int) for index in ids]
    return []
