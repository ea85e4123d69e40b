"""VeRA's shared matrices: kept, copied, moved and saved once, and read from a seed or a file as PEFT's."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.active import copy_adapter
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.peft_files import adapter_state, load_adapter, load_adapter_state, save_adapter

CONFIG = LoRAConfig(kind="vera", rank=6, projection_seed=3)


def base() -> nn.Sequential:
    """Layers of three shapes: the shared matrices are those of the largest sizes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 5), nn.Linear(5, 12))


def adapted(**how: Any) -> nn.Module:
    model = base()
    attach(model, CONFIG, **how)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_()
    return model


def matrices(model: nn.Module, name: str = "default") -> set[int]:
    parts: Any = adapters_of(model, name).values()
    return {tensor.data_ptr() for part in parts for tensor in part.projections.buffers()}


def test_the_shared_matrices_are_there_once() -> None:
    model = adapted()
    assert len(matrices(model)) == 2
    copy_adapter(model, "default", "copy")
    assert len(matrices(model, "copy")) == 2 and not matrices(model) & matrices(model, "copy")
    assert len(matrices(model.to(torch.float64))) == 2 and len(matrices(copy.deepcopy(model))) == 2
    part: Any = adapters_of(model)["0"]
    assert part.projections.vera_A.shape == (6, 20) and part.projections.vera_B.shape == (20, 6)
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 3 * 6 + 20 + 5 + 12


def test_a_seed_gives_pefts_matrices_and_a_file_need_not_hold_them(tmp_path: Path) -> None:
    settings = {"target_modules": ["0", "2", "3"], "r": 6, "projection_prng_key": 3}
    theirs, ours, x = get_peft_model(base(), VeraConfig(**settings)), adapted(), torch.randn(4, 8)
    mine: Any = adapters_of(ours)["0"]
    for name in ("vera_A", "vera_B"):
        assert torch.equal(getattr(theirs.base_model, name)["default"], getattr(mine.projections, name))
    save_adapter(ours, tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    assert {key for key in tensors if "vera_A" in key} == {"base_model.vera_A"} and len(tensors) == 2 + 2 * 3
    short = {key: tensor for key, tensor in tensors.items() if "lambda" in key}
    save_file(short, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"save_projection": False}))
    again = base()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), ours(x))
    with pytest.warns(UserWarning, match="Specified to not"):
        there = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(there(x), ours(x))
    save_file(tensors | {"base_model.vera_A": tensors["base_model.vera_A"] * 2}, file)  # what is saved counts
    other = base()
    load_adapter(other, tmp_path)
    assert not torch.equal(other(x), ours(x))


def test_its_state_is_taken_and_given() -> None:
    model, other, x = adapted(), adapted(), torch.randn(4, 8)
    state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    load_adapter_state(other, state)
    assert torch.equal(other(x), model(x)) and len(matrices(other)) == 2


def test_a_rank_that_the_file_does_not_bear_out_costs_no_memory(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2**31 - 1}))
    with pytest.raises(InputError, match="vera_lambda_d"):
        load_adapter(base(), tmp_path)
    with pytest.raises(InputError, match="VeRA's rank must be at most 16 times the widest layer's size, got 1000"):
        attach(base(), LoRAConfig(kind="vera", rank=1000))


def test_no_input_is_kept_for_backward() -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    model = nn.Sequential(nn.Linear(64, 32))
    attach(model, LoRAConfig(kind="vera", rank=2))
    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    assert x.numel() not in sizes
