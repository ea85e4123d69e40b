"""A checkpoint on disk to a model in memory, one tensor at a time.

The model is built on the meta device, where shapes cost nothing; names and shapes are compared with the file's before
the first weight is read; then each tensor goes straight to its place, quantised if it is a linear layer's. So the peak
is the finished model plus about one dense tensor, and a wrong file fails in the first second.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import EnvironmentProblem, InputError, shown
from ..files import COUNTS, misfits, read_json
from ..kernels.dispatch import multiplies_bf16
from ..lora.layer import adapter_layers, plain_modules, plain_name, replace_modules, unwrapped
from ..lora.linear4bit import Module4bit, NF4Embedding, NF4Linear, is_embedding, was_conv1d, weight_id
from ..lora.lora import is_linear
from ..lora.merge import load_low_rank
from ..lora.parameter4bit import NF4Parameter, StandIn
from ..lora.peft_files import CONFIG
from ..lora.quantize import Form, quantize_, quantize_by_plan_
from ..lora.targets import expose
from ..settings import DType, floating
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_folder import folder_tokenizer
from . import gguf_model, hf
from .decoder import Decoder
from .families import FAMILIES, read_spec
from .foreign import as_causal_lm, converted, empty
from .gguf import GGUFFile
from .gguf_tokenizer import gguf_tokenizer
from .moe import stacked
from .protocol import CausalLM
from .spec import Spec

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Progress = Callable[[int, int, int, int], object]
Tensors = Iterator[tuple[str, Tensor]]


def load(
    path: str | Path,
    *,
    quant_type: str | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: DType = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[CausalLM, Tokenizer]:
    """Model and tokenizer of a Hugging Face folder or a `.gguf` file; arguments and errors as in `load_decoder`, and
    InputError where the tokenizer is missing or has more tokens than the model has embeddings."""
    tokenizer = load_tokenizer(path)
    form: dict[str, Any] = {"quant_type": quant_type, "double_quant": double_quant, "blocksize": blocksize}
    model = load_decoder(path, **form, dtype=dtype, device=device, progress=progress)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer alone, without reading a weight: enough to look at data. Raises InputError where it is missing."""
    found = _opened(Path(path))
    tokenizer = gguf_tokenizer(found.metadata) if isinstance(found, GGUFFile) else folder_tokenizer(found)
    tokenizer.source = str(path)
    return tokenizer


def check_tokenizer(model: CausalLM, tokenizer: Tokenizer) -> None:
    """Raise InputError when the tokenizer can yield a token that the model has no embedding for."""
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"{model.source}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
            f"{model.vocab_size} embeddings; they belong to different models."
        )


def load_decoder(
    path: str | Path,
    *,
    quant_type: str | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: DType = torch.float32,
    device: torch.device | str = "cpu",
    plan: Mapping[str, Form | None] | None = None,
    progress: Progress | None = None,
) -> CausalLM:
    """The model alone, in evaluation mode, all parameters as trainable as their layer makes them.

    `dtype`: "auto" is bfloat16 where the device (GPU or CPU) multiplies it, else float32.
    `quant_type`: None keeps every weight dense in `dtype`; "nf4" and "fp4" keep the decoder's linears in 4 bits, in the
    form that `quantize_` describes, and embeddings, norms, biases and the output head dense in `dtype`; `plan` says
    the form of each layer instead (`quantize_by_plan_`). What the file has in 4 bits stays as it is, with the adapter
    beside it that `fourbit merge` has put there. Of a tied model
    the file may hold either tensor, or both; where the two differ it is loaded untied, as transformers does, if its
    family is built in, and refused if not.
    `progress` is called after each tensor with their number, that of all, the bytes of the file so far, and of all.
    Raises InputError naming the file, key or tensor for a config that asks for something that is not supported, a
    missing, unknown, misshaped or non-finite tensor, and for an unreadable file; EnvironmentProblem for a device that
    is not there."""
    path, device = Path(path), find_device(device)
    if dtype == "auto":
        dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    dtype = floating(dtype)
    if quant_type is not None:
        Form(quant_type, blocksize, double_quant).checked()
    model, spec, layers, tensors = read_model(path, progress)
    if plan is not None:
        quantize_by_plan_(model, plan)
    elif quant_type is not None:
        quantize_(model, quant_type, blocksize=blocksize, double_quant=double_quant)
    for name, layer in layers.items():
        its = layer.quant_type, layer.blocksize, layer.double_quant
        if quant_type is not None and its != (quant_type, blocksize, double_quant):
            raise InputError(f"{path}: {name!r} is in 4 bits already, as {its}: give quant_type=None")
        layer.to(device).dtype = dtype
    _put_layers(model, layers, path)
    _fill(model, tensors, path, dtype, device)
    if isinstance(model, Decoder) and spec is not None:
        dense = type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
        untied = spec.tie_word_embeddings and not model.spec.tie_word_embeddings
        if untied and dense and torch.equal(model.get_parameter(HEAD), model.get_parameter(EMBEDDING)):
            model.spec, model.lm_head.weight = spec, model.model.embed_tokens.weight
    model.source = str(path)
    if layers and (path / CONFIG).is_file():
        load_low_rank(model, path)
    model.to(device).eval()  # buffers too
    model.head()  # asked now, so that a model whose logits cannot be followed is refused
    return model


def read_model(
    path: Path, progress: Progress | None = None
) -> tuple[CausalLM, Spec | None, dict[str, Module4bit], Tensors]:
    """What a folder or .gguf file says of its model: the model on meta, untied where the file has a tied one's head
    beside its embedding; its Spec; what is in 4 bits already, by the weights' names; all other tensors, by the model's
    names, after each of which `progress` is called. InputError as `load_decoder`, for names and shapes."""
    found, spec, layers = _opened(path), None, dict[str, Module4bit]()
    if isinstance(found, GGUFFile):
        spec, shapes, files = gguf_model.read_spec(found), gguf_model.tensor_shapes(found), [path]
        tensors = gguf_model.iter_tensors(found, spec)
    else:
        data = read_json(found / "config.json", hf.CONFIG_BYTES)
        spec = read_spec(data) if data.get("model_type") in [*FAMILIES] else None
        layers, pieces = hf.packed_layers(found)
        shapes, tensors = hf.tensor_shapes(found, () if spec else COUNTS, pieces), hf.iter_tensors(found, pieces)
        files = [found / name for name in hf.weight_files(found)]
    if spec is None:
        model = as_causal_lm(whole := empty(data, f"{path}/config.json", str(path)))
        named = partial(converted, whole, [*weights_of(whole)])
    else:
        there, tied = shapes.keys() | layers.keys(), spec.tie_word_embeddings
        alone = tied and EMBEDDING not in there and HEAD not in layers  # the embedding, under the head's name
        named = partial(_renamed, {HEAD: EMBEDDING} if alone else {}, spec.num_experts)
        with torch.device("meta"), _NoInitialValues():
            model = Decoder(replace(spec, tie_word_embeddings=tied and (alone or HEAD not in there)))
    made = [(name, tuple(x.shape)) for name, x in named((n, torch.empty(s, device="meta")) for n, s in shapes.items())]
    if len(fits := dict(made) | _sizes(layers)) < len(made) + len(layers):
        raise InputError(f"{path}: two of its tensors have one place in this {type(model).__name__}")
    _check_filled(model, fits, layers, path)
    return model, spec, layers, _told(named(tensors), [prod(shape) for _, shape in made], files, progress)


def read_shape(path: Path) -> tuple[CausalLM, bool]:
    """The model of a folder or .gguf file on meta, and whether it is in 4 bits already; of a folder without weights the
    one that its config.json says. InputError as `read_model`."""
    if path.is_file() or not (path / "config.json").is_file() or any(path.glob("*.safetensors*")):
        model, _, layers, _ = read_model(path)
        return model, bool(layers)
    data = read_json(path / "config.json", hf.CONFIG_BYTES)
    if data.get("model_type") not in FAMILIES:
        return as_causal_lm(empty(data, f"{path}/config.json", str(path))), False
    with torch.device("meta"), _NoInitialValues():
        return Decoder(read_spec(data)), False


def read_weights(path: str | Path) -> Tensors:
    """Names and dense weights of a model's folder or .gguf file, one at a time, for the starts of `attach`."""
    yield from read_model(Path(path))[3]


def _renamed(names: Mapping[str, str], experts: int, tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    kept = (own for own in stacked(tensors, experts) if not own[0].endswith(".rotary_emb.inv_freq"))
    return ((names.get(name, name), x) for name, x in kept)


def _told(tensors: Tensors, sizes: list[int], files: list[Path], progress: Progress | None) -> Tensors:
    """The tensors, of `sizes` values in all; after each `progress` is called."""
    total, values = sum(file.stat().st_size for file in files), 0
    for number, (name, tensor) in enumerate(tensors, 1):
        yield name, tensor
        values += tensor.numel()
        if progress is not None:
            progress(number, len(sizes), total * values // max(1, sum(sizes)), total)


def load_model(module: nn.Module, folder: str | Path) -> nn.Module:
    """Put the weights of a folder into `module`, whatever its class, and return it: what `save_model` wrote, or any
    folder of safetensors with the module's names. Linear layers that the file has in 4 bits become NF4Linear of the
    same bytes (of a bare one, that is what is returned), and dense weights of 4-bit layers are quantised. Others are
    cast to the dtype that they have in the module, or keep the file's where that is on meta, and are then on the CPU.

    Raises InputError, before anything is changed, for a broken file, tensors that are missing, unknown or of another
    shape, adapters on the module, and buffers on meta that no file holds; on the way, for NaN, infinity, values too
    large for the dtype, integers in the place of floats, and two different tensors for a tied weight."""
    path = Path(folder)
    layers, pieces = hf.packed_layers(path)
    _check_filled(module, hf.tensor_shapes(path, COUNTS, pieces) | _sizes(layers), layers, path)
    module = _put_layers(module, layers, path)
    _fill(module, hf.iter_tensors(path, pieces), path, None, torch.device("cpu"))
    if layers and (path / CONFIG).is_file():
        load_low_rank(module, path)
    return module


def _check_filled(module: nn.Module, shapes: Mapping[str, Any], layers: Mapping[str, Any], path: Path) -> None:
    """InputError unless tensors of these names and shapes, of which `layers` are in 4 bits, fill the module."""
    own, parts = weights_of(module), plain_modules(module)
    first = {weight_id(value): name for name, value in reversed(own.items())}  # a tied one's other names may be missing
    wanted = {name: size for name, size in _sizes(own).items() if name in shapes or first[weight_id(own[name])] == name}
    conv1d = {name for name in layers.keys() & wanted if was_conv1d(parts.get(name.removesuffix(".weight"), module))}
    wanted |= {name: wanted[name][::-1] for name in conv1d}
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in own]
    if wrong := misfits(wanted, shapes) or (f"No file holds the buffers {', '.join(lost[:4])}." if lost else ""):
        tied = " A head that is the embedding needs tie_word_embeddings true." if HEAD in wanted.keys() - shapes else ""
        raise InputError(f"{path}: its tensors do not fill this {type(module).__name__}. {wrong}{tied}")


def _fill(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Put each tensor in its place, in `dtype` (but what a model of transformers keeps in float32) or its own, and
    4-bit modules that share a weight on one again. InputError for a tensor that differs from one it is tied to."""
    own, layers = weights_of(module), [part for part in module.modules() if isinstance(part, Module4bit)]
    first = {weight_id(layer): layer for layer in reversed(layers)}
    twins = [(layer, first[weight_id(layer)]) for layer in layers if first[weight_id(layer)] is not layer]
    wide = kept_in_fp32(module)
    tied, kept = Counter(map(weight_id, own.values())), dict[int, tuple[str, Tensor]]()
    for name, tensor in tensors:
        place = own[name]
        if tied[weight_id(place)] > 1:
            other, value = kept.setdefault(weight_id(place), (name, tensor))
            if not torch.equal(value, tensor):
                raise InputError(f"{path}: {other!r} and {name!r} differ, and are one tied tensor here: untie it")
        given = dtype if dtype is not None and place.dtype.is_floating_point else tensor.dtype
        given = torch.float32 if dtype and wide(name) else given
        _place(place, tensor, given, device, f"{path}: tensor {name!r}")
    for twin, one in twins:
        twin.share(one)


def kept_in_fp32(module: nn.Module) -> Callable[[str], bool]:
    """Whether a model of transformers keeps the weight of a name in float32, whatever the rest is in."""
    wide = {n for part in module.modules() for n in getattr(part, "_keep_in_fp32_modules_strict", None) or ()}
    return lambda name: any(f".{part}." in f".{name}." for part in wide)


def weights_of(module: nn.Module) -> dict[str, Tensor | Module4bit]:
    """Every parameter and saved buffer by name, the 4-bit layer itself as its weight. InputError where adapters are."""
    if layers := adapter_layers(module):
        raise InputError(
            f"'{next(iter(layers))}' carries an adapter, which is no part of a whole model: save or load it by itself "
            "(save_adapter, load_adapter), and merge it or take it off (fourbit.remove_adapter) before this"
        )
    parts = plain_modules(module).items()
    packed = {path: part for path, part in parts if isinstance(part, Module4bit)}
    whole = {f"{path}.weight": path for path, part in parts if isinstance(part, StandIn)}
    inside = {id(tensor) for layer in packed.values() for tensor in layer.stored_parameters().values()}
    state = unwrapped(module).state_dict(keep_vars=True)
    dense = {plain_name(name): tensor for name, tensor in state.items() if id(tensor) not in inside}
    named = dense | {f"{path}.weight".strip("."): layer for path, layer in packed.items()}
    return {whole.get(name, name): value for name, value in named.items()}


def _sizes(weights: Mapping[str, Tensor | Module4bit]) -> dict[str, tuple[int, ...]]:
    """Shapes as a file has them dense."""
    turned = {name for name, own in weights.items() if isinstance(own, Module4bit) and own.conv1d}
    return {name: tuple(own.shape)[:: -1 if name in turned else 1] for name, own in weights.items()}


def _put_layers(module: nn.Module, layers: Mapping[str, Module4bit], path: Path) -> nn.Module:
    """`module` with a file's 4-bit layers in the places of their weights, and of what shares these where the file has
    nothing of its own for it; InputError first for a place that is none."""
    modules, new, experts = plain_modules(module), dict[nn.Module, nn.Module](), dict[str, NF4Parameter]()
    for name, layer in layers.items():
        place: Any = modules.get(name.rpartition(".")[0])
        if isinstance(layer, NF4Parameter):
            experts[name] = layer
            continue
        if not name.endswith("weight") or place is None or not (is_linear(place) or is_embedding(place)):
            raise InputError(f"{path}: {name!r} is in 4 bits, and what this model has there is no linear layer")
        if not place.weight.is_meta:
            layer.to(place.weight.device)
        tied = [part for own, part in modules.items() if f"{own}.weight".strip(".") not in layers.keys() - {name}]
        for part in [part for part in tied if part is place or weight_id(part) == weight_id(place) != id(None)]:
            twin: Module4bit = (NF4Embedding if is_embedding(part) else NF4Linear).of(layer.stored, layer.dtype)
            twin.share(layer)
            twin.conv1d = was_conv1d(part)
            if isinstance(twin, NF4Linear):
                twin.bias = part._parameters.get("bias")
            new[part] = twin.train(part.training)
    expose(module, list(experts))
    standing: Any = plain_modules(module)
    for layer, stood in ((layer, standing[name]) for name, layer in experts.items()):
        layer.place, layer.transposed = stood.place, stood.transposed
        new[stood] = layer if stood.weight.is_meta else layer.to(stood.weight.device)
    replace_modules(module, new)
    return new.get(module, module)


class _NoInitialValues(TorchFunctionMode):
    """Inside it `torch.nn.init` does nothing: on meta tensors it would import sympy, 67 MB and seconds for no value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


def _opened(path: Path) -> GGUFFile | Path:
    """What a model is read from: an open GGUF file or a folder."""
    if path.suffix.lower() == ".gguf":
        return GGUFFile(path)
    if path.is_dir():
        return path
    if path.suffix in hf.PICKLED:
        raise InputError(
            f"{path}: such files can run code when read, so they never are. "
            "Give a folder of safetensors or a .gguf file."
        )
    problem = "is a file" if path.exists() else "does not exist"
    raise InputError(f"{path}: {problem}; a model is a folder with config.json and safetensors, or a .gguf file.")


def find_device(device: torch.device | str) -> torch.device:
    """The device of a name. InputError for what is no name of one, EnvironmentProblem for one that is not there."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f"device must be cpu, cuda or cuda:N, got {shown(device)}.") from None
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise EnvironmentProblem(f"device {device}: torch sees {count or 'no'} CUDA devices here. Use cpu.")
    return device


def _place(own: Tensor | Module4bit, tensor: Tensor, dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Fill a tensor of the model's with the file's, or make it of that dtype there if it is on meta, so that tied ones
    stay tied; a 4-bit layer's weight is quantised on the way and not kept. `what` is what errors call it."""
    if isinstance(own, Module4bit):
        own.quantize_weight_((tensor.t().contiguous() if own.conv1d else tensor).to(device), name=what)
        own.dtype = dtype
        return
    dtype = dtype if own.is_meta else own.dtype
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise InputError(f"{what} holds {tensor.dtype}, and this model has {dtype} there.")
    if tensor.is_floating_point() and tensor.numel():
        extremes = torch.stack(torch.aminmax(tensor))  # NaN spreads to both; no copy of the tensor is made
        if not extremes.isfinite().all():
            raise InputError(f"{what} holds NaN or infinity. The file is damaged: get it again.")
        if not extremes.to(dtype).isfinite().all():
            largest = extremes.abs().max().item()
            holds = largest <= torch.finfo(torch.bfloat16).max
            way = "Load the model in bfloat16 or float32 (dtype=...)" if holds else "Only float64 holds it, in Python"
            raise InputError(f"{what} holds {largest:.3g}, too large for {dtype}. {way}.")
    if not own.is_meta:
        own.detach().copy_(tensor)
        return
    value = tensor.to(device=device, dtype=dtype, copy=True)  # the file's map must not live on in the model
    torch.utils.swap_tensors(own, nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value)
