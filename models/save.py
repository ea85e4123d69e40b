"""Writing a model, dense or in 4 bits, as a Hugging Face folder, so that anything that reads those can load it."""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import check_finite, disk_errors, read_json, size_of, write_tensors, write_text, write_whole
from ..lora.convert import packed_tensors
from ..lora.layer import plain_modules, unwrapped
from ..lora.linear4bit import Module4bit, weight_id
from ..lora.lora import is_linear
from ..lora.merge import drop_low_rank, merged_state
from ..lora.peft_files import save_low_rank
from ..outputs import check_apart
from ..settings import DTYPES
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_folder import TOKENIZER_BYTES
from .foreign import is_transformers, settings_of
from .hf import CONFIG_BYTES, INDEX, SINGLE, indexed
from .load import weights_of
from .protocol import CausalLM

SHARD_BYTES = 5 * 10**9  # as transformers cuts
TOKEN_IDS = "bos_token_id", "eos_token_id", "pad_token_id"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", TEMPLATE)
_SHARD = re.compile(r"model-(?:[0-9a-f]{8}-)?[0-9]{5}-of-[0-9]{5}\.safetensors")


def save_model(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    template: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    merge: bool = False,
) -> None:
    """Write the weights of any module into `folder`, which is made if need be: dense ones as they are, those in 4 bits
    as bitsandbytes and transformers read them, of the same bytes. `load_model` reads them into a module of that class;
    `fourbit.load` and transformers' `from_pretrained` open the folder where the model has a config, which goes beside
    them, with the tokenizer's files and generation_config.json with all tokens that end an answer.

    Tied weights are written once, under their first name. Weights of more than `shard_bytes` become several files with
    an index. Every file appears whole or not at all, the weights all at once (an older save's shards go), config.json
    last. template: the chat template that the model was trained with, where it is not the tokenizer's own. merge: the
    model as `merged_state` has it, dense, with the active adapters in its weights, of which one at a time is made.
    Raises InputError for the folder that the model came from, or one in it, for adapters that are not merged, which
    save_adapter saves, and for types that `load_model` does not read; NumericError for NaN or infinity, by tensor,
    before anything is written; DiskError when the disk refuses."""
    model, source = unwrapped(model), getattr(model, "source", "")
    check_apart(folder, f"the folder {folder}", [source], folder=True)
    folder, own = Path(folder), merged_state(model) if merge else weights_of(model)
    first = {weight_id(value): (name, value) for name, value in reversed(own.items())}
    packed = [layer for layer in own.values() if isinstance(layer, Module4bit)]
    tensors: dict[str, Tensor] = {}
    modules = {} if merge else plain_modules(model)
    turned = {f"{path}.weight" for path, part in modules.items() if getattr(part, "conv1d", False)}
    for name, value in list(first.values())[::-1]:
        if isinstance(value, Module4bit):
            tensors |= packed_tensors(name, value)
        else:
            tensors[name] = value.t().contiguous() if name in turned else value
    for name, tensor in tensors.items():
        if tensor.dtype not in (*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool):
            raise InputError(f"{name} ({tensor.dtype}) is of a type that `load_model` does not read: cast it first")
        check_finite(name, tensor)
    _write_weights(folder, list(_shards(tensors, shard_bytes)))
    if merge or not save_low_rank(model, folder):
        drop_low_rank(folder)
    settings: dict[str, Any] | None = settings_of(model) if is_transformers(model) else None
    if isinstance(model, CausalLM):
        settings = model.settings()
    if settings is None:
        return
    dtype = next(value.dtype for value in own.values() if value.dtype.is_floating_point)
    settings["torch_dtype"] = str(dtype).removeprefix("torch.")
    if settings.get("tie_word_embeddings") and "lm_head.weight" in tensors:
        settings["tie_word_embeddings"] = False  # its own now, as after a merge
    if packed:
        linear = [path for path, part in plain_modules(model).items() if is_linear(part) and part not in packed]
        how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": linear}
        how |= {"bnb_4bit_quant_type": packed[0].quant_type, "bnb_4bit_use_double_quant": packed[0].double_quant}
        settings["quantization_config"] = how | {"bnb_4bit_compute_dtype": settings["torch_dtype"]}
    ids = {} if tokenizer is None else _token_ids(tokenizer)
    if isinstance(model, CausalLM):  # null where nobody says it: transformers has defaults of its own
        settings |= {name: _of_base(source, "config.json").get(name) for name in TOKEN_IDS}
    settings |= ids
    with disk_errors("the model", folder, len(str(settings))):
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder, template)
            generation = _of_base(source, GENERATION) | ids
            write_text(folder / GENERATION, json.dumps(generation, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def save_tokenizer(tokenizer: Tokenizer, folder: Path, template: str | None = None) -> None:
    """Write the tokenizer's files: those of the folder it came from, or tokenizer.json and tokenizer_config.json
    (special tokens, chat template). `template` stands in the place of its own chat template."""
    home = Path(tokenizer.source)
    if tokenizer.source and (home / TOKENIZER_FILES[0]).is_file():
        own = {name: home / name for name in TOKENIZER_FILES if (home / name).is_file()}
        kept = {name: file.read_bytes() for name, file in own.items() if file.stat().st_size <= TOKENIZER_BYTES}
    else:
        settings: dict[str, Any] = {**tokenizer.named_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
        said = {"chat_template": tokenizer.chat_template, "add_bos_token": tokenizer.adds_bos}
        settings |= {name: value for name, value in said.items() if value is not None}
        texts = tokenizer.backend.to_str(pretty=True), json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        kept = {name: text.encode() for name, text in zip(TOKENIZER_FILES, texts, strict=False)}
    if template is not None:
        kept[TEMPLATE] = template.encode()
    for name in TOKENIZER_FILES:
        if name in kept:
            write_whole(folder / name, partial(Path.write_bytes, data=kept[name]))
        else:
            (folder / name).unlink(missing_ok=True)  # an older save's, which would be read with the new ones


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Special tokens as config.json and generation_config.json name them, those that there are."""
    stops = sorted(tokenizer.stop_ids, key=lambda stop: stop != tokenizer.eos_id)  # the first may be used for padding
    eos = None if not stops else stops[0] if len(stops) == 1 else stops
    found = zip(TOKEN_IDS, (tokenizer.bos_id, eos, tokenizer.pad_id), strict=True)
    return {name: value for name, value in found if value is not None}


def _of_base(source: str, name: str) -> dict[str, Any]:
    """A JSON file of the base's, where there is one that can be read."""
    with contextlib.suppress(InputError):
        return read_json(Path(source) / name, CONFIG_BYTES) if source else {}
    return {}


def _shards(tensors: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in their order, cut before the one that would make a file larger than `limit` bytes."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(map(size_of, shard.values())) + size_of(tensor) > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _write_weights(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    """One file, or several and an index: what is read changes at once, when the last file takes or loses its name.

    Shards get names that no file has yet, so those that an older index names stay whole until then, and go afterwards;
    so do the new ones if the save fails."""
    old, names = set[str](), list[str]()
    with contextlib.suppress(InputError):  # a broken index is replaced
        old = _indexed(folder)
    try:
        if len(shards) == 1:
            write_tensors(folder / SINGLE, shards[0], "the model")
        else:
            names += _fresh_names(folder, len(shards))
            for name, shard in zip(names, shards, strict=True):
                write_tensors(folder / name, shard, "the model")
            size = sum(size_of(tensor) for shard in shards for tensor in shard.values())
            places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n"
            with disk_errors("the model", folder, len(text)):
                write_text(folder / INDEX, text)
        with disk_errors("the model", folder, 0):  # readers prefer the single file to an index
            (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(InputError, OSError):  # a leftover costs space, not correctness
            for name in {*old, *names} - _indexed(folder):
                (folder / name).unlink(missing_ok=True)


def _fresh_names(folder: Path, count: int) -> list[str]:
    """As transformers names shards; with something of this save's own where such files are there already."""
    for own in ("", f"{secrets.token_hex(4)}-"):
        names = [f"model-{own}{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if not any((folder / name).exists() for name in names):
            break
    return names


def _indexed(folder: Path) -> set[str]:
    return {name for name in indexed(folder) if _SHARD.fullmatch(name)}  # a stranger's index may name any file
