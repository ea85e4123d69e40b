"""Named adapters: several on one layer, of any kind; switched, copied, taken off and kept as tensors by name."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.active import adapters_off, copy_adapter, remove_adapter, use, using
from fourbit.lora.adapter import Adapter
from fourbit.lora.attach import attach, install
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import AdapterLayer, adapter_layers, adapter_parameters, adapters_of
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.peft_files import adapter_state, load_adapter, load_adapter_state, save_adapter
from fourbit.lora.quantize import quantize_
from fourbit.lora.targets import linear_layers

Make = Callable[..., nn.ModuleDict]
PATHS = ["mlp.up_proj", "mlp.down_proj"]


class Scale(Adapter):
    """A second kind, which the package does not know: each output times 1 + gain (IA3, arXiv 2205.05638)."""

    peft_type = "IA3"

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + self.gain.to(y.dtype))

    def delta(self, weight: Tensor) -> Tensor:
        return weight * self.gain.detach()[:, None]


def weight(layer: AdapterLayer) -> Tensor:
    """The dense weight that a layer with its active adapters computes with."""
    base = layer.base
    found = base.dequantize(torch.float64) if isinstance(base, NF4Linear) else base.weight.detach().double()
    for adapter, _ in layer.running():
        found = found + adapter.delta(found)
    return found


def outputs(model: nn.ModuleDict) -> Tensor:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return model["mlp"]["down_proj"](model["mlp"]["up_proj"](x).relu())


def add_scale(model: nn.Module, name: str = "scale") -> None:
    install(model, {path: Scale(linear_layers(model)[path].out_features) for path in PATHS}, name)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(params=[False, True], ids=["dense", "nf4"])
def two(request: pytest.FixtureRequest, adapted: Make) -> nn.ModuleDict:
    """LoRA on both layers of the MLP, and beside it an adapter of the other kind, both active, with random values."""
    model = quantize_(adapted()) if request.param else adapted()
    add_scale(model)
    for parameter in adapter_parameters(model, "scale").values():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    use(model, "default", "scale")
    return model


def test_a_second_kind_trains_beside_lora(two: nn.ModuleDict) -> None:
    """Each order of both is what the weights changed by their deltas give; what was attached last is trained."""
    x, layer = torch.randn(4, 6, dtype=torch.float64), adapter_layers(two.double())["mlp.up_proj"]
    layer.base.bias.data.zero_()  # which the other kind scales too, and a delta leaves alone
    for names in (["default", "scale"], ["scale", "default"], ["scale"], []):
        use(two, *names)
        torch.testing.assert_close(layer(x), x @ weight(layer).T, rtol=1e-12, atol=1e-12)
    trained = {name for name, parameter in two.named_parameters() if parameter.requires_grad}
    assert trained == {f"{path}.adapters.scale.gain" for path in PATHS}
    use(two, "default", "scale")
    optimizer, before = torch.optim.SGD(adapter_parameters(two, "scale").values(), lr=0.1), state(two)
    losses = []
    for _ in range(5):
        losses.append(layer(x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert {name for name, value in state(two).items() if not torch.equal(value, before[name])} == {
        "mlp.up_proj.adapters.scale.gain"
    }


def test_a_second_kind_is_switched_copied_and_kept(two: nn.ModuleDict, tmp_path: Path) -> None:
    both = outputs(two)
    copy_adapter(two, "scale", "kept")
    for parameter in adapter_parameters(two, "scale").values():
        parameter.data.zero_()
    with using(two, "default", "kept"):
        assert torch.equal(outputs(two), both)
    with using(two, "default"):
        alone = outputs(two)
    torch.testing.assert_close(outputs(two), alone)  # one op with its base when alone, two beside another
    assert not torch.equal(alone, both)
    load_adapter_state(two, adapter_state(two, "kept"), "scale")
    assert torch.equal(outputs(two), both)
    wrong = adapter_state(two, "kept") | {"base_model.model.mlp.up_proj.gain": torch.ones(3)}
    with pytest.raises(InputError, match=r"1 of another shape: .*up_proj\.gain must be \[10\], got \[3\]"):
        load_adapter_state(two, wrong, "scale")
    save_adapter(two, tmp_path)  # the LoRA beside it
    remove_adapter(two, "scale")
    assert torch.equal(outputs(two), alone)


@pytest.mark.parametrize("weights", [None, (1, 0.5), (-0.25, 2.0), (0, 0)])
@pytest.mark.parametrize("quantised", [False, True])
def test_two_loras_add_up(adapted: Make, base: Make, quantised: bool, weights: tuple[float, float] | None) -> None:
    one, other = adapted(), adapted(seed=2, rank=3, alpha=1, rslora=True)
    model = quantize_(adapted()) if quantised else adapted()
    dense = [adapters_of(m)["mlp.up_proj"].delta(torch.zeros(10, 6)) for m in (one, other)]
    install(model, adapters_of(other), "other")
    layer = adapter_layers(model)["mlp.up_proj"]
    assert layer.active == {"other": 1.0} and not any(p.requires_grad for p in adapter_parameters(model).values())
    use(model, "default", "other", weights=weights)
    first, second = weights or (1, 1)
    x = torch.randn(5, 6, requires_grad=True)
    want = layer.base(x) + x @ (first * dense[0] + second * dense[1]).T
    (grad,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], grad)
    torch.testing.assert_close(x @ layer.weight.T + layer.bias, want)
    assert (layer.joint(x) is not None) == quantised  # one op of all
    hook = layer.adapters["other"].register_forward_hook(lambda *_: None)  # one by one
    torch.testing.assert_close(layer(x), want)
    hook.remove()
    layer.train()
    for part in layer.adapters.values():
        part.dropout = 1e-9  # apart, as each drops for itself
    torch.testing.assert_close(layer(x), want)


def test_weights_are_one_finite_number_for_each_name(adapted: Make) -> None:
    model = adapted()
    copy_adapter(model, "default", "other")
    for names, weights in (("other", "other"), None), (("other",), ()), (("default", "other"), (1, math.nan)):
        with pytest.raises(InputError):
            use(model, *names, weights=weights)
    assert all(layer.active == {"default": 1.0} for layer in adapter_layers(model).values())


def test_a_weight_moves_a_copy_from_its_base(adapted: Make) -> None:
    model = adapted(modules_to_save=["mlp.down_proj"])
    layer = adapter_layers(model)["mlp.down_proj"]
    copied, own = layer.weight.detach(), layer.base.weight
    with using(model, "default", weights=[0.25]):
        torch.testing.assert_close(layer.weight, 0.25 * copied + 0.75 * own)
        torch.testing.assert_close(layer(torch.eye(own.shape[1])).T - layer.bias[:, None], layer.weight)


@pytest.mark.parametrize("settings", [{}, {"rank": 3, "alpha": 1, "rslora": True}, {"target": ["up_proj"]}])
def test_another_adapter_computes_as_in_its_own_model(
    tmp_path: Path, base: Make, adapted: Make, settings: dict[str, object]
) -> None:
    """Loaded beside the model's own, of another rank, scale and layers, or on layers where there is none."""
    other = adapted(seed=2, **settings)
    save_adapter(other, tmp_path)
    for model in (adapted(), adapted(target=["down_proj"])):
        before, own = state(model), outputs(model)
        assert load_adapter(model, tmp_path, name="teacher", trainable=False) == list(adapters_of(other))
        assert torch.equal(outputs(model), own)
        with using(model, "teacher"):
            assert torch.equal(outputs(model), outputs(other))
            with adapters_off(model):
                assert torch.equal(outputs(model), outputs(base()))
            assert torch.equal(outputs(model), outputs(other))
        assert torch.equal(outputs(model), own) and not torch.equal(own, outputs(other))
        assert all(p.requires_grad for p in adapter_parameters(model).values())
        assert not any(p.requires_grad for p in adapter_parameters(model, "teacher").values())
        remove_adapter(model, "teacher")
        assert same(state(model), before)


def test_a_waiting_adapter_changes_nothing_else(base: Make, folder: Path) -> None:
    """Of a dense model too, which may train as a whole."""
    model = base()
    model["mlp"]["down_proj"].weight.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    load_adapter(model, folder, name="teacher", trainable=False)
    assert {n.replace(".base.", "."): p.requires_grad for n, p in model.named_parameters() if ".base." in n} == {
        name: value for name, value in trained.items() if "mlp" in name
    }
    outputs(model).sum().backward()
    assert model["mlp"]["up_proj"].base.weight.grad is not None
    remove_adapter(model, "teacher")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", None])
def test_names_that_no_adapter_can_have(name: object, base: Make, adapted: Make, folder: Path) -> None:
    model = base()
    with pytest.raises(InputError, match="an adapter's name must be a word without dots"):
        attach(model, LoRAConfig(rank=2), name)
    with pytest.raises(InputError, match="an adapter's name must be"):
        load_adapter(model, folder, name=name)
    assert same(state(model), state(base())) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="an adapter's name must be"):
        copy_adapter(adapted(), "default", name)


@pytest.mark.parametrize("name", ["base", "self", "active", "a-b c"])
def test_names_that_are_fine(name: str, base: Make, adapted: Make, folder: Path) -> None:
    model = base()
    load_adapter(model, folder, name=name)
    assert torch.equal(outputs(model), outputs(adapted()))
    assert isinstance(adapter_layers(model)["mlp.up_proj"].frozen({name: 1.0}), AdapterLayer)
    assert list(adapters_of(model, name)) == PATHS


def test_an_error_inside_leaves_the_model_whole(adapted: Make) -> None:
    model = adapted(dropout=0.5)
    adapter_layers(model)["mlp.up_proj"].active = {}
    copy_adapter(model, "default", "reference")
    before = state(model)
    with pytest.raises(RuntimeError, match="boom"), using(model, "reference"):
        raise RuntimeError("boom")
    assert [layer.active for layer in adapter_layers(model).values()] == [{}, {"default": 1.0}]
    assert same(state(model), before)
    parts = list(adapters_of(model, "reference").values())
    assert [part.dropout for part in parts] == [0.0, 0.0] and not any(p.requires_grad for p in parts[0].parameters())


def test_a_graph_made_before_keeps_its_gradients(adapted: Make) -> None:
    """The reference may run between a policy's forward and its backward."""
    model = adapted()
    copy_adapter(model, "default", "reference")
    outputs(model).sum().backward()
    wanted = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    loss = outputs(model).sum()
    with using(model, "reference"):
        assert not outputs(model).requires_grad
    loss.backward()
    assert all(torch.equal(p.grad, wanted[name]) for name, p in adapter_parameters(model).items())


def test_taking_off_the_last_adapter_gives_back_the_base(base: Make) -> None:
    model = base()
    layers, before = linear_layers(model), state(model)
    model["again"] = model["mlp"]["up_proj"]
    before |= {f"again.{name}": before[f"mlp.up_proj.{name}"] for name in ("weight", "bias")}
    attach(model, LoRAConfig(rank=2))
    assert isinstance(model["again"], AdapterLayer) and model["again"] is model["mlp"]["up_proj"]
    remove_adapter(model, "default")
    assert linear_layers(model) == layers and model["again"] is layers["mlp.up_proj"] and same(state(model), before)


def test_names_that_are_not_there_or_twice_are_refused(adapted: Make, base: Make) -> None:
    model = adapted()
    for act in (use, remove_adapter, lambda model, name: copy_adapter(model, name, "x")):
        with pytest.raises(InputError, match="carries no adapter 'other'; it carries default"):
            act(model, "other")
    with pytest.raises(InputError, match="it carries none at all"), using(base(), "other"):
        pass
    with pytest.raises(InputError, match="already carries an adapter 'default'"):
        copy_adapter(model, "default", "default")
    with pytest.raises(InputError, match="already carries an adapter 'default'"):
        attach(model, LoRAConfig(rank=2, target=["lm_head"]))
    assert list(adapters_of(model)) == PATHS
    attach(model, LoRAConfig(rank=2, target=["lm_head"]), "head")
    assert list(adapters_of(model, "head")) == ["lm_head"] and outputs(model).requires_grad is False


def test_hooks_are_heard_on_layer_base_and_adapter(adapted: Make) -> None:
    """The joint op would pass them by."""
    layer, x = adapter_layers(quantize_(adapted()))["mlp.up_proj"], torch.randn(2, 6)
    joint, heard = layer(x), []
    assert layer.joint(x) is not None
    for module in (layer.base, layer.adapters["default"]):
        hook = module.register_forward_hook(lambda module, *_: heard.append(module))
        assert layer.joint(x) is None
        torch.testing.assert_close(layer(x), joint)
        hook.remove()
    assert heard == [layer.base, layer.adapters["default"]]


def test_a_frozen_head_stands_apart(adapted: Make) -> None:
    layer = adapter_layers(adapted(dropout=0.5))["mlp.up_proj"]
    x, twin = torch.randn(2, 6), layer.train().frozen({"default": 1.0, "absent": 1.0})
    assert layer.frozen({"absent": 1.0}) is layer.base
    want = copy.deepcopy(layer).eval()(x)
    layer.adapters["default"].lora_B.data.zero_()
    assert torch.equal(twin(x), want) and not any(p.requires_grad for p in twin.parameters())
