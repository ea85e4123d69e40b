"""At home in torch's modules: hooks hear what they would hear if layers were called one by one, code that reads a
layer's weight gets the weight it computes with, and what torch does to any module it does to ours."""

import copy
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fourbit.errors import InputError
from fourbit.lora.adapter import Adapter
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import AdapterLayer, adapter_layers
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.lora.project import project
from fourbit.lora.quantize import quantize_

IN, OUT = 64, 32
FORWARD = ["register_forward_hook", "register_forward_pre_hook"]
BACKWARD = ["register_full_backward_hook", "register_full_backward_pre_hook"]


@pytest.fixture(params=["dense", "nf4"])
def layer(request: pytest.FixtureRequest) -> AdapterLayer:
    return adapted(request.param)


def adapted(kind: str, **lora: object) -> AdapterLayer:
    torch.manual_seed(0)
    base: nn.Linear | NF4Linear = nn.Linear(IN, OUT)
    if kind == "nf4":
        base = NF4Linear.from_weight(base.weight, base.bias)
    part = LoRA(base, 4, 8, **lora)
    nn.init.normal_(part.lora_B)
    return AdapterLayer(base.requires_grad_(False), default=part)


def rows() -> Tensor:
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def part_of(layer: AdapterLayer) -> LoRA:
    part = layer.adapters["default"]
    assert isinstance(part, LoRA)
    return part


def inside(layer: AdapterLayer) -> dict[str, nn.Module]:
    return {"layer": layer, "base": layer.base, "adapter": part_of(layer)}


def outcome(call: Callable[[Tensor], Tensor], layer: AdapterLayer) -> list[Tensor]:
    layer.double()  # so that two ways to add up agree to the last digits that matter
    x = rows().detach().double().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, part_of(layer).lora_A, part_of(layer).lora_B])]


CALLS: dict[str, Callable[[AdapterLayer], Callable[[Tensor], Tensor]]] = {
    "called": lambda layer: layer,
    "projected": lambda layer: lambda x: project(x, (layer,))[0],
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("kind", [*FORWARD, *BACKWARD])
@pytest.mark.parametrize("where", ["layer", "base", "adapter"])
def test_a_hook_is_called_once_and_changes_nothing(layer: AdapterLayer, where: str, kind: str, how: str) -> None:
    call, heard = CALLS[how](layer), list[object]()
    expected = outcome(call, layer)
    handle = getattr(inside(layer)[where], kind)(lambda module, *seen: heard.append(seen))
    for mine, reference in zip(outcome(call, layer), expected, strict=True):
        torch.testing.assert_close(mine, reference)
    assert len(heard) == 1
    handle.remove()
    outcome(call, layer)
    assert len(heard) == 1


def test_what_a_hook_was_shown_stays_as_it_was(layer: AdapterLayer) -> None:
    layer.adapters["second"] = copy.deepcopy(part_of(layer)).freeze()
    layer.active["second"] = 1.0
    x, shown = rows(), list[Tensor]()
    for module in (layer.base, *(part for part, _ in layer.running())):
        module.register_forward_hook(lambda module, inputs, output: shown.append(output))
    y = layer(x)
    base = F.linear(x, layer.base.weight, layer.bias)
    update = part_of(layer).scale * x @ part_of(layer).lora_A.T @ part_of(layer).lora_B.T
    for seen, expected in zip([*shown, y], [base, base + update, base + 2 * update, base + 2 * update], strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_what_a_hook_gives_in_the_place_of_an_output_is_not_written_to(layer: AdapterLayer) -> None:
    patch = torch.zeros(3, OUT)
    layer.base.register_forward_hook(lambda module, inputs, output: patch)
    for _ in range(2):
        update = part_of(layer).scale * rows() @ part_of(layer).lora_A.T @ part_of(layer).lora_B.T
        torch.testing.assert_close(layer(rows()), update, rtol=1e-5, atol=1e-5)
    assert not patch.any()


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_global_hooks_hear_base_adapter_and_layer(layer: AdapterLayer, kind: str, how: str) -> None:
    call, heard = CALLS[how](layer), list[nn.Module]()
    expected = outcome(call, layer)

    def hear(module: nn.Module, *seen: object) -> None:
        heard.append(module)

    handle = getattr(torch_module, f"register_module_{kind}")(hear)
    try:
        got = outcome(call, layer)
    finally:
        handle.remove()
    assert set(heard) == set(inside(layer).values()) and len(heard) == 3
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference)


class InPlace(Adapter):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y.add_(1.0)


@pytest.mark.parametrize("where", ["base", "first"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_what_a_hook_keeps_is_not_written_over(kind: str, where: str) -> None:
    """By a kind of adapter that adds in place, as it may."""
    base, x, kept = adapted(kind).base, rows().detach(), list[Tensor]()
    layer = AdapterLayer(base, first=InPlace(), second=InPlace())
    expected = base(x) + (where == "first")
    layer.get_submodule(where if where == "base" else f"adapters.{where}").register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    with torch.no_grad():
        assert torch.equal(layer(x), base(x) + 1.0 + 1.0)
    assert torch.equal(kept[0], expected)


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_a_forward_put_in_the_place_of_a_layers_own_is_called(layer: AdapterLayer, where: str) -> None:
    """As accelerate puts its own there."""
    module, calls = inside(layer)[where], list[int]()
    own = module.forward
    module.forward = lambda *inputs: calls.append(1) or own(*inputs)  # type: ignore[method-assign]  # as accelerate does
    layer(rows())
    assert calls == [1]


def test_hooks_on_tensors_of_the_adapter_are_called(layer: AdapterLayer) -> None:
    part, heard = part_of(layer), list[str]()
    part.lora_A.register_hook(lambda grad: heard.append("A"))
    part.lora_B.register_hook(torch.zeros_like)
    part.lora_B.register_post_accumulate_grad_hook(lambda parameter: heard.append("B"))
    layer(rows()).sum().backward()
    assert sorted(heard) == ["A", "B"] and part.lora_B.grad is not None and not part.lora_B.grad.any()


def test_a_layer_keeps_its_hooks_when_it_is_quantised() -> None:
    model, heard = nn.Sequential(nn.Linear(IN, OUT)), list[str]()
    handle = model[0].register_forward_hook(lambda *seen: heard.append("forward"))
    model[0]._register_state_dict_hook(lambda *seen: heard.append("state"))
    quantize_(model)(rows())
    model.state_dict()
    handle.remove()
    model(rows())
    assert heard == ["forward", "state"]


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "train": nullcontext,
    "eval": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def dense_twin(model: nn.Module) -> nn.Module:
    """The model with nn.Linear of the same weights in the place of our layers."""
    twin = copy.deepcopy(model)
    ours = {name: m for name, m in twin.named_modules() if isinstance(m, AdapterLayer | NF4Linear)}
    for name, module in ours.items():
        if not name.endswith(".base"):
            dense = nn.Linear(module.in_features, module.out_features).train(module.training)
            dense.load_state_dict({"weight": module.weight.detach(), "bias": module.bias})
            twin.set_submodule(name, dense)
    return twin


def train_b(model: nn.Module) -> None:
    for layer in adapter_layers(model).values():
        nn.init.normal_(part_of(layer).lora_B, std=0.3)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype")
@pytest.mark.parametrize("target", [["linear1", "linear2"], ["layers.1.linear1"]])
@pytest.mark.parametrize("quantised", [False, True])
def test_an_encoder_s_fast_path_skips_no_layer(quantised: bool, target: list[str]) -> None:
    """nn.TransformerEncoder reads its layers' weights itself where nothing trains, and packs a padded batch."""
    torch.manual_seed(0)
    blocks = nn.TransformerEncoderLayer(IN, 4, 2 * IN, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(blocks, 2)
    if quantised:
        quantize_(model, skip=[] if target[0] == "linear1" else [r"layers.0.linear1", "layers.0.linear2"])
    attach(model, LoRAConfig(rank=4, alpha=8, target=target))
    train_b(model)
    x, padding = torch.randn(2, 5, IN), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for name, mode in MODES.items():
        model.train(name == "train")
        twin = dense_twin(model)
        for mask in (None, padding):
            with mode():
                mine, reference = model(x, src_key_padding_mask=mask), twin(x, src_key_padding_mask=mask)
            torch.testing.assert_close(mine[~padding], reference[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype")
def test_nested_inputs(layer: AdapterLayer, layout: torch.layout) -> None:
    parts = [torch.randn(3, IN), torch.randn(5, IN)]
    for module in (layer.base, layer):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        for mine, part in zip(module(nested).unbind(), parts, strict=True):
            torch.testing.assert_close(mine, module(part))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_attention_computes_with_its_adapted_projection_and_trains_it(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(OUT, 4, batch_first=True)
    base: nn.Linear | NF4Linear = nn.Linear(OUT, OUT)
    base = NF4Linear.from_weight(base.weight, base.bias) if kind == "nf4" else base
    model.out_proj = AdapterLayer(base.requires_grad_(False), default=LoRA(base, 4, 8))
    train_b(model)
    x = torch.randn(2, 5, OUT)
    for name, mode in MODES.items():
        model.train(name == "train")
        twin = dense_twin(model)
        with mode():
            mine, reference = model(x, x, x)[0], twin(x, x, x)[0]
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
        if name == "train":
            part = part_of(model.out_proj)
            got = torch.autograd.grad(mine.square().sum(), part.lora_B)[0]
            (of_weight,) = torch.autograd.grad(reference.square().sum(), twin.out_proj.weight)
            torch.testing.assert_close(got, part.scale * of_weight @ part.lora_A.T, rtol=1e-4, atol=1e-4)
    part_of(model.out_proj).dropout = 0.1
    with pytest.raises(InputError, match="set dropout=0"):
        model.train()(x, x, x)


class Feed(nn.Module):
    """As T5 does: it casts what it feeds a layer to the layer's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(IN, IN), nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wi(x).relu()
        return self.wo(h.to(self.wo.weight.dtype))


@pytest.mark.parametrize("target", ["wi", "wo"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_s_dtype_is_that_of_the_weight_it_was_made_from(compiled: bool, target: str) -> None:
    model = quantize_(Feed().bfloat16())
    attach(model, LoRAConfig(rank=4, alpha=8, target=[target]))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    assert run(rows().detach().bfloat16()).dtype == torch.bfloat16
    for cast in (torch.float16, torch.float64, torch.float32):
        assert model.to(cast).wo.weight.dtype == model.wi.weight.dtype == cast
    assert quantize_(nn.Sequential(nn.Linear(IN, OUT, device="meta").half()))[0].weight.dtype == torch.float16


def test_a_weight_is_read_as_any_linear_layer_s(layer: AdapterLayer) -> None:
    part, base = part_of(layer), layer.base
    dense = base.dequantize() if isinstance(base, NF4Linear) else base.weight
    assert (layer.weight.shape, layer.weight.numel(), layer.weight.device.type) == ((OUT, IN), OUT * IN, "cpu")
    assert layer.weight.requires_grad and not base.weight.requires_grad
    torch.testing.assert_close(base.weight.detach(), dense)
    torch.testing.assert_close(layer.weight.detach(), dense + part.scale * part.lora_B @ part.lora_A)
    torch.testing.assert_close(rows() @ layer.weight.T + layer.bias, layer(rows()), rtol=1e-5, atol=1e-5)
    layer.active = {}
    torch.testing.assert_close(layer.weight.detach(), dense)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda weight: weight.zero_(),
    "operator": lambda weight: operator.iadd(weight, 1),
    "foreach": lambda weight: torch._foreach_mul_([weight], 2.0),
    "data": lambda weight: weight.data.normal_(),
    "init": lambda weight: nn.init.xavier_uniform_(weight),
    "item": lambda weight: weight.__setitem__(0, 1.0),
    "requires_grad": lambda weight: setattr(weight, "requires_grad", True),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_into_such_a_weight_is_refused(layer: AdapterLayer, write: str) -> None:
    with pytest.raises(RuntimeError, match="made when it is read"):
        WRITES[write](layer.weight)
