"""What torch's tools do to any module they do to adapted and 4-bit ones: copies, casts, parametrisations, wrappers."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from fourbit.errors import InputError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.identity import base_identity
from fourbit.lora.layer import AdapterLayer, adapter_parameters, adapters_of
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.lora.peft_files import adapter_state, load_adapter_state
from fourbit.lora.quantize import dense_weights, quantize_

IN, OUT = 64, 32
X = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
A, B = "adapters.default.lora_A", "adapters.default.lora_B"


@pytest.fixture(params=["dense", "nf4"])
def layer(request: pytest.FixtureRequest) -> AdapterLayer:
    torch.manual_seed(0)
    base: nn.Linear | NF4Linear = nn.Linear(IN, OUT)
    if request.param == "nf4":
        base = NF4Linear.from_weight(base.weight, base.bias)
    part = LoRA(base, 4, 8)
    nn.init.normal_(part.lora_B)
    return AdapterLayer(base.requires_grad_(False), default=part)


def part_of(layer: AdapterLayer) -> LoRA:
    part = layer.adapters["default"]
    assert isinstance(part, LoRA)
    return part


def through_a_file(layer: AdapterLayer) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


def loaded_on_meta(layer: AdapterLayer) -> nn.Module:
    twin = copy.deepcopy(layer).to("meta")
    twin.load_state_dict(layer.state_dict(), assign=True)
    return twin


def filled_again(layer: AdapterLayer) -> nn.Module:
    twin = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict())
    return twin


COPIES: dict[str, Callable[[AdapterLayer], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_a_file,
    "assign": loaded_on_meta,
    "to_empty": filled_again,
    "share_memory": lambda layer: copy.deepcopy(layer).share_memory(),
}


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("swap", [False, True])
def test_a_copy_computes_the_same_and_stands_apart(layer: AdapterLayer, make: str, swap: bool) -> None:
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        twin = COPIES[make](layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(twin(X), layer(X))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    if make != "assign":
        nn.init.zeros_(twin.get_parameter(B))
        assert part_of(layer).lora_B.any()


@pytest.mark.parametrize("swap", [False, True])
def test_casts_leave_packed_bytes_and_scales_alone(layer: AdapterLayer, swap: bool) -> None:
    y = layer(X).detach()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        torch.testing.assert_close(layer.double()(X.double()).float(), y, rtol=1e-5, atol=1e-5)
        layer.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert part_of(layer).lora_A.dtype == layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer(X.bfloat16()).float(), y, rtol=0.1, atol=0.2)


def test_functional_calls_and_meta(layer: AdapterLayer) -> None:
    parameters = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    parameters[B] = torch.zeros_like(parameters[B])
    assert torch.equal(functional_call(layer, parameters, (X,)), layer.base(X))
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.is_meta and meta(X.to("meta")).shape == (3, OUT)


CHANGES: dict[str, Callable[[nn.Module, str], object]] = {
    "parametrize": lambda module, name: parametrize.register_parametrization(module, name, nn.Tanh()),
    "weight norm": lambda module, name: parametrizations.weight_norm(module, name),
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_factor_is_the_one_that_computes_and_trains(layer: AdapterLayer, change: str) -> None:
    part = part_of(layer)
    CHANGES[change](part, "lora_A")
    y = layer(X)
    torch.testing.assert_close(y, layer.base(X) + part.scale * X @ part.lora_A.T @ part.lora_B.T, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base(layer: AdapterLayer, change: str) -> None:
    """A dense one computes with what it was changed to; a weight in 4 bits is nothing that can be changed."""
    if isinstance(layer.base, NF4Linear):
        with pytest.raises((ValueError, TypeError), match="weight"):
            CHANGES[change](layer.base, "weight")
        return
    CHANGES[change](layer.base, "weight")
    torch.testing.assert_close(X @ layer.weight.T + layer.bias, layer(X), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_made_before_each_call_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, OUT))
    prune.l1_unstructured(model[0], "weight", 0.5)
    expected = model[0](X)
    quantize_(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is NF4Linear
    assert torch.equal(model[0](X), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(layer: AdapterLayer, dtype: torch.dtype, cast: torch.dtype) -> None:
    if dtype == torch.float64 and not isinstance(layer.base, NF4Linear):
        layer.double()  # as nn.Linear asks for
    x = X.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", cast):
        y = layer(x)
    y.sum().backward()
    factors = part_of(layer).lora_A
    assert y.dtype == (dtype if dtype == torch.float64 else cast)
    assert x.grad is not None and factors.grad is not None
    assert (x.grad.dtype, factors.grad.dtype) == (dtype, factors.dtype)


def test_inputs_of_any_layout(layer: AdapterLayer) -> None:
    for x in (X.T.contiguous().T, X[:1].expand(4, IN), X[0], X[:0], X.repeat(1, 2)[:, ::2], X.view(1, 3, 1, IN)):
        y = layer(x)
        assert y.shape == (*x.shape[:-1], OUT)
        torch.testing.assert_close(y, layer(x.contiguous()), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        layer(X)
    layer(X).sum().backward()
    assert part_of(layer).lora_B.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("place", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_a_step_without_numbers(place: Callable[[], AbstractContextManager[object]], dropout: float) -> None:
    """As one asks for shapes and memory before there is a model."""
    with place():
        model = quantize_(Network())
        attach(model, LoRAConfig(rank=2, alpha=4, target=["encoder.0", "head"], dropout=dropout))
        x = torch.randn(5, 8, requires_grad=True)
        y = model(x)
        y.sum().backward()
        layer = model.head
        assert isinstance(layer, AdapterLayer) and isinstance(layer.base, NF4Linear)
        assert y.shape == (5, 4) and layer.weight.shape == layer.base.dequantize().shape == (4, 8)
        assert y.device == layer.base.packed.device == layer.weight.device == x.device
        assert x.grad is not None and all(p.grad is not None for p in adapter_parameters(model).values())
    layer = NF4Linear.from_weight(torch.eye(IN))
    assert torch.equal(layer(X), X)  # nothing of it stays behind


UNDO: dict[str, Callable[[nn.Module, str], object]] = {
    "parametrize": parametrize.remove_parametrizations,
    "weight norm": parametrize.remove_parametrizations,
    "prune": prune.remove,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_is_not_loaded_into_tensors_made_of_others(change: str) -> None:
    model = Network()
    attach(model, LoRAConfig(rank=2, alpha=4, target=["head"]))
    state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    CHANGES[change](adapters_of(model)["head"], "lora_A")
    with pytest.raises(InputError, match=r"remove_parametrizations or prune\.remove before loading"):
        load_adapter_state(model, state)
    UNDO[change](adapters_of(model)["head"], "lora_A")
    load_adapter_state(model, state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(model).items())


@pytest.mark.parametrize("take", [quantize_, dense_weights, lambda model: attach(model, LoRAConfig(rank=2))])
def test_a_model_whose_lazy_modules_have_no_size_is_refused(take: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(IN, IN), nn.LazyLinear(OUT))
    with pytest.raises(InputError, match=r"'1\.weight' has no size yet: run the model on a batch first"):
        take(model)
    model(X)
    take(model)


def test_complex_layers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.complex64))
    for config in (LoRAConfig(rank=2), LoRAConfig(rank=2, target=["0"], bias="all")):
        with pytest.raises(InputError, match="'1' is complex"):
            attach(model, config)
    assert attach(model, LoRAConfig(rank=2, target=["0"])) == ["0"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "DDP": nn.parallel.DistributedDataParallel,
    "average": AveragedModel,
    "compiled DDP": lambda module: torch.compile(nn.parallel.DistributedDataParallel(module), backend="eager"),
}


@pytest.mark.parametrize("where", ["", "encoder", "encoder.2"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_the_plain_model_s_wherever_a_wrapper_sits(wrapper: str, where: str, one_process: None) -> None:
    """Targets, patterns, starts and files: a part may be wrapped as well as the whole, before or after attaching."""
    target = ["encoder.0", "encoder.2"]
    config = LoRAConfig(2, 4, target=target, rank_pattern={"encoder.2": 3}, modules_to_save=["head"], bias="lora_only")
    plain = Network()
    before, after = copy.deepcopy(plain), copy.deepcopy(plain)
    attach(plain, config, seed=3)
    paths = ["encoder.0", "encoder.2", "head"]
    wrapped = [wrap(before, where, wrapper), None]
    attach(wrapped[0], config, seed=3)
    attach(after, config, seed=3)
    wrapped[1] = wrap(after, where, wrapper)
    for model in (plain, *wrapped):
        assert list(adapters_of(model)) == paths and base_identity(model) == base_identity(plain)
        assert list(adapter_parameters(model)) == list(adapter_parameters(plain))
        state, wanted = adapter_state(model), adapter_state(plain)
        assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


def wrap(model: nn.Module, where: str, wrapper: str) -> nn.Module:
    make = WRAPPERS[wrapper]
    if not where:
        return make(model)
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(where)))
    return model
