"""Adapters swapped in place: the slot's storage stays, its output is the file's, nothing is compiled again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fourbit
from fourbit import InputError, LoRAConfig, load_adapter, save_adapter, train_only, use
from fourbit.lora.layer import adapter_parameters, adapters_of

Make = Callable[..., nn.ModuleDict]


def run(model: Any, x: Tensor) -> Tensor:
    block = model["mlp"]
    return model["lm_head"](block["down_proj"](block["up_proj"](x).tanh()))


@pytest.fixture
def slot(base: Make) -> nn.ModuleDict:
    model = base()
    fourbit.attach(
        model, LoRAConfig(rank=6, alpha=3, target=["up_proj", "down_proj", "lm_head", "embed"]), "slot", seed=0
    )
    train_only(model)
    return model


FILES: dict[str, dict[str, Any]] = {
    "a lower rank": {"rank": 2, "alpha": 6},
    "its own": {"rank": 6, "alpha": 3},
    "another scale": {"rank": 6, "alpha": 11, "rslora": True},
    "fewer layers": {"rank": 3, "target": ["down_proj"]},
    "ranks that differ": {"rank": 1, "rank_pattern": {"up_proj": 5}, "target": ["up_proj", "embed"]},
}


def test_files_are_swapped_in_where_they_lie_and_compiled_once(slot: Any, adapted: Make, tmp_path: Path) -> None:
    x, places = torch.randn(4, 6), [p.data_ptr() for p in adapter_parameters(slot, "slot").values()]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: run(slot, x), backend=counter, fullgraph=True)
    use(slot, "slot")
    for turn in (1, 2):  # and what another left behind is gone
        for seed, (name, settings) in enumerate(FILES.items()):
            other = adapted(seed=10 * turn + seed, **settings)
            save_adapter(other, tmp_path / name)
            load_adapter(slot, tmp_path / name, name="slot")
            torch.testing.assert_close(compiled(x), run(other, x), rtol=1e-5, atol=1e-6, msg=name)
            ids = torch.arange(5)
            torch.testing.assert_close(slot["embed"](ids), other["embed"](ids), rtol=1e-5, atol=1e-6, msg=name)
    assert counter.frame_count == 1
    assert [p.data_ptr() for p in adapter_parameters(slot, "slot").values()] == places
    assert not any(p.requires_grad for p in slot.parameters())


def test_a_slot_is_saved_as_what_was_swapped_in(slot: Any, adapted: Make, base: Make, tmp_path: Path) -> None:
    other, again, x = adapted(rank=2, alpha=6), base(), torch.randn(4, 6)
    save_adapter(other, tmp_path / "file")
    load_adapter(slot, tmp_path / "file", name="slot")
    save_adapter(slot, tmp_path / "slot", name="slot")
    load_adapter(again, tmp_path / "slot")
    torch.testing.assert_close(run(again, x), run(other, x), rtol=1e-5, atol=1e-6)


def refused(slot: Any, folder: Path) -> None:
    before = [p.clone() for p in slot.parameters()]
    with pytest.raises(InputError, match="load it into a fresh model instead, or into plain LoRA on all its layers"):
        load_adapter(slot, folder, name="slot")
    assert all(map(torch.equal, before, slot.parameters()))


def test_what_does_not_fit_is_refused_and_the_advice_works(adapted: Make, base: Make, tmp_path: Path) -> None:
    """A larger rank, other layers, trained copies, a slot that trains; nothing is changed then."""
    save_adapter(adapted(rank=7), tmp_path / "larger")
    save_adapter(adapted(target=["up_proj", "lm_head"]), tmp_path / "elsewhere")
    save_adapter(adapted(bias="lora_only"), tmp_path / "biases")
    small = base()
    fourbit.attach(small, LoRAConfig(rank=6, target=["up_proj", "down_proj"]), "slot")
    save_adapter(adapted(rank=2), tmp_path / "fits")
    refused(small, tmp_path / "fits")  # it trains: half of it would be zeros that never move
    train_only(small)
    for folder in ("larger", "elsewhere", "biases"):
        refused(small, tmp_path / folder)
    load_adapter(small, tmp_path / "fits", name="slot")
    for folder in ("larger", "elsewhere"):
        wide = base()
        fourbit.attach(wide, LoRAConfig(rank=7, target=["up_proj", "down_proj", "lm_head"]), "slot")
        train_only(wide)
        load_adapter(wide, tmp_path / folder, name="slot")
    fresh = base()
    load_adapter(fresh, tmp_path / "biases", name="slot")
    assert len(adapters_of(fresh, "slot")) == 2
