"""A checkpoint on disk to a model in memory, one tensor at a time.

The model is built on the meta device, where shapes cost nothing; names and shapes are compared with the file's before
the first weight is read; then each tensor goes straight to its place, quantised if it is a linear layer's. So the peak
is the finished model plus about one dense tensor, and a wrong file fails in the first second.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import EnvironmentProblem, InputError
from ..files import misfits, read_json
from ..kernels.weight4bit import check_format
from ..lora.linear4bit import NF4Linear
from ..lora.quantize import quantize_
from ..settings import DType, floating
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_folder import folder_tokenizer
from . import gguf_model, hf
from .decoder import Decoder
from .families import read_spec
from .gguf import GGUFFile
from .gguf_tokenizer import gguf_tokenizer
from .protocol import CausalLM

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(
    path: str | Path,
    *,
    quant_type: str | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: DType = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Decoder, Tokenizer]:
    """Model and tokenizer of a Hugging Face folder or a `.gguf` file; arguments and errors as in `load_model`, and
    InputError where the tokenizer is missing or has more tokens than the model has embeddings.
    """
    tokenizer = load_tokenizer(path)
    model = load_model(
        path, quant_type=quant_type, double_quant=double_quant, blocksize=blocksize, dtype=dtype, device=device
    )
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


def load_model(
    path: str | Path,
    *,
    quant_type: str | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: DType = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """The model alone, in evaluation mode, all parameters as trainable as their layer makes them.

    `quant_type`: None keeps every weight dense in `dtype`; "nf4" and "fp4" keep the decoder's linears in 4 bits, in the
    form that `quantize_` describes, and embeddings, norms, biases and the output head dense in `dtype`. Of a tied model
    the file may hold either tensor, or both; where the two differ it is loaded untied, as transformers does.
    Raises InputError naming the file, key or tensor for a config that asks for something that is not supported, a
    missing, unknown, misshaped or non-finite tensor, and for an unreadable file; EnvironmentProblem for a device that
    is not there.
    """
    path, device, dtype = Path(path), _device(device), floating(dtype)
    if quant_type is not None:
        try:
            check_format(quant_type, blocksize)
        except ValueError as problem:
            raise InputError(f"{problem}; quant_type=None keeps the model dense") from None
    found = _opened(path)
    if isinstance(found, GGUFFile):
        spec, shapes = gguf_model.read_spec(found), gguf_model.tensor_shapes(found)
        tensors = gguf_model.iter_tensors(found, spec)
    else:
        spec = read_spec(read_json(found / "config.json", hf.CONFIG_BYTES))
        shapes, tensors = hf.tensor_shapes(found), hf.iter_tensors(found)
    tied = spec.tie_word_embeddings
    renamed = {HEAD: EMBEDDING} if tied and EMBEDDING not in shapes else {}
    shapes = {renamed.get(name, name): shape for name, shape in shapes.items()}
    both = tied and HEAD in shapes
    with torch.device("meta"), _NoInitialValues():
        model = Decoder(replace(spec, tie_word_embeddings=tied and not both))
    skip = _check_tensors(path, model, shapes)
    if quant_type is not None:
        quantize_(model, quant_type, blocksize=blocksize, double_quant=double_quant)
    for name, tensor in tensors:
        if name not in skip:
            _place(model, renamed.get(name, name), tensor, dtype, device, path)
    if tied and (not both or torch.equal(model.get_parameter(HEAD), model.get_parameter(EMBEDDING))):
        model.spec, model.lm_head.weight = spec, model.model.embed_tokens.weight
    model.source = str(path)
    return model.eval()


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


def _device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f"device must be one that torch knows, such as cpu or cuda, got {device!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(f"device {device} was asked for, but torch sees no CUDA device here. Use cpu.")
    return device


def _check_tensors(path: Path, model: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Compare names and shapes; returns the file's names to skip: old rotary buffers."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    if model.spec.tie_word_embeddings:
        del wanted[HEAD]
    skip = {name for name in shapes.keys() - wanted.keys() if name.endswith(".rotary_emb.inv_freq")}
    if wrong := misfits(wanted, {name: shape for name, shape in shapes.items() if name not in skip}):
        tied = " A head that is the embedding needs tie_word_embeddings true." if HEAD in wanted.keys() - shapes else ""
        raise InputError(
            f"{path}: tensors do not fit the config. {wrong} The weights and the config are of different models.{tied}"
        )
    return skip


def _place(model: Decoder, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, path: Path) -> None:
    """Put one tensor where it belongs; a 4-bit layer's weight is quantised on the way and not kept."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, NF4Linear) and attribute == "weight":
        module.quantize_weight_(tensor.to(device), name=f"{path}: {name}")
        module.dtype = dtype
        return
    extremes = torch.stack(torch.aminmax(tensor))  # NaN spreads to both; no copy of the tensor is made
    if not extremes.isfinite().all():
        raise InputError(f"{path}: tensor {name!r} holds NaN or infinity. The file is damaged: get it again.")
    if not extremes.to(dtype).isfinite().all():
        largest = extremes.abs().max().item()
        holds = largest <= torch.finfo(torch.bfloat16).max
        way = "Load the model in bfloat16 or float32 (dtype=...)" if holds else "Only float64 holds it, in Python"
        raise InputError(f"{path}: tensor {name!r} holds {largest:.3g}, too large for {dtype}. {way}.")
    old = getattr(module, attribute)
    value = tensor.to(device=device, dtype=dtype, copy=True)  # the file's map must not live on in the model
    setattr(module, attribute, nn.Parameter(value, requires_grad=old.requires_grad))
