"""Loading the model that a command's options name, and the choices that `auto` makes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EnvironmentProblem, InputError
from ..lora.linear4bit import NF4Linear
from .config_file import read_config
from .options import AdaptedModelOptions, ModelOptions
from .show import amount, note, working

if TYPE_CHECKING:
    import torch

CONFIG = "config.yaml"  # what `fourbit sft` leaves in a run's folder


def choose_device(name: str) -> str:
    """The device that `--device NAME` means. Raises InputError or EnvironmentProblem for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isascii()) or (":" in name and not index.isdigit()):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("--device cuda: torch sees no CUDA device here; fourbit doctor tells more")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return name


def choose_dtype(name: str, device: str) -> "torch.dtype":
    """The dtype that `--dtype NAME` means on a device. Raises EnvironmentProblem for bfloat16 on a GPU without it."""
    import torch

    on_gpu = device.startswith("cuda")
    if name == "auto":
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if name == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise EnvironmentProblem("--dtype bfloat16: this GPU cannot compute in bfloat16; use float32 or float16")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_weights(options: ModelOptions, tokenizer: Any, quant: str) -> Any:
    """The model that the options name; prints what was loaded. Raises InputError if the tokenizer is not its own."""
    from ..models.load import check_tokenizer, load_model

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with working(f"loading {options.model}"):
        model = load_model(options.model, quantize=quant, dtype=dtype, device=device)
    check_tokenizer(model, tokenizer)
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    size = sum(m.in_features * m.out_features for m in packed) + sum(p.numel() for p in model.parameters())
    note(f"model: {options.model}, {amount(size)} parameters, {_form(quant)} and {_short(dtype)} on {device}")
    return model


def load_adapted(options: AdaptedModelOptions) -> tuple[Any, Any]:
    """Like `load_model`, with the adapter on it; the 4-bit form defaults to the one the adapter was trained on."""
    from ..lora.files import load_adapter
    from ..models.load import load_tokenizer

    run = run_settings(options.adapter or options.model)
    quant = options.quant or run.get("quant") or "nf4"
    if options.adapter is not None and not (Path(options.adapter) / "adapter_config.json").is_file():
        raise InputError(
            f"adapter {options.adapter} is no folder with adapter_config.json; fourbit sft writes one (--out)"
        )
    if options.adapter is not None and is_reward_model(options.adapter):
        raise InputError(f"adapter {options.adapter} is a reward model's: it scores answers and writes none")
    check_model(options.model)
    tokenizer = load_tokenizer(options.model)
    model = load_weights(options, tokenizer, quant)
    if options.adapter is not None:
        names = load_adapter(model, options.adapter)
        note(f"adapter: {options.adapter}, on {len(names)} layers")
        if (trained := run.get("quant")) and trained != quant:
            note(f"note: the adapter was trained on {trained}; on {quant} it will be somewhat off")
    return model, tokenizer


def run_settings(folder: str) -> dict[str, Any]:
    """What `fourbit sft` wrote about the run that made this folder; empty where there is nothing."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    return {name: setting.value for name, setting in read_config(str(path)).items()}


def is_reward_model(folder: str) -> bool:
    """Whether `fourbit reward` made this folder."""
    return (Path(folder) / "reward_head.safetensors").is_file()


def check_model(path: str) -> None:
    """InputError for a model that is not there."""
    if not Path(path).exists():
        raise InputError(f"model {path} does not exist; give a Hugging Face folder or a .gguf file")


def _form(quant: str) -> str:
    return {"none": "dense", "nf4": "NF4 with double quantisation", "nf4-nodq": "NF4"}[quant]


def _short(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
