"""Modules of any shape, for tests of what names and patterns mean, and one small model with an adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.peft_files import save_adapter

Make = Callable[..., nn.ModuleDict]


@pytest.fixture(scope="session")
def base() -> Make:
    """Makes an embedding, an MLP of two layers and an output head, the same each time."""
    return make_base


@pytest.fixture(scope="session")
def adapted() -> Make:
    """Makes that model with random adapters; the keywords are those of LoRAConfig."""
    return make_adapted


def make_base() -> nn.ModuleDict:
    torch.manual_seed(0)
    block = {"up_proj": nn.Linear(6, 10), "down_proj": nn.Linear(10, 6)}
    return nn.ModuleDict({"embed": nn.Embedding(5, 6), "mlp": nn.ModuleDict(block), "lm_head": nn.Linear(6, 5)})


def make_adapted(seed: int = 1, dtype: torch.dtype = torch.float32, **settings: object) -> nn.ModuleDict:
    model = make_base()
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 6, **settings}), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of that model's adapters."""
    save_adapter(make_adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="session")
def tree() -> Callable[[list[str]], nn.Module]:
    """Makes a module with a 3x3 linear layer at every path that no other path runs through."""
    return grow


def grow(names: list[str]) -> nn.Module:
    torch.manual_seed(0)
    root = nn.Module()
    for name in dict.fromkeys(names):
        if any(other.startswith(f"{name}.") for other in names):
            continue
        parent = root
        *parts, leaf = name.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(3, 3))
    return root
