"""Parameter groups: nothing is lost, nothing stands twice, and rates and decay are what the names say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters
from fourbit.optim.groups import parameter_groups


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


def where(named, groups):
    """Name -> (lr, weight decay) of the group that it is in; fails where one stands twice."""
    found = {}
    names = {id(p): name for name, p in named}
    for group in groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group["lr"], group["weight_decay"]
    return found


@pytest.fixture
def adapted():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    attach(model, LoRAConfig(rank=2, target="all-linear"))
    return list(adapter_parameters(model).items())


def test_vectors_do_not_decay():
    layer = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    decayed, spared = parameter_groups(layer.named_parameters(), lr=0.5, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and [tuple(p.shape) for p in decayed["params"]] == [(3, 2)]
    assert spared["weight_decay"] == 0.0 and [tuple(p.shape) for p in spared["params"]] == [(3,), (3,), (3,)]
    assert len(parameter_groups([("w", parameter(2, 2))], lr=0.5, weight_decay=0.1)) == 1
    assert len(parameter_groups(layer.named_parameters(), lr=0.5)) == 1, "nothing decays: nothing to tell apart"


@pytest.mark.parametrize(
    "name, decay, scale",
    [
        ("layers.0.q_proj.lora_magnitude_vector.default.weight", 0.0, 1.0),  # PEFT's
        ("layers.0.q_proj.magnitude", 0.0, 1.0),
        ("order_of_magnitude.weight", 0.1, 1.0),
        ("layers.0.q_proj.lora_A", 0.1, 1.0),
        ("m.lora_B.default.weight", 0.1, 16.0),
        ("m.lora_embedding_B.default", 0.1, 16.0),
        ("m.lora_Bias", 0.1, 1.0),
        ("lora_B", 0.1, 16.0),
    ],
)
def test_magnitudes_and_B_are_known_by_their_names(name, decay, scale):
    named = [(name, parameter(1, 4)), ("other.lora_B", parameter(1, 4))]
    group, *_ = parameter_groups(named, lr=1.0, weight_decay=0.1, lora_plus=16.0)
    assert (group["weight_decay"], group["lr_scale"]) == (decay, scale)


def test_lora_plus_is_the_ratio_of_B_to_A(adapted):
    found = where(adapted, parameter_groups(adapted, lr=1e-3, lora_plus=16.0))
    assert set(found) == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    assert {lr for name, (lr, _) in found.items() if name.endswith("A")} == {1e-3}
    assert {lr for name, (lr, _) in found.items() if name.endswith("B")} == {16e-3}
    assert len(parameter_groups(adapted, lr=1e-3)) == 1


def test_patterns_multiply():
    named = [(f"layers.{i}.{part}", parameter(2, 2)) for i in (1, 10) for part in ("attn", "mlp")]
    groups = parameter_groups(named, lr=1.0, lr_scale={"layers.1.*": 0.5, "*.attn": 3.0})
    found = {name: lr for name, (lr, _) in where(named, groups).items()}
    assert found == {"layers.1.attn": 1.5, "layers.1.mlp": 0.5, "layers.10.attn": 3.0, "layers.10.mlp": 1.0}
    for group in groups:
        assert group["lr"] == group["lr_scale"]


@given(st.permutations([("*", 0.1), ("a*", 0.7), ("*b", 0.3), ("?b", 1.1)]))
def test_the_order_of_patterns_does_not_matter_to_the_bit(patterns):
    named = [("ab", parameter(2, 2))]
    (group,) = parameter_groups(named, lr=0.9, lr_scale=dict(patterns))
    assert group["lr"] == 0.9 * math.prod((0.1, 0.3, 1.1, 0.7))  # by pattern: *, *b, ?b, a*


def test_zero_leaves_out_and_so_does_what_needs_no_gradient(adapted):
    frozen = parameter(2, 2).requires_grad_(False)
    assert parameter_groups([("a", frozen)], lr=1.0, lr_scale={"a": 2.0}) == []
    found = where(adapted, parameter_groups(adapted, lr=1.0, lr_scale={"0.*": 0}))
    assert set(found) == {"2.lora_A", "2.lora_B"}
    assert set(where(adapted, parameter_groups(adapted, lr=1.0, lora_plus=0))) == {"0.lora_A", "2.lora_A"}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["lora_A", "lora_B", "bias", "magnitude"])), max_size=12))
def test_every_parameter_is_in_one_group_in_order(kinds):
    named = [(f"m.{i}.{kind}", parameter(*[1] * ndim)) for i, (ndim, kind) in enumerate(kinds)]
    plus = 2.0 if "lora_B" in [kind for _, kind in kinds] else 1.0
    groups = parameter_groups(named, lr=1.0, weight_decay=0.1, lora_plus=plus)
    assert set(where(named, groups)) == {name for name, _ in named}
    order = {id(p): i for i, (_, p) in enumerate(named)}
    places = [[order[id(p)] for p in group["params"]] for group in groups]
    assert all(place == sorted(place) for place in places) and [p[0] for p in places] == sorted(p[0] for p in places)
    assert len({(g["weight_decay"], g["lr"]) for g in groups}) == len(groups)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"lr_scale": {"*.lora_C": 2.0}}, r"pattern '\*.lora_C' matches no parameter; a name is such as '0.lora_A'"),
        ({"lr_scale": {"*": -1.0}}, r"\*: a factor on the learning rate must be 0 or more and finite, got -1.0"),
        ({"lr_scale": {"*": math.nan}}, "got nan"),
        ({"lora_plus": math.inf}, "lora_plus: .* got inf"),
        ({"lora_plus": 16.0, "of": ["0.ia3_l"]}, "nothing here is that: leave it out"),
    ],
)
def test_what_cannot_be_meant_is_refused(adapted, options, error):
    with pytest.raises(ValueError, match=error):
        named = [(name, parameter(2, 2)) for name in options.pop("of", [])] or adapted
        parameter_groups(named, lr=1.0, **options)
    assert parameter_groups(named, lr=1.0)
