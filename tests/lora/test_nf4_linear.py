"""NF4Linear: the same numbers as a dense layer with the decoded weight, and a well-behaved module around them."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.linear4bit import NF4Linear


@st.composite
def options(draw: st.DrawFn) -> dict[str, object]:
    return {
        "quant_type": draw(st.sampled_from(["nf4", "fp4"])),
        "blocksize": draw(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])),
        "double_quant": draw(st.booleans()),
    }


sizes = st.integers(1, 70)


def example(n_in: int = 48, n_out: int = 40, seed: int = 0, **kwargs: object) -> NF4Linear:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(n_out, n_in, generator=generator), torch.randn(n_out, generator=generator)
    return NF4Linear.from_weight(weight, bias, **kwargs)


def stored(layer: NF4Linear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.stored_parameters().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@given(sizes, sizes, options(), st.booleans(), st.integers(0, 3))
def test_forward_and_gradient_are_those_of_the_decoded_weight(
    n_in: int, n_out: int, kwargs: dict[str, object], with_bias: bool, rows: int
) -> None:
    torch.manual_seed(n_in * 71 + n_out)
    layer = NF4Linear.from_weight(torch.randn(n_out, n_in), torch.randn(n_out) if with_bias else None, **kwargs)
    x = torch.randn(rows, 2, n_in, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, 2, n_out, dtype=torch.float64)
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x, layer.dequantize(torch.float64), bias)
    y = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    (actual_grad,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-12, atol=1e-12)


CASTS = {
    "to_bf16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "to_cpu_fp16": lambda m: m.to("cpu", torch.float16),
    "there_and_back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casting_the_model_leaves_the_weight_alone(cast, double_quant: bool) -> None:
    layer = example(double_quant=double_quant)
    before, weight = stored(layer), layer.dequantize()
    model = cast(nn.Sequential(layer, nn.Linear(40, 2)))
    assert model[0] is layer
    assert same(stored(layer), before)
    assert torch.equal(layer.dequantize(), weight)
    assert layer.bias is not None and layer.bias.dtype == model[1].weight.dtype  # the rest of the model is cast


def test_a_move_keeps_dtypes_and_shapes() -> None:
    layer = example()
    moved = copy.deepcopy(layer).to("meta", torch.float16)
    for name, tensor in layer.stored_parameters().items():
        there = moved.get_parameter(name)
        assert (there.is_meta, there.dtype, there.shape) == (True, tensor.dtype, tensor.shape)


@given(sizes, sizes, options(), st.booleans())
def test_state_dict_round_trip(n_in: int, n_out: int, kwargs: dict[str, object], bias: bool) -> None:
    torch.manual_seed(n_in)
    layer = NF4Linear.from_weight(torch.randn(n_out, n_in), torch.randn(n_out) if bias else None, **kwargs)
    fresh = NF4Linear(n_in, n_out, bias, **kwargs)
    fresh.load_state_dict(layer.state_dict())
    assert same(stored(fresh), stored(layer))
    x = torch.randn(2, n_in)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("assign", [True, False])
def test_round_trip_through_a_file(tmp_path: Path, assign: bool) -> None:
    model = nn.Sequential(example(seed=1), nn.ReLU(), example(40, 8, seed=2, double_quant=False))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    fresh = nn.Sequential(NF4Linear(48, 40), nn.ReLU(), NF4Linear(40, 8, double_quant=False))
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=assign)
    x = torch.randn(2, 48)
    assert torch.equal(fresh(x), model(x))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_of_another_format_is_an_error(assign: bool) -> None:
    plain, doubled = example(double_quant=False), example(double_quant=True)
    for layer, state in ((plain, doubled.state_dict()), (doubled, plain.state_dict())):
        before = stored(layer)
        with pytest.raises(RuntimeError, match=r"dtype mismatch for absmax: .*uint8"):
            layer.load_state_dict(state, assign=assign)
        with pytest.raises(RuntimeError, match="dtype mismatch for absmax"):  # not even when asked to be lenient
            layer.load_state_dict(state, strict=False, assign=assign)
        assert same(stored(layer), before)
    with pytest.raises(RuntimeError, match="size mismatch for absmax"):
        example(blocksize=128).load_state_dict(example(blocksize=64).state_dict())


def test_deepcopy_is_independent() -> None:
    layer = example()
    twin = copy.deepcopy(layer)
    assert same(stored(layer), stored(twin))
    twin.packed.zero_()
    assert not torch.equal(layer.packed, twin.packed)


@pytest.mark.parametrize("double_quant", [True, False])
def test_meta_layer_filled_from_a_stream(double_quant: bool) -> None:
    weight = torch.randn(40, 48)
    with torch.device("meta"):
        in_context = NF4Linear(48, 40, double_quant=double_quant)
    layer = NF4Linear(48, 40, True, "nf4", 64, double_quant, device="meta")
    for built in (in_context, layer):
        assert all(t.is_meta for t in built.parameters())
        shapes = {name: (b.shape, b.dtype) for name, b in built.stored_parameters().items()}
        built.quantize_weight_(weight, name="w")
        expected = NF4Linear.from_weight(weight, double_quant=double_quant)
        assert same(stored(built), stored(expected))
        assert shapes == {name: (b.shape, b.dtype) for name, b in built.stored_parameters().items()}
    storage = weight.untyped_storage().data_ptr()
    assert all(buffer.untyped_storage().data_ptr() != storage for buffer in layer.stored_parameters().values())
    assert sum(buffer.untyped_storage().nbytes() for buffer in layer.stored_parameters().values()) < weight.nbytes / 6


@given(st.integers(1, 200), st.integers(1, 200), options())
def test_an_empty_layer_has_the_shapes_of_a_full_one(n_in: int, n_out: int, kwargs: dict[str, object]) -> None:
    """Several nested scales and partial last blocks among them."""
    empty = NF4Linear(n_in, n_out, False, device="meta", **kwargs)
    full = NF4Linear.from_weight(torch.ones(n_out, n_in), **kwargs)
    shapes = [{name: (b.shape, b.dtype) for name, b in layer.stored_parameters().items()} for layer in (empty, full)]
    assert shapes[0] == shapes[1]


def test_a_new_layer_holds_zeros_and_is_filled_anew() -> None:
    assert torch.equal(NF4Linear(5, 3).dequantize(), torch.zeros(3, 5))
    assert torch.equal(NF4Linear(5, 3, double_quant=False, quant_type="fp4").dequantize(), torch.zeros(3, 5))
    layer, weight = example(), torch.randn(40, 48)
    layer.quantize_weight_(weight)
    assert torch.equal(layer.dequantize(), NF4Linear.from_weight(weight).dequantize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bad_weight_is_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 5).to(dtype)
    weight[3, 2] = bad
    with pytest.raises(InputError, match=r"'model\.q_proj\.weight' cannot be quantised to nf4.*finite"):
        NF4Linear.from_weight(weight, name="model.q_proj.weight")
    layer = example(5, 6)
    before = stored(layer)
    with pytest.raises(InputError, match="the weight cannot be quantised"):
        layer.quantize_weight_(weight)
    assert same(stored(layer), before)


def test_misuse_says_what_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"shape \[40, 48\], got \[48, 40\]"):
        example().quantize_weight_(torch.randn(48, 40))
    with pytest.raises(ValueError, match=r"blocksize.*got 48"):
        NF4Linear(4, 4, blocksize=48)
    with pytest.raises(ValueError, match=r"quant_type.*got 'int4'"):
        NF4Linear(4, 4, quant_type="int4")
    with pytest.raises(TypeError, match=r"floating-point activations, got torch\.uint8"):
        example()(torch.zeros(1, 48, dtype=torch.uint8))


def test_frozen_and_printed() -> None:
    layer = example()
    assert layer.bias is not None and not layer.bias.requires_grad
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["packed", "absmax", "nested_absmax", "nested_offset", "bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    expected = "in_features=48, out_features=40, bias=True, quant_type=nf4, blocksize=64, double_quant=True"
    assert repr(layer) == f"NF4Linear({expected})"
    assert layer.requires_grad_(False) is layer
    with pytest.raises(RuntimeError, match="floating point"):  # torch's refusal, at the packed codes, before any scale
        nn.Sequential(layer).requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert NF4Linear.from_weight(torch.randn(4, 4, requires_grad=True)).dequantize().requires_grad is False
