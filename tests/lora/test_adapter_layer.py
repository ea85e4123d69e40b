"""A layer with LoRA on it against the dense matmul that it factors, over dense and 4-bit bases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA

A, B = "adapters.default.lora_A", "adapters.default.lora_B"
BF16 = torch.bfloat16


def with_lora(base: nn.Linear | NF4Linear, *args: object, **options: object) -> tuple[AdapterLayer, LoRA]:
    """A layer and its LoRA with a random B: zero B would make most checks trivial."""
    lora = LoRA(base, *args, **options)
    nn.init.normal_(lora.lora_B)
    return AdapterLayer(base.requires_grad_(False), default=lora), lora


def linear(n_in: int, n_out: int, quantised: bool, bias: bool = True, **form: object) -> nn.Linear | NF4Linear:
    base = nn.Linear(n_in, n_out, bias=bias)
    return NF4Linear.from_weight(base.weight, base.bias, **form) if quantised else base


@st.composite
def layers(draw: st.DrawFn) -> tuple[AdapterLayer, LoRA]:
    n_in, n_out, quantised = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    form = {"blocksize": draw(st.sampled_from([32, 64, 256, 4096])), "double_quant": draw(st.booleans())}
    base = linear(n_in, n_out, quantised, draw(st.booleans()), **form)
    rank = draw(st.integers(1, min(n_in, n_out)))
    return with_lora(base, rank, alpha=draw(st.floats(0.1, 64)), rslora=draw(st.booleans()))


@given(layers(), st.integers(0, 5))
def test_forward_and_every_gradient_equal_the_dense_matmul(made: tuple[AdapterLayer, LoRA], rows: int) -> None:
    layer, lora = made[0].double(), made[1]
    x = torch.randn(rows, 2, layer.in_features, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, 2, layer.out_features, dtype=torch.float64)
    base = layer.base.dequantize(torch.float64) if isinstance(layer.base, NF4Linear) else layer.base.weight
    expected = F.linear(x, base + lora.scale * lora.lora_B @ lora.lora_A, layer.bias)
    actual = layer(x)
    inputs = [x, lora.lora_A, lora.lora_B]
    wanted = torch.autograd.grad(expected, inputs, grad)
    got = torch.autograd.grad(actual, inputs, grad)
    for mine, reference in zip((actual, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@given(layers())
def test_a_fresh_or_disabled_adapter_changes_nothing(made: tuple[AdapterLayer, LoRA]) -> None:
    layer, lora = made
    x = torch.randn(2, layer.in_features)
    layer(x).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {A, B}  # only the adapter gets gradients
    fresh = LoRA(layer.base, lora.rank, 16)
    assert fresh.is_idle() and not lora.is_idle()
    assert torch.equal(AdapterLayer(layer.base, fresh=fresh)(x), layer.base(x))
    layer.active = {}
    assert torch.equal(layer(x), layer.base(x))
    layer.active = {"default": 1.0}
    assert not torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_fp32_masters_under_lower_precision(dtype: torch.dtype) -> None:
    base = NF4Linear.from_weight(torch.randn(24, 32))
    layer, lora = with_lora(base, 4, 8)
    x = torch.randn(3, 32).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    for parameter in (lora.lora_A, lora.lora_B):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
    dense = base.dequantize()
    exact = x.float() @ (dense + lora.delta(dense)).T
    magnitude = x.detach().float().abs() @ (dense.abs() + lora.scale * lora.lora_B.abs() @ lora.lora_A.abs()).T
    # operands, the rank-r product, both summands and the sum are each rounded once to dtype
    assert bool(((y.float() - exact).abs() <= 6 * torch.finfo(dtype).eps / 2 * magnitude).all())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_autocast_it_behaves_as_with_bf16_activations(quantised: bool, dropout: float) -> None:
    """As nn.Linear does: bf16 out, and every gradient in its own tensor's dtype."""
    layer, lora = with_lora(linear(32, 24, quantised), 4, 8, dropout)
    x = torch.randn(3, 32, requires_grad=True)
    inputs, grad = (x, lora.lora_A, lora.lora_B), torch.randn(3, 24).to(BF16)
    torch.manual_seed(0)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    got = torch.autograd.grad(y, inputs, grad)
    assert [tensor.dtype for tensor in (y, *got)] == [BF16, *[torch.float32] * 3]
    torch.manual_seed(0)
    layer.base.bias.data = layer.base.bias.data.to(BF16)
    if not quantised:
        layer.base.to(BF16)
    expected = layer(x.to(BF16))
    wanted = torch.autograd.grad(expected, inputs, grad)
    for mine, reference in zip((y, *got), (expected, *wanted), strict=True):  # a few roundings to bf16 apart
        assert float((mine - reference).detach().norm() / reference.detach().norm()) <= 4 * torch.finfo(BF16).eps
    with torch.autocast("cpu", BF16):
        assert layer.double()(x.double()).dtype == torch.float64


def test_dropout_only_while_training_and_only_on_the_update() -> None:
    torch.manual_seed(0)
    layer, lora = with_lora(nn.Linear(200, 8), 4, 4, dropout=0.25)
    x = torch.randn(5, 200)
    plain = layer.eval()(x)
    assert torch.equal(plain, layer(x))
    torch.manual_seed(3)
    dropped = layer.train()(x)
    torch.manual_seed(3)
    h = F.dropout(x, 0.25)
    assert torch.equal(dropped, layer.base(x) + lora.scale * F.linear(F.linear(h, lora.lora_A), lora.lora_B))
    layer.active = {}
    assert torch.equal(layer(x), layer.base(x))
    layer.active, lora.dropout = {"default": 1.0}, 0.0
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_dense_is_saved_for_backward(dropout: float, checkpointed: bool) -> None:
    """What autograd keeps: x, x A^T, the adapter, the packed bytes and their scales; never a decoded weight."""
    n_in, n_out, rows = 64, 96, 6
    layer, lora = with_lora(NF4Linear.from_weight(torch.randn(n_out, n_in), torch.randn(n_out)), 4, 8, dropout)
    x = torch.randn(rows, n_in, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    y.sum().backward()
    assert x.grad is not None and lora.lora_A.grad is not None
    floats = [tensor for tensor in saved if tensor.is_floating_point()]
    assert saved and max((tensor.numel() for tensor in floats), default=0) <= rows * n_in < n_in * n_out // 8
    bytes_ = [tensor for tensor in saved if tensor.dtype == torch.uint8]
    assert {tensor.data_ptr() for tensor in bytes_} <= {layer.base.packed.data_ptr(), layer.base.absmax.data_ptr()}
    assert checkpointed or sum(tensor.nbytes for tensor in bytes_) >= n_in * n_out // 2


def test_start_is_uniform_and_depends_on_the_generator_alone() -> None:
    base = nn.Linear(400, 300)
    torch.manual_seed(7)
    one = LoRA(base, 64, 8)
    torch.manual_seed(7)
    two = LoRA(base, 64, 8)
    assert torch.equal(one.lora_A, two.lora_A)
    start, bound = one.lora_A.detach(), 1 / math.sqrt(400)
    assert float(start.abs().max()) <= bound
    # 25,600 draws: the standard error of the standard deviation is under 0.3%, so 2% is more than six of them
    assert float(start.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(start.mean())) <= 6 * bound / math.sqrt(3 * start.numel())
    assert torch.equal(one.lora_B, torch.zeros(300, 64))


def test_delta_and_scale() -> None:
    _, lora = with_lora(nn.Linear(6, 5), 4, 8)
    assert lora.scale == 2.0 and LoRA(nn.Linear(6, 5), 4, 8, rslora=True).scale == 4.0
    for dtype in (torch.float32, torch.float64):
        delta = lora.delta(torch.zeros(5, 6, dtype=dtype))
        assert delta.dtype == dtype
        torch.testing.assert_close(delta, 2.0 * (lora.lora_B @ lora.lora_A).detach().to(dtype))


def test_it_passes_for_a_linear_layer_where_its_sizes_are_read() -> None:
    base = nn.Linear(6, 5)
    layer, _ = with_lora(base.eval(), 2, 4)
    assert (layer.in_features, layer.out_features) == (6, 5)
    assert (layer.weight.shape, layer.weight.dtype) == ((5, 6), torch.float32)
    assert layer.bias is base.bias and not layer.training
    layer.active = {}
    assert layer.weight is base.weight
    layer.active = {"default": 1.0}
    assert "active=default\n" in repr(layer) and "(default): LoRA(rank=2, alpha=4, scale=2, dropout=0)" in repr(layer)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {A, B}


@pytest.mark.parametrize("rank", [0, -1])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=rf"rank must be (a whole number|at least 1), got {rank}"):
        LoRA(nn.Linear(9, 5), rank, 8)
