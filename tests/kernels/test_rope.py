"""Rotary embedding: against its definition, against complex numbers, and its frequencies against hand-worked ones."""

import math

import pytest
import torch

from fourbit.kernels.rope import frequencies, llama3_frequencies, rope, rope_reference, tables, yarn_frequencies


def sample(
    batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, heads, size, generator=generator, dtype=torch.float64).to(dtype)
    position = torch.randint(0, 9999, (batch, tokens), generator=generator)
    return x, *(t.to(dtype) for t in tables(position, frequencies(size, 10000.0, dtype=torch.float64)))


SHAPES = [(1, 1, 1, 2), (2, 5, 3, 8), (1, 63, 2, 10)]


@pytest.mark.parametrize("shape", SHAPES)
def test_turns_pairs_as_complex_numbers(shape: tuple[int, int, int, int]) -> None:
    x, cos, sin = sample(*shape)
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rope(x, cos, sin), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(rope_reference(x, cos, sin), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_in_float64(shape: tuple[int, int, int, int]) -> None:
    x, cos, sin = sample(*shape)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_input_and_gradient(dtype: torch.dtype) -> None:
    x, cos, sin = sample(2, 5, 3, 8, dtype)
    base = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # as a [B, H, T, D] tensor seen [B, T, H, D]
    plain = x.clone().requires_grad_()
    upstream = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    ours = torch.autograd.grad(rope(base, cos, sin), base, upstream)[0]
    theirs = torch.autograd.grad(rope_reference(plain, cos, sin), plain, upstream.contiguous())[0]
    # two products and a sum of numbers below 5: three roundings each way
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_frequencies() -> None:
    expected = [1.0, 10000 ** (-2 / 8), 10000 ** (-4 / 8), 10000 ** (-6 / 8)]
    torch.testing.assert_close(
        frequencies(8, 10000.0, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    )


def test_llama3_frequencies_by_hand() -> None:
    """A context of 400: wavelengths up to 400 / 4 are kept, from 400 / 1 on slowed, blended between."""
    wavelength = torch.tensor([10.0, 100.0, 200.0, 400.0, 1000.0], dtype=torch.float64)
    got = llama3_frequencies(2 * math.pi / wavelength, factor=8.0, low=1.0, high=4.0, original_length=400)
    blend = (400 / 200 - 1) / (4 - 1)  # a third of the way from slowed to kept
    slowing = torch.tensor([1, 1, blend + (1 - blend) / 8, 1 / 8, 1 / 8], dtype=torch.float64)
    torch.testing.assert_close(got, slowing * 2 * math.pi / wavelength, rtol=1e-14, atol=0)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_frequencies_by_hand(truncate: bool) -> None:
    """Pairs of over 4 turns in 1,000 positions are kept, of under 1 slowed by 8; those between are blended by place."""
    frequency = frequencies(12, 1000.0, dtype=torch.float64)
    got = yarn_frequencies(frequency, 1000.0, 8.0, 4.0, 1.0, 1000, truncate=truncate)
    low, high = (12 * math.log(1000 / (2 * math.pi * turns)) / (2 * math.log(1000)) for turns in (4, 1))
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    slowed = torch.tensor([min(max((place - low) / (high - low), 0), 1) for place in range(6)], dtype=torch.float64)
    torch.testing.assert_close(got, frequency * (slowed / 8 + 1 - slowed), rtol=1e-14, atol=0)
    kept, slow = (slowed == 0).sum(), (slowed == 1).sum()
    assert kept >= 3 and slow >= 1 and torch.equal(got[:kept], frequency[:kept])


def test_tables_hold_the_angle_of_each_position() -> None:
    cos, sin = tables(torch.tensor([[0, 3], [5, 1]]), torch.tensor([1.0, 0.5]))
    assert cos.shape == sin.shape == (2, 2, 1, 2)
    assert cos[1, 0, 0, 1].item() == pytest.approx(math.cos(2.5)) and sin[0, 1, 0, 0].item() == pytest.approx(
        math.sin(3)
    )


def test_tables_of_another_size_are_refused() -> None:
    x, cos, sin = sample(1, 2, 1, 4)
    with pytest.raises(ValueError, match="rope needs tables"):
        rope(x, cos[..., :1], sin[..., :1])
