"""The gate lets through what rounding explains and refuses what it does not."""

import pytest
import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.weights import Weights


def worst(y: Tensor, x: Tensor, weight: Tensor, *, scaled_late: bool = False) -> float:
    return gate.product(x, weight, gate.UNIT[x.dtype], scaled_late=scaled_late).worst(y)


def case(dtype: torch.dtype, M: int = 5, N: int = 96, K: int = 128) -> tuple[Weights, Tensor]:
    weights = Weights.random(N, K, torch.device("cpu"), sets=2)
    return weights, torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_product_passes_and_one_wrong_element_does_not(dtype: torch.dtype) -> None:
    weights, x = case(dtype)
    truth = weights.rounded(dtype)
    y = (x.double() @ truth.T).to(dtype)
    assert 0 < worst(y, x, truth) <= 1
    y[-1, -1] += 4 * gate.UNIT[dtype] * y[-1, -1].abs() + 0.01
    assert worst(y, x, truth) > 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    weights, x = case(torch.float32)
    y = x @ weights.decoded(torch.float32).T
    y[0, 0] = wrong
    assert worst(y, x, weights.exact) == float("inf")


def test_a_wrong_shape_is_refused() -> None:
    weights, x = case(torch.float32)
    assert worst(x @ weights.decoded(torch.float32)[:-1].T, x, weights.exact) == float("inf")


def test_every_row_is_looked_at() -> None:
    weights, x = case(torch.float32)
    y = x @ weights.decoded(torch.float32).T
    assert worst(y, x, weights.exact) <= 1
    for row in range(len(y)):
        spoilt = y.clone()
        spoilt[row, 3] += 0.1
        assert worst(spoilt, x, weights.exact) > 1


def test_one_code_off_by_one_is_seen() -> None:
    weights, x = case(torch.float32)
    spoilt = weights.layer(1)
    spoilt.packed.data = spoilt.packed.clone()
    spoilt.packed.data.view(-1)[0] ^= 1 << 4
    assert worst(weights.layer(0)(x), x, weights.exact) <= 1
    assert worst(spoilt(x), x, weights.exact) > 1


def test_a_late_scale_has_more_room_but_not_any() -> None:
    """Unscaled codes in bf16: outside the strict bound, inside its own; a wrong scale is outside both."""
    weights, x = case(torch.bfloat16, M=32)
    scales = weights.copies[0].scales.view(-1).repeat_interleave(64).view(weights.N, weights.K)
    codes = (weights.decoded(torch.float32) / scales).bfloat16()
    y = (x.double() @ (codes.double() * scales).T).bfloat16()
    assert worst(y, x, weights.exact, scaled_late=True) <= 1
    assert worst(1.1 * y, x, weights.exact, scaled_late=True) > 1


def lora_case(dtype: torch.dtype, mask: Tensor | None) -> tuple[gate.LoRATruth, dict[str, Tensor]]:
    """The truth, and what plain PyTorch gives, every step rounded to `dtype`."""
    weights, x = case(dtype)
    generator = torch.Generator().manual_seed(2)
    A, B, g = (torch.randn(*size, generator=generator).to(dtype) for size in ((8, 128), (96, 8), (5, 96)))
    truth = gate.LoRATruth(x, g, weights.rounded(dtype), A, B, 2.0, mask)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    x, A, B = leaves
    dropped = x if mask is None else x * mask.to(dtype)
    y = x @ weights.decoded(dtype).T + 2.0 * ((dropped @ A.T) @ B.T)
    dx, dA, dB = torch.autograd.grad(y, leaves, g)
    return truth, {"y": y, "dx": dx, "dA": dA, "dB": dB}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_lora_passes_and_each_output_is_looked_at(dtype: torch.dtype, masked: bool) -> None:
    mask = torch.rand(5, 128, generator=torch.Generator().manual_seed(3)).lt(0.75) / 0.75 if masked else None
    truth, given = lora_case(dtype, mask)
    assert truth.worst(given) <= 1
    for name, value in given.items():
        assert truth.worst(given | {name: 1.25 * value}) > 1, name


def test_a_forgotten_mask_is_seen() -> None:
    mask = torch.rand(5, 128, generator=torch.Generator().manual_seed(3)).lt(0.75) / 0.75
    truth, given = lora_case(torch.float32, mask)
    unmasked = gate.LoRATruth(truth.x, truth.grad, truth.weight, truth.A, truth.B, truth.scale)
    assert unmasked.worst(given) > 1


def test_equal_means_to_the_bit() -> None:
    one = torch.ones(3)
    assert gate.equal([one], [one.clone()]) == 0
    assert gate.equal([one], [one + 2**-23]) == float("inf")
    assert gate.equal([one], [one.double()]) == float("inf")
