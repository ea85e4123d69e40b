"""A layer with LoRA on it against the dense matmul that it factors, over dense and 4-bit bases."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.adapter import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA

A, B = "adapters.default.lora_A", "adapters.default.lora_B"


def with_lora(base: nn.Linear | NF4Linear, *args: object, trained: bool = True, **options: object) -> AdapterLayer:
    """A base with LoRA, whose B is random where it is `trained`; else zero, as at the start."""
    layer = AdapterLayer(base, default=LoRA(base, *args, **options))
    if trained:  # zero B would make most checks trivial
        nn.init.normal_(part(layer).lora_B)
    return layer


def part(layer: AdapterLayer) -> LoRA:
    return layer.adapters["default"]


@st.composite
def layers(draw: st.DrawFn) -> AdapterLayer:
    n_in, n_out = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    base: nn.Linear | NF4Linear = nn.Linear(n_in, n_out, bias=draw(st.booleans()))
    if draw(st.booleans()):
        blocksize, double_quant = draw(st.sampled_from([32, 64, 256, 4096])), draw(st.booleans())
        base = NF4Linear.from_weight(base.weight, base.bias, blocksize=blocksize, double_quant=double_quant)
    rank = draw(st.integers(1, min(n_in, n_out)))
    return with_lora(base, rank, alpha=draw(st.floats(0.1, 64)), rslora=draw(st.booleans()))


def dense_weight(layer: AdapterLayer, dtype: torch.dtype) -> Tensor:
    return layer.base.dequantize(dtype) if isinstance(layer.base, NF4Linear) else layer.base.weight.to(dtype)


@given(layers(), st.integers(0, 5))
def test_forward_and_every_gradient_equal_the_dense_matmul(layer: AdapterLayer, rows: int) -> None:
    layer = layer.double()
    x = torch.randn(rows, 2, layer.in_features, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, 2, layer.out_features, dtype=torch.float64)
    weight = dense_weight(layer, torch.float64) + part(layer).scale * part(layer).lora_B @ part(layer).lora_A
    expected = F.linear(x, weight, layer.bias)
    actual = layer(x)
    inputs = {"x": x, "lora_A": part(layer).lora_A, "lora_B": part(layer).lora_B}
    wanted = torch.autograd.grad(expected, list(inputs.values()), grad)
    got = torch.autograd.grad(actual, list(inputs.values()), grad)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name, mine, reference in zip(inputs, got, wanted, strict=True):
        torch.testing.assert_close(
            mine, reference, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_gradcheck(quantized: bool, rslora: bool) -> None:
    base: nn.Linear | NF4Linear = nn.Linear(7, 5)
    if quantized:
        base = NF4Linear.from_weight(base.weight, base.bias, blocksize=32)
    layer = with_lora(base, 3, 6, rslora=rslora).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {A: a, B: b}, (x,))

    inputs = (x, part(layer).lora_A.detach().requires_grad_(), part(layer).lora_B.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)


@given(layers())
def test_only_the_adapter_gets_gradients(layer: AdapterLayer) -> None:
    layer(torch.randn(3, layer.in_features)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {A, B}


@given(layers())
def test_a_fresh_or_disabled_adapter_changes_nothing(layer: AdapterLayer) -> None:
    x = torch.randn(2, layer.in_features)
    fresh = with_lora(layer.base, part(layer).rank, 16, trained=False)
    assert torch.equal(fresh(x), layer.base(x))
    layer.active = []
    assert torch.equal(layer(x), layer.base(x))
    layer.active = ["default"]
    assert not torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters_under_lower_precision(dtype: torch.dtype) -> None:
    base = NF4Linear.from_weight(torch.randn(24, 32))
    layer = with_lora(base, 4, 8)
    x = torch.randn(3, 32).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    for parameter in (part(layer).lora_A, part(layer).lora_B):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    weight = base.dequantize() + layer.delta()
    update = part(layer).scale * part(layer).lora_B.abs() @ part(layer).lora_A.abs()
    magnitude = x.detach().float().abs() @ (base.dequantize().abs() + update).T
    # operands, the rank-r product, both summands and the sum are each rounded once to dtype
    assert bool(((y.float() - x.float() @ weight.T).abs() <= 6 * torch.finfo(dtype).eps / 2 * magnitude).all())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_autocast_it_behaves_as_with_bf16_activations(quantized: bool, dropout: float) -> None:
    """As nn.Linear does: bf16 out, and every gradient in its own tensor's dtype."""
    base: nn.Linear | NF4Linear = nn.Linear(32, 24)
    if quantized:
        base = NF4Linear.from_weight(base.weight, base.bias)
    layer = with_lora(base, 4, 8, dropout)
    x = torch.randn(3, 32, requires_grad=True)
    grad = torch.randn(3, 24).bfloat16()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    got = torch.autograd.grad(y, (x, part(layer).lora_A, part(layer).lora_B), grad)
    assert y.dtype == torch.bfloat16
    assert [tensor.dtype for tensor in got] == [torch.float32] * 3
    torch.manual_seed(0)
    layer.base.bias.data = layer.base.bias.data.bfloat16()
    if not quantized:
        layer.base.bfloat16()
    expected = layer(x.bfloat16())
    wanted = torch.autograd.grad(expected, (x, part(layer).lora_A, part(layer).lora_B), grad)
    for mine, reference in zip((y, *got), (expected, *wanted), strict=True):  # a few roundings to bf16 apart
        assert (
            float((mine - reference).detach().norm() / reference.detach().norm()) <= 4 * torch.finfo(torch.bfloat16).eps
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64


def test_dropout_only_while_training_and_only_on_the_update() -> None:
    torch.manual_seed(0)
    layer = with_lora(nn.Linear(200, 8), 4, 4, dropout=0.25)
    x = torch.randn(5, 200)
    layer.eval()
    plain = layer(x)
    assert torch.equal(plain, layer(x))
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    h = F.dropout(x, 0.25)
    lora = part(layer)
    assert torch.equal(dropped, layer.base(x) + lora.scale * F.linear(F.linear(h, lora.lora_A), lora.lora_B))
    layer.active = []
    assert torch.equal(layer(x), layer.base(x))
    layer.active, part(layer).dropout = ["default"], 0.0
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_dense_is_saved_for_backward(dropout: float, checkpointed: bool) -> None:
    """What autograd keeps: x, x A^T, the adapter, the packed bytes and their scales; never a decoded weight."""
    n_in, n_out, rank, rows = 64, 96, 4, 6
    layer = with_lora(NF4Linear.from_weight(torch.randn(n_out, n_in), torch.randn(n_out)), rank, 8, dropout)
    x = torch.randn(rows, n_in, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        else:
            y = layer(x)
    y.sum().backward()
    assert x.grad is not None and part(layer).lora_A.grad is not None
    floats = [tensor for tensor in saved if tensor.is_floating_point()]
    assert saved and max((tensor.numel() for tensor in floats), default=0) <= rows * n_in < n_in * n_out // 8
    for tensor in saved:
        if tensor.dtype == torch.uint8:
            assert tensor.data_ptr() in {layer.base.weight.data_ptr(), layer.base.absmax.data_ptr()}
    if not checkpointed:
        assert sum(tensor.nbytes for tensor in saved if tensor.dtype == torch.uint8) >= n_in * n_out // 2


def test_a_dense_base_is_saved_as_it_is() -> None:
    layer = with_lora(nn.Linear(64, 96), 4, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(6, 64, requires_grad=True))
    big = [tensor for tensor in saved if tensor.numel() >= 64 * 96]
    assert {tensor.data_ptr() for tensor in big} == {layer.weight.data_ptr()}


def test_start_is_uniform_and_depends_on_the_generator_alone() -> None:
    base = nn.Linear(400, 300)
    torch.manual_seed(1)
    one = LoRA(base, 64, 8, generator=torch.Generator().manual_seed(7))
    state = torch.get_rng_state()
    two = LoRA(base, 64, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(one.lora_A, two.lora_A) and torch.equal(torch.get_rng_state(), state)
    bound = 1 / math.sqrt(400)
    start = one.lora_A.detach()
    assert float(start.abs().max()) <= bound
    # 25,600 draws: the standard error of the standard deviation is under 0.3%, so 2% is more than six of them
    assert float(start.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(start.mean())) <= 6 * bound / math.sqrt(3 * start.numel())
    assert torch.equal(one.lora_B, torch.zeros(300, 64))


def test_delta_and_scale() -> None:
    layer = with_lora(nn.Linear(6, 5), 4, 8)
    assert part(layer).scale == 2.0 and LoRA(nn.Linear(6, 5), 4, 8, rslora=True).scale == 4.0
    torch.testing.assert_close(layer.delta(), 2.0 * part(layer).lora_B.detach() @ part(layer).lora_A.detach())
    half = copy.deepcopy(layer).bfloat16()
    assert half.delta().dtype == torch.float32 and not half.delta().requires_grad
    assert layer.double().delta().dtype == torch.float64


def test_it_passes_for_a_linear_layer_where_its_sizes_are_read() -> None:
    base = nn.Linear(6, 5)
    layer = with_lora(base.eval(), 2, 4)
    assert (layer.in_features, layer.out_features) == (6, 5)
    assert layer.weight is base.weight and layer.bias is base.bias and not layer.training
    assert "active=default\n" in repr(layer) and "(default): LoRA(rank=2, alpha=4, scale=2, dropout=0)" in repr(layer)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {A, B}


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=rf"1\.\.5 for a 5x9 \(out x in\) layer, got {rank}"):
        LoRA(nn.Linear(9, 5), rank, 8)
