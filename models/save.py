"""Writing a dense model as a Hugging Face folder, so that anything that reads those can load it."""

import json
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError, NumericError
from .protocol import CausalLM
from .tokenizer import Tokenizer


def save_model(model: CausalLM, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`, which is made if need be.

    model: a dense one without an adapter. Tied weights are written once, under the embedding's name.
    Raises InputError for a 4-bit model or one with an adapter, NumericError for NaN or infinity, by tensor.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _dense_state(model)
    settings = model.settings()
    if settings.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = settings | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (special tokens and chat template)."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    settings = {name: value for name in names if (value := getattr(tokenizer, name)) is not None}
    text = json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name not in names or not tensor.is_floating_point() or ".lora_" in name:
            raise InputError(f"only a dense model without an adapter can be saved as one; {name} belongs to neither")
        if not torch.isfinite(tensor).all():
            raise NumericError(f"{name} holds NaN or infinity; it is not saved")
    return state
