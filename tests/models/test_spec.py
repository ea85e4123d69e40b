"""Qwen3 in float64: names, logits, gradients of every weight, and faults that the comparison must see."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tiny random Qwen3 in float64; norms are random too, or swapped ones would not be seen."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 3, "head_dim": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, **heads, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_("norm" in name)
    return model


def ours(theirs: Any) -> Decoder:
    model = Decoder(read_spec(theirs.config.to_dict())).double().eval()
    model.load_state_dict(theirs.state_dict())
    return model


IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(2, 40, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def far(got: Tensor, expected: Tensor) -> bool:
    """The oracle's rotary tables stay fp32 in float64 models, so rounded angles (40 x 2^-24) set the bound."""
    return bool((got - expected).norm() > 2e-5 * expected.norm())


def swapped_norms(model: Decoder) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = layer.self_attn.k_norm, layer.self_attn.q_norm


def no_key_norm(model: Decoder) -> None:
    model.model.layers[1].self_attn.k_norm = torch.nn.Identity()


def other_eps(model: Decoder) -> None:
    model.model.layers[0].self_attn.q_norm.eps = 1e-3


def test_names_logits_and_gradients_are_the_oracles(theirs: Any) -> None:
    model = ours(theirs)
    assert list(model.state_dict()) == list(theirs.state_dict())
    logits, expected = model(IDS), theirs(IDS).logits
    assert not far(logits, expected)
    theirs.zero_grad()
    (logits * WEIGHT).sum().backward()
    (expected * WEIGHT).sum().backward()
    for (name, a), b in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert not far(a.grad, b.grad), f"gradient of {name}"


@pytest.mark.parametrize("fault", [swapped_norms, no_key_norm, other_eps])
@torch.no_grad()
def test_a_planted_fault_is_seen(theirs: Any, fault: Any) -> None:
    model = ours(theirs)
    fault(model)
    assert far(model(IDS), theirs(IDS).logits)


@torch.no_grad()
def test_packed_and_cached_are_single(theirs: Any) -> None:
    model = ours(theirs)
    whole = model(IDS[:1])
    packed = model(IDS.view(1, 80), spans=[(0, 40), (40, 80)])
    torch.testing.assert_close(packed[:, :40], whole, rtol=0, atol=1e-10)
    cache = model.new_cache()
    pieces = [model(part, cache=cache) for part in IDS[:1].split([31, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)
