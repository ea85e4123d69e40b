"""A model computes with another adapter inside a block, and is as it was after it, whatever happens inside."""

import pytest
import torch
from torch import nn

from fourbit.lora.attach import adapters_off, lora_modules
from fourbit.lora.snapshot import Snapshot, adapter_swapped, snapshot


def outputs(model: nn.ModuleDict) -> torch.Tensor:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return model["mlp"]["down_proj"](model["mlp"]["up_proj"](x).relu())


def state(model):
    return {
        name: (m.lora_A, m.lora_A.clone(), m.lora_B, m.lora_B.clone(), m.rank, m.alpha, m.rslora, m.enabled)
        for name, m in lora_modules(model).items()
    }


def assert_same(before, after):
    for name, (a, a_values, b, b_values, *rest) in before.items():
        now_a, now_values_a, now_b, now_values_b, *now = after[name]
        assert a is now_a and b is now_b and rest == now
        assert torch.equal(a_values, now_values_a) and torch.equal(b_values, now_values_b)


def test_inside_it_is_the_other_adapter_of_another_rank_and_scale(adapted):
    model, other = adapted(), adapted(seed=2, rank=3, alpha=1, rslora=True)
    before, own = state(model), outputs(model)
    with adapter_swapped(model, snapshot(other)):
        assert torch.equal(outputs(model), outputs(other))
    assert_same(before, state(model))
    assert torch.equal(outputs(model), own) and not torch.equal(own, outputs(other))


def test_layers_the_other_lacks_are_their_base(adapted):
    model = adapted()
    kept = snapshot(model)
    only_up = Snapshot({name: factors for name, factors in kept.layers.items() if "up_proj" in name})
    with adapter_swapped(model, only_up):
        swapped = outputs(model)
    lora_modules(model)["mlp.down_proj"].enabled = False
    assert torch.equal(swapped, outputs(model))
    with adapter_swapped(model, Snapshot({})), adapters_off(adapted()):
        nothing = outputs(model)
    with adapters_off(model):
        assert torch.equal(nothing, outputs(model))


def test_an_error_inside_leaves_the_model_whole(adapted):
    model = adapted()
    lora_modules(model)["mlp.up_proj"].enabled = False
    before = state(model)
    with pytest.raises(RuntimeError, match="boom"), adapter_swapped(model, snapshot(adapted(seed=2))):
        raise RuntimeError("boom")
    assert_same(before, state(model))


def test_a_graph_made_before_keeps_its_gradients(adapted):
    """The reference may run between a policy's forward and its backward."""
    model = adapted()
    outputs(model).sum().backward()
    wanted = {name: m.lora_B.grad.clone() for name, m in lora_modules(model).items() if m.lora_B.grad is not None}
    model.zero_grad()
    loss = outputs(model).sum()
    with adapter_swapped(model, snapshot(adapted(seed=2))):
        assert not outputs(model).requires_grad
    loss.backward()
    for name, gradient in wanted.items():
        assert torch.equal(lora_modules(model)[name].lora_B.grad, gradient)


def test_layers_that_the_model_lacks_are_refused(adapted):
    model = adapted(target=["up_proj"])
    with (
        pytest.raises(ValueError, match=r"carries none: \['mlp\.down_proj'\]"),
        adapter_swapped(model, snapshot(adapted())),
    ):
        pass
