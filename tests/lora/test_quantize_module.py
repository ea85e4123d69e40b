"""quantize_: which layers of a module become 4-bit, and what that costs."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_layers
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.quantize import quantize_


class Tiny(nn.Module):
    """An embedding, two blocks and an output head, tied or not."""

    def __init__(self, tied: bool = False, head: str = "lm_head") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        setattr(self, head, nn.Linear(16, 11, bias=False))
        self.head = head
        if tied:
            getattr(self, head).weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, 11]
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return getattr(self, self.head)(self.norm(x))


def bits_per_parameter(model: nn.Module) -> float:
    """Stored bits per weight of all 4-bit layers: packed codes, absmax, nested absmax, offset; no tables or biases."""
    stored: dict[int, int] = {}  # by storage: tied layers count once
    weights: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            weights[id(layer.packed)] = layer.in_features * layer.out_features
            stored.update({id(tensor): 8 * tensor.nbytes for tensor in layer.stored_parameters().values()})
    return sum(stored.values()) / sum(weights.values())


def kinds(module: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in module.named_modules() if isinstance(m, nn.Linear | NF4Linear)}


def test_every_linear_but_the_head_in_place() -> None:
    model = Tiny().eval()
    dense = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    ids = torch.tensor([[1, 2, 3]])
    assert quantize_(model) is model
    assert [name for name, kind in kinds(model).items() if kind is nn.Linear] == ["lm_head"]
    for name, layer in dense.items():
        if name == "lm_head":
            continue
        twin = model.get_submodule(name)
        assert isinstance(twin, NF4Linear) and not twin.training
        assert torch.equal(twin.dequantize(), NF4Linear.from_weight(layer.weight).dequantize())
        assert twin.bias is not None and torch.equal(twin.bias, layer.bias)
    for name, layer in dense.items():  # the model now computes what it would with the decoded weights
        if name != "lm_head":
            layer.weight.data = model.get_submodule(name).dequantize()
    reference = Tiny().eval()
    reference.load_state_dict(
        {**model.state_dict(), **{f"{n}.weight": m.weight for n, m in dense.items()}}, strict=False
    )
    torch.testing.assert_close(model(ids), reference(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_options_reach_the_layers(quant: str) -> None:
    layer = quantize_(Tiny(), quant, blocksize=128, double_quant=False).get_submodule("layers.0.up")
    assert isinstance(layer, NF4Linear)
    assert (layer.quant_type, layer.blocksize, layer.double_quant, layer.nested_absmax) == (quant, 128, False, None)


def test_skip_by_leaf_and_by_path() -> None:
    model = quantize_(Tiny(), skip=("down", "layers.1.up"))
    assert {name for name, kind in kinds(model).items() if kind is NF4Linear} == {"layers.0.up", "lm_head"}


def test_skip_by_regular_expression() -> None:
    model = quantize_(Tiny(), skip=r"layers\.0\..*|lm_head")
    assert {name for name, kind in kinds(model).items() if kind is NF4Linear} == {"layers.1.up", "layers.1.down"}


@pytest.mark.parametrize(
    ("skip", "words"),
    [
        ("[", r"skip holds '\[', which is no regular expression"),
        (3, "skip must be text or a list of texts, got 3"),
        (".*", r"finds no layer of this ModuleDict to quantise: .*layers\.0\.up.*\(named in skip\)"),
        ("lm_head", r"skip='lm_head': a string is a regular .* pass a list: \['lm_head'\]"),
        (["lm_head", "dwon"], r"skip entry 'dwon' matches no linear layer\. Nearest: down"),
        (["lm_heads"], r"skip entry 'lm_heads' matches no linear layer\. Nearest: lm_head"),
        (["layers"], r"It names a ModuleList, which .* For all inside it, pass the string '\(\.\*"),
        (["embed"], "It names a Embedding, which is none"),
    ],
)
def test_a_skip_that_means_no_layer_is_refused(skip: Any, words: str) -> None:
    """The head would be quantised in silence."""
    model = nn.ModuleDict({"inner": Tiny()})
    with pytest.raises(InputError, match=words):
        quantize_(model, skip=skip)
    assert NF4Linear not in kinds(model).values()


def test_a_name_in_skip_that_this_model_has_not_is_refused_lm_head_too() -> None:
    with pytest.raises(InputError, match="skip entry 'lm_head' matches no linear layer"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), skip=("lm_head",))


@pytest.mark.parametrize("head", ["lm_head", "vocabulary"])
def test_a_tied_head_stays_tied(head: str) -> None:
    model = quantize_(Tiny(tied=True, head=head), skip=())
    assert type(getattr(model, head)) is nn.Linear
    assert getattr(model, head).weight is model.embed.weight
    assert isinstance(model.get_submodule("layers.0.up"), NF4Linear)


def test_a_weight_shared_with_a_skipped_layer_stays_dense() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    quantize_(model, skip=("a",))
    assert kinds(model) == {"a": nn.Linear, "b": nn.Linear, "c": NF4Linear}


def test_shared_layers_and_shared_weights_are_quantised_once() -> None:
    shared, twin = nn.Linear(8, 8), nn.Linear(8, 8)
    twin.weight = shared.weight
    model = nn.Sequential(shared, nn.Sequential(shared), twin)
    biases = [shared.bias.clone(), twin.bias.clone()]
    quantize_(model)
    assert model[0] is model[1][0]
    first, last = model[0], model[2]
    assert isinstance(first, NF4Linear) and isinstance(last, NF4Linear) and first is not last
    assert last.packed is first.packed and last.absmax is first.absmax
    assert torch.equal(first.bias, biases[0]) and torch.equal(last.bias, biases[1])
    assert bits_per_parameter(model) == bits_per_parameter(quantize_(nn.Sequential(nn.Linear(8, 8))))


class Sharer(nn.Module):
    """One layer under two names of one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first


def test_both_names_of_one_layer_are_replaced() -> None:
    model = quantize_(Sharer())
    assert isinstance(model.first, NF4Linear) and model.second is model.first


def test_a_bare_linear_is_returned_quantised() -> None:
    layer = nn.Linear(6, 5)
    twin = quantize_(layer)
    assert isinstance(twin, NF4Linear) and torch.equal(twin.bias, layer.bias)


def test_a_model_on_meta_becomes_an_empty_4bit_model() -> None:
    with torch.device("meta"):
        model = quantize_(Tiny())
    layer = model.get_submodule("layers.0.up")
    assert isinstance(layer, NF4Linear) and layer.weight.is_meta
    assert layer.bias is not None and layer.bias.is_meta and not layer.bias.requires_grad
    layer.quantize_weight_(torch.randn(24, 16))
    assert not layer.weight.is_meta


def test_dense_weights_are_freed_one_by_one() -> None:
    """No dense weight outlives the call, and each is gone before the last layer is done."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    refs = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    original = NF4Linear.quantize_weight_

    def counting(self: NF4Linear, weight: Tensor, *, name: str = "") -> None:
        original(self, weight, name=name)
        alive.append(sum(ref() is not None for ref in refs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NF4Linear, "quantize_weight_", counting)
        quantize_(model)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 6
    assert alive == [6, 6, 5, 4, 3, 2] or alive == [6, 5, 4, 3, 2, 1]


def test_after_attach_the_base_is_quantised_under_its_own_name() -> None:
    model = Tiny()
    attach(model, LoRAConfig(rank=2, target=["up", "down"]))
    quantize_(model, skip=("down", "lm_head"))
    bases = {name: type(layer.base) for name, layer in adapter_layers(model).items()}
    assert bases["layers.0.up"] is NF4Linear and bases["layers.0.down"] is nn.Linear


def test_nan_is_refused_with_the_name_of_the_tensor() -> None:
    model = Tiny()
    model.get_submodule("layers.1.down").weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"'layers\.1\.down\.weight' cannot be quantised"):
        quantize_(model)


def test_nothing_to_do_is_an_error_that_says_why() -> None:
    with pytest.raises(InputError, match="this ReLU to quantise: it has none"):
        quantize_(nn.ReLU())
    with pytest.raises(InputError, match="already in place"):
        quantize_(quantize_(nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(InputError, match=r"no layer of this Sequential to quantise: 0\.weight \(named in skip\)"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), skip=("0",))
    with pytest.raises(InputError, match=r"blocksize.*got 100"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), blocksize=100)
    with pytest.raises(InputError, match=r"quant_type.*got 'int8'"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), "int8")


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)])
def test_bits_per_parameter(double_quant: bool, bits: float) -> None:
    model = quantize_(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512)), double_quant=double_quant)
    offsets = 32 * 2 / (2 * 512 * 256) if double_quant else 0  # one offset a layer
    assert bits_per_parameter(model) == pytest.approx(bits + offsets, rel=1e-12)


def test_smollm2_costs_at_most_4_13_bits() -> None:
    """Every linear layer of SmolLM2-135M but the tied head: 30 decoders of width 576."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    with torch.device("meta"):
        model = quantize_(nn.Sequential(*(nn.Linear(n_in, n_out, bias=False) for n_in, n_out in shapes * 30)))
    assert 4.126 < bits_per_parameter(model) <= 4.13
