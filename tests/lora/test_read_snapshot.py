"""An adapter folder read as a Snapshot: the model stays as it is, and can compute as one that loaded it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fourbit.errors import InputError
from fourbit.lora.attach import lora_modules
from fourbit.lora.files import load_adapter, read_snapshot, save_adapter
from fourbit.lora.snapshot import adapter_swapped

Make = Callable[..., nn.ModuleDict]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def outputs(model: nn.ModuleDict) -> torch.Tensor:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype)
    return model["mlp"]["down_proj"](model["mlp"]["up_proj"](x).relu())


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 3, "rslora": True, "alpha_pattern": {"up_proj": 2.5}}, {"target": ["up_proj"]}]
)
def test_computes_as_if_it_were_loaded(tmp_path: Path, base: Make, adapted: Make, settings: dict[str, object]) -> None:
    other = adapted(**({"seed": 2} | settings))
    save_adapter(other, tmp_path)
    loaded, model = base(), adapted()
    load_adapter(loaded, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = read_snapshot(model, tmp_path)
    assert list(found.layers) == list(lora_modules(loaded))
    with adapter_swapped(model, found):
        assert torch.equal(outputs(model), outputs(loaded))
    assert not torch.equal(outputs(model), outputs(loaded))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for m in lora_modules(model).values() for p in (m.lora_A, m.lora_B))
    (tmp_path / WEIGHTS).write_bytes(b"")  # what was read does not hang on the file
    for name, factors in found.layers.items():
        assert torch.equal(factors.lora_A, lora_modules(loaded)[name].lora_A)
        assert not factors.lora_A.requires_grad


def test_takes_the_dtype_of_the_models_own(tmp_path: Path, adapted: Make) -> None:
    save_adapter(adapted(seed=2), tmp_path)
    model = adapted(dtype=torch.bfloat16)
    found = read_snapshot(model, tmp_path)
    assert {factors.lora_B.dtype for factors in found.layers.values()} == {torch.bfloat16}
    with adapter_swapped(model, found):
        assert next(iter(lora_modules(model).values())).lora_A.dtype == torch.bfloat16


def test_layers_on_which_the_model_has_no_adapter_are_named(tmp_path: Path, base: Make, adapted: Make) -> None:
    save_adapter(adapted(), tmp_path)
    with pytest.raises(InputError, match=r"1 layers .* such as 'mlp\.down_proj': .* as well: up_proj,down_proj$"):
        read_snapshot(adapted(target=["up_proj"]), tmp_path)
    with pytest.raises(InputError, match=r"2 layers .* such as 'mlp\.up_proj'"):
        read_snapshot(base(), tmp_path)


def test_what_cannot_be_loaded_cannot_be_read(tmp_path: Path, adapted: Make) -> None:
    save_adapter(adapted(), tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    for change, message in (({"r": 3}, "of another shape"), ({"use_dora": True}, "use_dora=True is a PEFT feature")):
        (tmp_path / CONFIG).write_text(json.dumps(raw | change))
        with pytest.raises(InputError, match=message):
            read_snapshot(adapted(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    other = adapted()
    lora_modules(other)["mlp.up_proj"].lora_B.data[0] = 3e38
    save_adapter(other, tmp_path)
    with pytest.raises(InputError, match=r"too large for torch\.float16"):
        read_snapshot(adapted(dtype=torch.float16), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"holds no {WEIGHTS}"):
        read_snapshot(adapted(), tmp_path)
