"""rms_norm against its definition and torch's own: values, gradients, what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from fourbit.kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(1, 1), (3, 63), (2, 5, 64), (2, 3, 4, 65)]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_one_rounding_of_the_float64_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = sample(shape, dtype)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5)
    # half dtypes: one rounding to the dtype; fp32: the sum of squares adds up to D/2 roundings, halved by the root
    unit = torch.finfo(dtype).eps / 2
    bound = unit * 1.01 if dtype != torch.float32 else unit * (4 + shape[-1] / 4)
    for norm in (rms_norm, rms_norm_reference):
        assert norm(x, weight, 1e-5).dtype == dtype
        # fp16 results below its normal range round to a fixed step
        error = (norm(x, weight, 1e-5).double() - exact).abs()
        assert (error <= bound * exact.abs() + torch.finfo(dtype).tiny * unit).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, ...]) -> None:
    x, weight = (t.requires_grad_() for t in sample(shape, torch.float64))
    ours, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, shape[-1:], weight, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = (torch.autograd.grad(y, (x, weight), upstream) for y in (ours, theirs))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_half_dtype_gradients_are_computed_in_fp32() -> None:
    x, weight = sample((7, 64), torch.bfloat16)
    wide, wide_weight = (t.double().requires_grad_() for t in (x, weight))
    upstream = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x.requires_grad_()
    weight.requires_grad_()
    got = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), upstream)
    exact = torch.autograd.grad(rms_norm_reference(wide, wide_weight, 1e-5), (wide, wide_weight), upstream.double())
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-4)  # one rounding, and fp32 noise near zero


def test_large_half_values_do_not_overflow() -> None:
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)  # the square is infinite in fp16
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones_like(x))


def test_keeps_only_x_the_weight_and_one_number_a_row() -> None:
    x, weight = sample((5, 64), torch.float32)
    x.requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        rms_norm(x, weight, 1e-5)
    assert sorted(kept) == [(5, 1), (5, 64), (64,)]


def test_a_weight_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(8,\), got \(4,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(4), 1e-5)
