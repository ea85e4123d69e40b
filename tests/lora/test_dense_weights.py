"""What quantize_ leaves dense and says so, and what is a head: on plain modules, by each reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.quantize import dense_weights, quantize_
from fourbit.lora.targets import output_heads


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class OwnStart(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)


def block(**more: nn.Module) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"plain": nn.Linear(8, 8), **more})


def replaced() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]  # as users do
    return layer


def pruned() -> nn.Linear:
    layer = nn.Linear(8, 8)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight_orig = nn.Parameter(weight)
    layer.register_buffer("weight", weight / 2)
    return layer


LEFT: dict[str, Callable[[], nn.Module]] = {
    "OwnForward has a forward of its own: make it nn.Linear": lambda: OwnForward(8, 8),
    "Embedding is no linear layer": lambda: nn.Embedding(8, 8),
    "Conv2d is no linear layer": lambda: nn.Conv2d(8, 8, 3),
    "Bilinear is no linear layer": lambda: nn.Bilinear(8, 8, 8),
    "LSTM is no linear layer": lambda: nn.LSTM(8, 8),
    "parametrised, pruned or with another forward": pruned,
}
PARAMETRISED = {
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "a forward put in its place": replaced,
}


@pytest.mark.parametrize("why", LEFT)
def test_what_stays_dense_is_named_with_its_reason_and_size_before_and_after(why: str) -> None:
    model = block(other=LEFT[why]())
    (reason, names), *others = dense_weights(model).items()
    assert reason.startswith(why) and not others
    assert names == {f"other.{name}": p.nbytes for name, p in model["other"].named_parameters() if p.ndim > 1}
    quantize_(model)
    assert dense_weights(model) == {reason: names}
    with pytest.raises(InputError, match=f"no layer of this Sequential to quantise: 0.*{why}"):
        quantize_(nn.Sequential(LEFT[why]()))


@pytest.mark.parametrize("kind", PARAMETRISED)
def test_a_layer_that_is_more_than_its_weight_stays_as_it_is(kind: str) -> None:
    """Its twin would lose the parametrisation or the forward."""
    model, x = block(other=PARAMETRISED[kind]()), torch.randn(2, 8)
    before = model["other"].eval()(x)
    quantize_(model)
    assert isinstance(model["plain"], NF4Linear) and torch.equal(model["other"](x), before)


def test_a_subclass_with_the_forward_of_a_linear_layer_is_one() -> None:
    model = block(other=OwnStart(8, 8))
    quantize_(model)
    assert isinstance(model["other"], NF4Linear) and attach(model, LoRAConfig(rank=1)) == ["plain", "other"]


def test_a_subclass_with_its_own_forward_is_no_target() -> None:
    model = block(other=OwnForward(8, 8))
    with pytest.raises(InputError, match=r"names a OwnForward, which is none.* OwnForward has a forward of"):
        attach(model, LoRAConfig(rank=1, target=["other"]))
    with pytest.raises(InputError, match=r"this Sequential has none.* OwnForward has a forward of its own"):
        attach(nn.Sequential(OwnForward(8, 8)), LoRAConfig(rank=1))
    assert attach(model, LoRAConfig(rank=1)) == ["plain"]


def test_a_buffer_on_the_weight_of_a_layer_keeps_it_dense() -> None:
    model = block(other=nn.Linear(8, 8))
    model.register_buffer("seen", model["other"].weight.detach().view(-1))
    quantize_(model)
    assert type(model["other"]) is nn.Linear and type(model["plain"]) is NF4Linear
    assert dense_weights(model) == {"shares its weight with seen: untie the weight first": {"other.weight": 256}}


def test_what_is_tied_counts_once() -> None:
    model = block(embed=nn.Embedding(8, 8), lm_head=nn.Linear(8, 8, bias=False))
    model["lm_head"].weight = model["embed"].weight
    sizes = [size for names in dense_weights(model).values() for size in names.values()]
    assert sorted(sizes) == [0, 256]


class Model(nn.Module):
    """As a model of transformers is built: a body, and a head beside it."""

    base_model_prefix = "encoder"

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


HEADS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a layer": (lambda: Model(encoder=block(), out=nn.Linear(8, 3)), ["out"]),
    "two layers": (lambda: Model(encoder=block(), a=nn.Linear(8, 8), b=nn.Sequential(nn.Linear(8, 3))), ["a", "b.0"]),
    "two bodies": (lambda: Model(encoder=block(), tower=Model(plain=nn.Linear(8, 8)), out=nn.Linear(8, 3)), ["out"]),
    "inside a module of one's own": (lambda: block(net=Model(encoder=block(), out=nn.Linear(8, 3))), ["net.out"]),
    "the body itself": (lambda: Model(first=nn.Linear(8, 8), out=nn.Linear(8, 3)), []),
    "by name": (lambda: block(qa_outputs=nn.Linear(8, 8)), ["qa_outputs"]),
    "a part by name": (lambda: block(classifier=nn.Sequential(nn.Tanh(), nn.Linear(8, 3))), ["classifier.1"]),
    "score": (lambda: block(score=nn.Linear(8, 3)), ["score"]),
    "deeper, it is no head": (lambda: block(router=nn.ModuleDict({"classifier": nn.Linear(8, 3)})), []),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_neither_quantised_nor_adapted_unless_named(kind: str) -> None:
    build, heads = HEADS[kind]
    assert sorted(output_heads(build())) == heads
    model = quantize_(build())
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    assert linear == set(heads)
    assert not set(attach(model, LoRAConfig(rank=1))) & set(heads)
    every: Any = quantize_(build(), skip=())
    assert not any(type(layer) is nn.Linear for layer in every.modules())
    if heads:
        assert attach(build(), LoRAConfig(rank=1, target=heads)) == heads


def test_conv1d_is_a_linear_layer() -> None:
    """GPT-2 is made of it: dense and in 4 bits it takes adapters, which mean the same change [out, in]."""
    torch.manual_seed(0)
    x, layer, linear = torch.randn(2, 3, 8), Conv1D(64, 8), nn.Linear(8, 64)
    linear.load_state_dict({"weight": layer.weight.detach().t(), "bias": layer.bias.detach()})
    models = [nn.Sequential(layer), nn.Sequential(linear)]
    torch.testing.assert_close(models[0](x), models[1](x))
    for model in models:
        attach(model, LoRAConfig(rank=2), seed=0)
        nn.init.ones_(model[0].adapters["default"].lora_B)
        assert (model[0].in_features, model[0].out_features) == (8, 64)
    torch.testing.assert_close(models[0][0].weight.t() + 0, models[1][0].weight + 0)
    torch.testing.assert_close(models[0](x), models[1](x))
    for model in models:
        quantize_(model)
        assert isinstance(model[0].base, NF4Linear)
    assert torch.equal(models[0](x), models[1](x))
