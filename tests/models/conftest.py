"""Tiny random Llamas made by transformers, the oracle of these tests; ours with the same weights; memory in use."""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec

sys.path.append(str(Path(__file__).parent))  # for family_oracles

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Every shape feature at least once; odd sizes so that a swapped dimension cannot pass.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa 1:1": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa 2:1": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 56},
    "gqa 4:1": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64},
    "tied": {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "bias": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 3.0}},
    "wide head": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, "attention_bias": True},
    "narrow head": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-3},
}


def tiny_llama(seed: int = 0, **shape: Any) -> Any:
    """A random transformers Llama in fp32; a fresh one would hide faults, so norms and biases are random too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    defaults: dict[str, Any] = {**sizes, **heads, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    torch.manual_seed(seed)
    return randomise(LlamaForCausalLM(LlamaConfig(**defaults | shape)).eval())


@torch.no_grad()
def randomise(model: Any) -> Any:
    """Every weight drawn again."""
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2).add_("norm" in name)
    return model


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Any]:
    """`oracle("gqa 2:1")` or `oracle(hidden_size=...)`: a tiny transformers Llama."""
    return lambda kind=None, **shape: tiny_llama(**(SHAPES[kind] if kind else {}), **shape)


@pytest.fixture(scope="session")
def ours(oracle: Callable[..., Any]) -> Callable[..., Decoder]:
    """`ours("bias")`, `ours(theirs, torch.float64)`: our model with the oracle's weights."""

    def build(theirs: Any = None, dtype: torch.dtype = torch.float32, **shape: Any) -> Decoder:
        theirs = oracle(theirs, **shape) if isinstance(theirs, str | None) else theirs
        model = Decoder(read_spec(theirs.config.to_dict()))
        model.load_state_dict(theirs.state_dict())
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """`random_decoder(intermediate, layers, kv_heads)`: 97 tokens, 64 wide, four heads of 16; with `dropout` given, NF4
    under LoRA of rank 4 with B not zero, in training mode.
    """

    def build(
        intermediate: int = 128, layers: int = 2, kv_heads: int = 2, dropout: float | None = None, **lora: Any
    ) -> Decoder:
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": intermediate, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
        model: Decoder = randomise(Decoder(read_spec({"model_type": "llama"} | sizes | heads)))
        if dropout is None:
            return model
        fourbit.quantize_(model)
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, dropout=dropout, **lora))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.05)
        return model.train()

    return build


@pytest.fixture(params=SHAPES, scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    """The name of each shape in turn."""
    return str(request.param)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """`write_gguf(fill)`: the file that gguf-py's writer makes after `fill(writer)`."""
    from gguf import GGUFWriter

    def write(fill: Callable[[Any], Any] = lambda _: None, architecture: str = "llama") -> Path:
        writer = GGUFWriter(tmp_path / "m.gguf", architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "m.gguf"

    return write


class Alive(TorchDispatchMode):
    """Watches the tensors made inside it; `bytes()` are those of storages that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                storage = tensor.untyped_storage()
                self.storages[id(storage)] = (weakref.ref(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if storage() is not None)


@pytest.fixture
def alive() -> type[Alive]:
    """A context manager that counts the bytes of the tensors made in it and still there."""
    return Alive
