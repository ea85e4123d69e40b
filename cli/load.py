"""Loading what a command's options name, and the choices that `auto` makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch

from ..data.template import FILE as TEMPLATE
from ..data.template import ChatTemplate, template_for
from ..errors import EnvironmentProblem, InputError
from ..files import read_json, regular_file
from ..kernels.dispatch import multiplies_bf16
from ..lora.linear4bit import Module4bit
from ..lora.merge import merging
from ..lora.peft_files import load_adapter, trained_base
from ..lora.quantize import quantize_
from ..models.config import DROPOUTS
from ..models.decoder import Decoder
from ..models.generate import KeepDense, dense_room
from ..models.hf import CONFIG_BYTES
from ..models.load import check_tokenizer, find_device, load_decoder, load_tokenizer, read_shape, read_weights
from ..models.protocol import CausalLM
from ..settings import checked
from ..text.tokenizer import Tokenizer
from ..trainer.reward_model import HEAD
from ..trainer.rewards import Rewards, files_of, rewards_of
from .config_file import CONFIG, read_run
from .options import AdaptedModelOptions, ModelOptions, Quant
from .show import amount, note, working

# --quant's words: what people read, and load_decoder's arguments
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("dense", {}),
    "nf4": ("NF4 with double quantisation", {"quant_type": "nf4"}),
    "nf4-nodq": ("NF4", {"quant_type": "nf4", "double_quant": False}),
}


def choose_device(name: str) -> str:
    """The device that `--device NAME` means. Raises InputError or EnvironmentProblem for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(find_device(name))


def choose_dtype(name: str, device: str, *runs: str | None) -> str:
    """The dtype that `--dtype NAME` means on a device. auto: bfloat16 where it multiplies that, unless the first of
    `runs`, folders of adapters or models, was trained in float32. EnvironmentProblem for bfloat16 on a GPU without it.
    """
    able = multiplies_bf16(torch.device(device))
    if name == "bfloat16" and device.startswith("cuda") and not able:
        raise EnvironmentProblem("--dtype bfloat16: this GPU cannot do that; use float32 (or float16, not to train)")
    then = next((dtype for run in runs if run is not None and (dtype := read_run(run).get("dtype"))), None)
    return name if name != "auto" else "bfloat16" if able and then != "float32" else "float32"


def planned(options: ModelOptions) -> tuple[str, str]:
    """The kind of device that a forecast is for, which need not be here, and the dtype there."""
    kind = "cuda" if options.device.startswith("cuda") else choose_device(options.device)
    here = kind == "cpu" or torch.cuda.is_available()
    return kind, options.dtype if options.dtype != "auto" else choose_dtype("auto", kind) if here else "bfloat16"


def open_tokenizer(path: str, name: str = "model") -> Tokenizer:
    """The tokenizer of the model that the option `name` names; InputError where nothing is there."""
    if not Path(path).exists():
        raise InputError(f"{name} {path} does not exist; give a Hugging Face folder or a .gguf file")
    return load_tokenizer(path)


def load_weights(options: ModelOptions, tokenizer: Tokenizer, quant: str) -> CausalLM:
    """The model that the options name; prints what was loaded. Raises InputError if the tokenizer is not its own."""
    if getattr(options, "dry_run", False):  # on meta: no byte of a weight is read
        unfilled, in_4_bits = read_shape(Path(options.model))
        if how := FORMS["nf4" if in_4_bits or is_packed(Path(options.model)) else quant][1]:
            quantize_(unfilled, **how)
        return unfilled.to(getattr(torch, planned(options)[1]))
    device, (form, arguments) = choose_device(options.device), FORMS[quant]
    dtype = choose_dtype(options.dtype, device, options.model)
    with working(f"loading {options.model}") as progress:
        model = load_decoder(options.model, **arguments, dtype=dtype, device=device, progress=progress)
    check_tokenizer(model, tokenizer)
    packed = [module for module in model.modules() if isinstance(module, Module4bit)]
    inside = {id(parameter) for module in packed for parameter in module.stored_parameters().values()}
    size = sum(prod(module.shape) for module in packed)
    size += sum(p.numel() for p in model.parameters() if id(p) not in inside)
    form = "4 bits as it has them" if packed and quant == "none" else form
    note(f"model: {options.model}, {amount(size)} parameters, {form} and {dtype} on {device}")
    dropped = [key for key in DROPOUTS if isinstance(model, Decoder) and model.spec.config.get(key)]
    if dropped:
        note(f"note: training is without the {' and '.join(dropped)} of its config.json; --dropout is the adapter's")
    return model


def trained(model: str, adapter: str | None) -> tuple[Quant | None, Path | None]:
    """The 4-bit form and the template's file that `adapter`, or without one `model`, was trained with, as far as its
    files say. Raises InputError for those that are damaged."""
    if adapter is None:  # its own files hold its template
        return checked(f"{model}/{CONFIG}: quant", read_run(model).get("quant"), Quant | None), None
    base, file = trained_base(Path(adapter)), Path(adapter) / TEMPLATE
    quant: Any = base.quant if base is not None and base.quant in get_args(Quant) else None
    return quant, regular_file(file.parent, TEMPLATE) if file.exists() else None


def settle(options: ModelOptions, tokenizer: Tokenizer, *adapters: str | None) -> tuple[Quant, ChatTemplate]:
    """The 4-bit form and the template of a command: those it was given, else those that the first of these adapters, or
    the model, was trained with. Notes where the template is from there, or another one; of reward models too, which
    read what the model writes as it is."""
    judges = [str(place) for place in files_of(getattr(options, "reward", ())) if place.is_dir()]
    found = [trained(options.model, adapter) for adapter in (*(adapters or (None,)), *judges)]
    forms, templates = zip(*found, strict=True)
    kept = next(filter(None, templates), None)
    template = template_for(tokenizer, kept if options.template is None else options.template)
    if kept and options.template is None:
        note(f"template: {kept}, as in training")
    for other in dict.fromkeys(filter(None, templates)):
        if template_for(tokenizer, other).portable() != template.portable():
            note(f"note: {other.parent} was trained with another template, {other.name} there")
    return options.quant or ("none" if is_packed(Path(options.model)) else forms[0] or "nf4"), template


def is_packed(folder: Path) -> bool:
    """Whether a model folder is in 4 bits already; it is used as it is."""
    config = read_json(folder / "config.json", CONFIG_BYTES) if (folder / "config.json").is_file() else {}
    how = config.get("quantization_config")
    return isinstance(how, dict) and how.get("quant_method") == "bitsandbytes"


def load_adapted(options: AdaptedModelOptions) -> tuple[CausalLM, Tokenizer, ChatTemplate]:
    """Model with the adapter on it, tokenizer and template, as `settle` says."""
    if options.adapter is not None:
        check_adapter(options.adapter)
    tokenizer = open_tokenizer(options.model)
    quant, template = settle(options, tokenizer, options.adapter)
    dtype: Any = choose_dtype(options.dtype, choose_device(options.device), options.adapter, options.model)
    model = load_weights(replace(options, dtype=dtype), tokenizer, quant)
    if options.adapter is not None:
        note(f"adapter: {options.adapter}, on {put_adapter(model, options.adapter, options.force)} layers")
    return model, tokenizer, template


@contextmanager
def answering(model: CausalLM, keep: KeepDense, rows: int = 1) -> Iterator[None]:
    """A block to generate so many rows at a time in, `merging` in what `dense_room` says."""
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    with merging(model, dense_room(like, keep), rows=rows) as held:
        if held:
            note(f"note: {held / 2**20:,.1f} MiB of decoded weights are held while it answers")
        yield


def put_adapter(model: CausalLM, folder: str, force: bool, **how: Any) -> int:
    """Load an adapter as `load_adapter` does, and note how its base differs. Returns the number of its layers."""
    how |= {"dense": read_weights(model.source), "tell": lambda text: note(f"note: {text}")}
    return len(load_adapter(model, folder, force=force, **how))


def rewards_for(options: Any, model: CausalLM, failed: float | None = None) -> Rewards:
    """What the options say that answers earn; notes how a reward model's base differs."""
    how: dict[str, Any] = {"seconds": options.reward_seconds, "force": options.force, "failed": failed}
    return rewards_of(options.reward, model, tell=lambda text: note(f"note: {text}"), **how)


def remark_positions(model: CausalLM, longest: int, new: int = 0, *, whose: str = "model") -> None:
    """A note where the longest text, with `new` tokens of an answer, goes beyond the positions that the model has."""
    most = model.max_positions
    if most is not None and longest + new > most:
        answers, end = (f" with {new:,} new ones", "answers end there") if new else ("", "it was not made for more")
        note(f"note: texts of up to {longest:,} tokens{answers} go beyond the {whose}'s {most:,} positions; {end}")


def is_reward_model(folder: str) -> bool:
    """Whether `fourbit reward` made this folder."""
    return (Path(folder) / HEAD).is_file()


def check_adapter(folder: str, name: str = "adapter", *, writes: bool = True) -> None:
    """InputError for a folder without an adapter, or with that of a model that is to write and can only score."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputError(f"{name} {folder} is no folder with adapter_config.json; fourbit sft writes one (--out)")
    if writes and is_reward_model(folder):
        raise InputError(f"{name} {folder} is a reward model's: it scores answers and writes none")
