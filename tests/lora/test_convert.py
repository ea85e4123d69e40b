"""Layers in other forms: dense again, merged, bitsandbytes' and back."""

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from torch import nn

import fourbit
from fourbit.errors import InputError


def toy(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).to(dtype)


def adapted(model: nn.Module) -> nn.Module:
    target = [
        path for path, layer in model.named_modules() if "weight" in dir(layer) and not isinstance(layer, nn.Embedding)
    ]
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, target=target), seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


X = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))


def test_dense_again_is_what_the_layers_compute_with() -> None:
    model = adapted(fourbit.quantize_(toy(torch.bfloat16)))
    wanted = model.float()(X)
    assert fourbit.dequantize(model, "float32") is model
    assert not any(isinstance(layer, fourbit.NF4Linear) for layer in model.modules())
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    single = fourbit.dequantize(fourbit.NF4Linear.from_weight(torch.randn(8, 64, dtype=torch.bfloat16)))
    assert type(single) is nn.Linear and single.weight.dtype == torch.bfloat16 and not single.weight.requires_grad


def theirs(kind: str, nested: bool, storage: torch.dtype = torch.uint8) -> nn.Sequential:
    torch.manual_seed(0)
    how = {"quant_type": kind, "compress_statistics": nested, "quant_storage": storage}
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(96, 128, **how), bitsandbytes.nn.Linear4bit(128, 65, **how))
    return model.to("cpu")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_layers_keep_their_bytes_both_ways(kind: str, nested: bool) -> None:
    model = theirs(kind, nested)
    before = tensors(model)
    dense = [bitsandbytes.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in model]
    assert fourbit.from_bitsandbytes(model) is model and type(model[0]) is fourbit.NF4Linear
    assert all(torch.equal(m.dequantize(), wanted) for m, wanted in zip(model, dense, strict=True))
    assert model[0].quant_type == kind and model[0].double_quant == nested
    fourbit.attach(model, fourbit.LoRAConfig(rank=2), seed=0)
    fourbit.remove_adapter(model, "default")
    fourbit.to_bitsandbytes(model, bitsandbytes)
    assert type(model[0]) is bitsandbytes.nn.Linear4bit
    after = tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_stay_on_layers_that_become_bitsandbytes_and_ours_again() -> None:
    model = adapted(fourbit.quantize_(toy()))
    wanted = model(X)
    assert torch.equal(fourbit.from_bitsandbytes(fourbit.to_bitsandbytes(model, bitsandbytes))(X), wanted)
    assert type(model[0]) is fourbit.AdapterLayer and type(model[0].base) is fourbit.NF4Linear


def test_other_forms_of_bitsandbytes_layers() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    ours = fourbit.from_bitsandbytes(layer)
    assert isinstance(ours, fourbit.NF4Linear) and torch.equal(ours.dequantize(), dense)
    repacked = theirs("nf4", True)
    repacked[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="convert it before it runs"):
        fourbit.from_bitsandbytes(repacked)
    assert type(repacked[1]) is bitsandbytes.nn.Linear4bit


@pytest.mark.parametrize(
    "call",
    [fourbit.dequantize, fourbit.from_bitsandbytes, lambda model: fourbit.to_bitsandbytes(model, bitsandbytes)],
)
def test_nothing_to_convert_is_an_error(call: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(InputError, match="this Sequential holds no "):
        call(toy())
