"""Adapters merged into weights: as tensors made one at a time, in place for good, and in place to be undone."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fourbit
from fourbit.errors import InputError
from fourbit.lora.lazy_weight import LazyWeight


def toy(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).to(dtype)


def randomised(model: nn.Module, std: float = 0.1) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def adapted(model: nn.Module) -> nn.Module:
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8), seed=0)
    return randomised(model)


X = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged_weights_are_base_and_delta(dtype: torch.dtype) -> None:
    model = adapted(toy(dtype))
    before, changes = copy.deepcopy(model), dict(fourbit.delta(model))
    assert changes.keys() == {"0", "2"} and not any(change.requires_grad for change in changes.values())
    assert fourbit.merge(model) is model and type(model[0]) is nn.Linear
    for path, change in changes.items():
        base, layer = before.get_submodule(path).base, model.get_submodule(path)
        assert torch.equal(layer.weight, (base.weight.to(change.dtype) + change).to(dtype))
        assert change.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loose = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(model(X.to(dtype)), before(X.to(dtype)), rtol=loose, atol=loose)


@pytest.mark.parametrize("keep", [False, True])
def test_what_fails_on_the_way_leaves_no_change_twice(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out at the last of the layers: the model computes what it did, and merging can go on from there."""
    model = adapted(toy())
    wanted = model(X).detach()
    first, real = model[0], type(model[0]).merged

    def full(layer: Any, dtype: torch.dtype) -> torch.Tensor:
        if layer is first:
            raise torch.OutOfMemoryError
        return real(layer, dtype)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(type(first), "merged", full)
        fourbit.merge(model, keep=keep)
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    assert type(fourbit.merge(model)[0]) is nn.Linear
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)


def test_merging_leaves_other_adapters_and_other_holders_of_the_weight() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False)})
    model["head"].weight = model["embed"].weight
    table = model["embed"].weight.detach().clone()
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, target=["head"]))
    randomised(model)
    fourbit.copy_adapter(model, "default", "kept")
    fourbit.merge(model)
    assert torch.equal(model["embed"].weight, table) and not torch.equal(model["head"].base.weight, table)
    assert list(model["head"].adapters) == ["kept"] and len(dict(fourbit.delta(model, "kept"))) == 1


def test_copies_go_into_their_modules_places() -> None:
    model = nn.ModuleDict({"body": nn.Linear(96, 32), "norm": nn.BatchNorm1d(32), "head": nn.Linear(32, 3)}).bfloat16()
    run = lambda: model["head"](model["norm"](model["body"](X.bfloat16()))).float()
    config = fourbit.LoRAConfig(rank=2, target=["body"], modules_to_save=["norm", "head"], bias="lora_only")
    fourbit.attach(model, config, seed=0)
    before = run()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    run()  # moves the norm's statistics
    wanted = model.eval() and run()
    fourbit.merge(model)
    assert type(model["norm"]) is nn.BatchNorm1d and not any(p.requires_grad for p in model.parameters())
    assert not torch.allclose(wanted, before)
    torch.testing.assert_close(run(), wanted, rtol=0.05, atol=0.05)


def test_conv1d_merges_the_other_way_round() -> None:
    model = adapted(nn.Sequential(Conv1D(24, 96)))
    wanted = model(X)
    fourbit.merge(model)
    assert type(model[0]) is Conv1D and model[0].weight.shape == (96, 24)
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    model = toy()
    with pytest.raises(InputError, match=r"no adapter is active.*merge\(model, name\)"):
        fourbit.merge(model)
    nn.utils.parametrizations.weight_norm(adapted(model)[0].base)
    wanted = model(X)
    with pytest.raises(InputError, match=r"'0' .*has no dense weight of its own.*keep the adapter"):
        fourbit.merge(model)
    model = adapted(toy())
    wanted = model(X)
    with fourbit.adapters_off(model), pytest.raises(InputError, match="carries no adapter 'other'"):
        fourbit.merge(model, "other")
    assert torch.equal(model(X), wanted)
    model[2].adapters["default"] = Silent()
    with pytest.raises(NotImplementedError, match="Silent has no delta"):
        fourbit.merge(model)
    assert isinstance(model[0], fourbit.AdapterLayer)


class Silent(fourbit.Adapter):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


def many() -> nn.Module:
    """Every kind of module that carries adapters, dense and in 4 bits, with a tied head."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "embed": nn.Embedding(96, 64), "linear": nn.Linear(64, 128), "packed": nn.Linear(128, 64),
        "turned": Conv1D(64, 64), "norm": nn.BatchNorm1d(64), "conv": nn.Conv1d(4, 6, 3, groups=2, padding=1),
        "table": nn.Embedding(64, 64), "head": nn.Linear(64, 96, bias=False), "class": nn.Linear(64, 3),
    })  # fmt: skip
    model["head"].weight = model["embed"].weight
    fourbit.quantize_(model, skip=["linear", "class", "head"], double_quant=False)
    config = fourbit.LoRAConfig(
        rank=4, target=["linear", "packed", "turned", "conv", "table", "head"], bias="lora_only",
        modules_to_save=["norm", "class"],
    )  # fmt: skip
    fourbit.attach(model, config, seed=0)
    return randomised(model).eval()


def run(model: Any, x: torch.Tensor) -> torch.Tensor:
    h = model["norm"](model["turned"](model["packed"](model["linear"](model["embed"](x)))))
    return torch.cat([model["head"](h), model["class"](h), model["table"](x % 64)], -1)


IDS = torch.arange(90)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_merged_state_is_what_a_merged_model_holds() -> None:
    model = many()
    state = fourbit.merged_state(model)
    packed = {name for name, value in state.items() if isinstance(value, LazyWeight)}
    assert packed == {f"{name}.weight" for name in ("linear", "packed", "turned", "conv", "table", "head")}
    own = fourbit.merge(copy.deepcopy(model)).state_dict()
    own["turned.weight"] = own["turned.weight"].T  # a Linear now, in the place of a Conv1D
    assert own.keys() == state.keys()
    for name, value in state.items():
        assert (value.shape, value.dtype) == (own[name].shape, own[name].dtype)
        assert torch.equal(value.cpu(), own[name]), name
    half = fourbit.merged_state(model, "bfloat16")
    assert all(half[name].dtype == torch.bfloat16 for name in half if name != "norm.num_batches_tracked")
    assert torch.equal(half["packed.weight"].cpu(), state["packed.weight"].bfloat16()), "rounded once"
    with fourbit.adapters_off(model):
        plain = fourbit.merged_state(model)
    assert plain["embed.weight"] is plain["head.weight"] and state["embed.weight"] is not state["head.weight"]
    assert torch.equal(plain["packed.weight"].cpu(), model["packed"].base.dequantize())


def test_unmerge_brings_back_every_bit_and_the_adapters() -> None:
    model = many()
    before, wanted, modules = bits(model), run(model, IDS), {p: id(m) for p, m in model.named_modules()}
    assert fourbit.merge(model, keep=True) is model
    assert not any(isinstance(m, fourbit.AdapterLayer | fourbit.NF4Linear) for m in model.modules())
    torch.testing.assert_close(run(model, IDS), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no adapter is active"):
        fourbit.merge(model)
    for tensor in model.state_dict().values():
        tensor.mul_(2)  # whatever is done to the merged tensors
    assert fourbit.unmerge(model.train()) is model
    after = bits(model)
    del before["embed.weight"], before["head.base.weight"]  # not adapted: the model's own, which was written into
    assert before.keys() < after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {p: id(m) for p, m in model.named_modules()} == modules and all(m.training for m in model.modules())


def test_what_shares_a_tensor_with_a_merged_layer_is_not_its_copy() -> None:
    """What is not adapted is the live tensor: writing into that is the user's own change, and nobody else's."""
    model = many()
    table = model["embed"].weight
    fourbit.merge(model, keep=True)
    assert model["embed"].weight is table and model["head"].weight is not table
    fourbit.unmerge(model)
    assert model["head"].base.weight is table


def test_unmerging_what_was_not_kept_is_refused() -> None:
    model = adapted(toy())
    with pytest.raises(InputError, match="keep=True"):
        fourbit.unmerge(model)
    fourbit.merge(model, keep=True)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    with pytest.raises(InputError, match="remove_adapter"):
        fourbit.unmerge(model)
    fourbit.remove_adapter(model, "default")
    assert "default" in fourbit.unmerge(model)[0].adapters


def test_a_whole_module_inside_a_merged_one_comes_back_too() -> None:
    """modules_to_save may name a module whose children carry adapters of their own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(64)), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    model = nn.ModuleDict({"block": Block(), "linear": nn.Linear(64, 64)})
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["linear"], modules_to_save=["block"]))
    randomised(model)
    x = torch.randn(3, 64)
    before, wanted = bits(model), model["block"](x)
    fourbit.merge(model, keep=True)
    assert type(model["block"]) is Block and type(model["block"].inner) is nn.Linear
    torch.testing.assert_close(model["block"](x), wanted)
    fourbit.unmerge(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()) and torch.equal(
        model["block"](x), wanted
    )


def test_several_adapters_merge_with_their_weights() -> None:
    model = adapted(fourbit.quantize_(toy()))
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, alpha=3), "second", seed=1)
    randomised(model)
    fourbit.use(model, "default", "second", weights=(0.7, -0.3))
    wanted, bare = model(X), fourbit.merged_state(model)
    fourbit.merge(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(bare[name].cpu(), tensor) for name, tensor in model.state_dict().items())


def test_pefts_merge_and_unmerge_changes_a_4_bit_base_and_ours_does_not() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    weight = torch.randn(256, 256) * 0.02
    theirs = nn.Sequential(bitsandbytes.nn.Linear4bit(256, 256, bias=False, quant_type="nf4"))
    theirs[0].weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    theirs.to("cpu")
    ours = nn.Sequential(fourbit.NF4Linear.from_weight(weight, double_quant=False))
    change = 0.03 * weight.norm()
    A, B = torch.randn(8, 256), torch.randn(256, 8)
    B *= change / (B @ A).norm()
    theirs.is_loaded_in_4bit = True  # as transformers says it
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"]), theirs)
    fourbit.attach(ours, fourbit.LoRAConfig(rank=8, alpha=8))
    with torch.no_grad():
        wrapped[0].lora_A["default"].weight.copy_(A), wrapped[0].lora_B["default"].weight.copy_(B)
        ours[0].adapters["default"].lora_A.copy_(A), ours[0].adapters["default"].lora_B.copy_(B)
    read = lambda w: bitsandbytes.functional.dequantize_4bit(w.weight.data, w.weight.quant_state)
    before = read(wrapped[0].base_layer)
    with pytest.warns(UserWarning, match="rounding errors"):
        wrapped[0].merge()
        wrapped[0].unmerge()
    drift = ((read(wrapped[0].base_layer) - before).norm() / before.norm()).item()
    assert 0.005 < drift < 0.03, f"PEFT's drift was about 1.2%, now {drift:.2%}"
    mine = ours[0].base.dequantize()
    torch.testing.assert_close(mine, before)
    fourbit.unmerge(fourbit.merge(ours, keep=True))
    assert torch.equal(ours[0].base.dequantize(), mine)
