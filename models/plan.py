"""A precision plan: which weights of a checkpoint are in 4 bits, and in which form; and the folder that it makes.

By hand a plan is a JSON file from layers to forms. Under a byte budget it is chosen by measured error: each layer
starts in its smallest form, and bytes go, one step of one layer at a time, where they take away most error each, while
they last. A layer's error is |W - W'|^2 / |W|^2 for each of its values: what follows a layer is normalised, so only the
share that is wrong counts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..files import disk_errors, read_json, write_text
from ..kernels.dequantize4bit import dequantize
from ..kernels.quantize4bit import quantize
from ..lora.config import checked_names, pattern_key
from ..lora.linear4bit import is_conv1d, weight_id
from ..lora.quantize import Form, quantizable, uniform_plan
from ..lora.targets import check_patterns_used
from ..outputs import check_apart
from ..settings import LARGEST, DType, floating, read_fields
from .load import Progress, check_tokenizer, kept_in_fp32, load_decoder, load_tokenizer, read_model, weights_of
from .save import save_model

REPORT = "quantization.json"
LINE = 250  # bytes that a tensor takes in a file's header at most
BESIDE = 1400 + 6 * LINE  # that a 4-bit weight has beside it at most: code tables, the text of its form, six lines
BLOCKSIZES = 256, 128, 64, 32  # that a budget chooses among; scales without double quantisation are never worth theirs


@dataclass(frozen=True)
class Choice:
    """A layer in a form, as a plan's file has it; quant_type None: dense."""

    quant_type: Literal["nf4", "fp4"] | None = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    bytes: int = 0  # in a file, at most
    relative_error: float = 0.0  # |W - W'| / |W|
    values: int = 0

    @property
    def form(self) -> Form | None:
        return None if self.quant_type is None else Form(self.quant_type, self.blocksize, self.double_quant)

    @property
    def said(self) -> str:
        nodq = "" if self.double_quant else "-nodq"
        return "dense" if self.quant_type is None else f"{self.quant_type}{nodq}/{self.blocksize}"

    @property
    def loss(self) -> float:
        """What a plan makes small: the squared error, as the number of values that it would wipe out."""
        return self.values * self.relative_error**2


def read_plan(file: str | Path) -> dict[str, Form | None]:
    """Layer -> form of a JSON file such as {"down_proj": {"blocksize": 32}, "lm_head": null}, or of a report. Keys are
    those of rank_pattern: regular expressions for the end of a path, of which the first that fits counts. None: dense.
    InputError names the key and what is wrong."""
    plan = dict[str, Form | None]()
    for key, form in read_json(Path(file), 64 << 20).items():
        where = f"{file}: {checked_names(f'{file}: a key', key)!r}"
        plan[key] = read_fields(Choice, {"quant_type": None} if form is None else form, where).form
    return plan


def choose(choices: Mapping[str, Sequence[Choice]], budget: int, fixed: int = 0) -> dict[str, Choice]:
    """One of each layer's choices, at most `budget` bytes with `fixed` ones of all else; InputError says the least."""
    chosen = {path: min(own, key=lambda choice: (choice.bytes, choice.loss)) for path, own in choices.items()}
    least = fixed + sum(choice.bytes for choice in chosen.values())
    if (left := budget - least) < 0:
        raise InputError(f"budget must be at least {least:,} bytes, the fewest that a choice takes, got {budget:,}")
    while steps := [
        ((each.loss - now.loss) / (each.bytes - now.bytes), path, each.bytes, each)
        for path, now in chosen.items()
        for each in choices[path]
        if now.bytes < each.bytes <= now.bytes + left and each.loss < now.loss
    ]:
        _, path, size, best = min(steps, key=lambda step: step[:3])
        chosen[path], left = best, left - (size - chosen[path].bytes)
    return chosen


def measured(weight: Tensor, form: Form | None, dtype: torch.dtype, what: str) -> Choice:
    """A weight in a form, or dense in `dtype`. `what` is what an InputError calls one that holds NaN or infinity."""
    exact = weight.float()
    try:
        found = weight.to(dtype) if form is None else dequantize(quantize(weight, *form))
    except ValueError as problem:
        raise InputError(f"{what}: {problem}") from None
    size = found.nbytes + LINE if form is None else form.size(tuple(weight.shape)) + BESIDE
    norm, error = (part.norm(dtype=torch.float64).item() for part in (exact, exact - found.float()))
    how: dict[str, Any] = {"quant_type": None} if form is None else form._asdict()
    return Choice(**how, bytes=size, relative_error=error / norm if norm else 0.0, values=weight.numel())


def quantize_checkpoint(
    path: str | Path,
    folder: str | Path,
    form: Form | None = None,
    *,
    plan: Mapping[str, Form | None] | None = None,
    budget: int | None = None,
    dtype: DType = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Choice]:
    """Write a model folder or .gguf file as a 4-bit folder, which `fourbit.load` opens, and transformers with
    bitsandbytes where embeddings and fused experts are dense; return each layer's form and error, which go beside the
    weights as quantization.json, a plan too.

    Linear layers but the head are in `form`, by default NF4 as `quantize_` has it, or what `plan` says of them; a head
    or embedding that it names is in 4 bits too, of tied ones both. `budget`: bytes of the weights' files; layers
    that the plan names keep its form, the others are chosen by measured error, dense in `dtype` at best. Two passes
    over the file; memory is that of the finished model and a dense weight, or of a weight in fp32 three times.
    Raises InputError as `load`, `quantize_` and `save_model` do, for a plan's key that fits no layer, and for a budget
    that no choice meets, saying the least that is possible; DiskError when the disk refuses."""
    check_apart(folder, f"the folder {folder}", [path], folder=True)
    form, plan, dtype = (form or Form()).checked(), plan or {}, floating(dtype)
    for each in filter(None, plan.values()):
        each.checked()
    tokenizer = load_tokenizer(path)
    model, spec, packed, tensors = read_model(Path(path))
    check_tokenizer(model, tokenizer)
    if packed:
        raise InputError(f"{path}: {next(iter(packed))!r} is in 4 bits already: give what it was made from")
    layers = quantizable(model, True)
    check_patterns_used("plan", dict.fromkeys(plan, 0), list(layers))
    first = {weight_id(layer): own for own, layer in reversed(layers.items())}  # of those that share a weight
    named = dict[str, Form | None]()
    for own, key in [(own, key) for own in layers if (key := pattern_key(plan, own)) is not None]:
        if named.setdefault(other := first[weight_id(layers[own])], plan[key]) != plan[key]:
            raise InputError(f"plan: {own!r} shares its weight with {other!r}, for which the plan has another form")
    forms, choices = uniform_plan(model, form) | named, dict[str, list[Choice]]()
    head, tied = "lm_head.weight", list[Tensor]()
    for name, weight in tensors:
        if (layer := name.removesuffix(".weight")) in forms:
            free = budget is not None and layer not in named
            offered = [*(form._replace(blocksize=size) for size in BLOCKSIZES), None] if free else [forms[layer]]
            weight = weight.t() if is_conv1d(layers[layer]) else weight  # as 4 bits keep it
            choices[layer] = [measured(weight, each, dtype, f"{path}: {name!r}") for each in offered]
        elif spec is not None and spec.tie_word_embeddings and name.endswith((head, "embed_tokens.weight")):
            tied.append(weight.to(dtype))
    once = len(tied) == 2 and torch.equal(*tied)  # a head that is the embedding is loaded tied
    tied.clear()
    wide, rest = kept_in_fp32(model), {weight_id(x): (name, x) for name, x in reversed(weights_of(model).items())}
    fixed = sum(
        LINE + x.numel() * (torch.float32 if wide(name) else dtype if x.is_floating_point() else x.dtype).itemsize
        for name, x in rest.values()
        if isinstance(x, Tensor) and name.removesuffix(".weight") not in choices and not (once and name == head)
    )
    chosen = choose(choices, LARGEST if budget is None else budget, fixed)
    made = {layer: choice.form for layer, choice in chosen.items()}
    save_model(load_decoder(path, plan=made, dtype=dtype, device=device, progress=progress), folder, tokenizer)
    text = json.dumps({layer: asdict(choice) for layer, choice in chosen.items()}, indent=1)
    with disk_errors("the report", Path(folder), len(text)):
        write_text(Path(folder) / REPORT, text + "\n")
    return chosen
