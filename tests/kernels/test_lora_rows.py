"""LoRA of several adapters on rows of their own, against one product a row."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fourbit.kernels.lora_rows import Part, lora_rows

M, IN, OUT = 7, 5, 4
PLACES = [slice(1, 3), torch.tensor([0, 5]), slice(6, 7)]  # rows 3 and 4 have none


def drawn(*between: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Part]]:
    generator = torch.Generator().manual_seed(0)

    def of(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    parts = [
        (p, of(r, IN, dtype=wide), of(OUT, r, dtype=wide), 0.5 * r) for p, r in zip(PLACES, (1, 3, 2), strict=True)
    ]
    return of(M, *between, OUT), of(M, *between, IN), parts


def reference(y: Tensor, x: Tensor, parts: list[Part]) -> Tensor:
    """Row by row, in float64."""
    rows = list(y.double().unbind())
    for place, A, B, scale in parts:
        for i in range(M)[place] if isinstance(place, slice) else place.tolist():
            rows[i] = rows[i] + scale * (x[i].double() @ A.double().T) @ B.double().T
    return torch.stack(rows)


@pytest.mark.parametrize("between", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_row_has_its_own(between: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and every gradient; y and x are not written to, and rows without an adapter are y's bit for bit."""
    y, x, parts = drawn(*between, dtype=dtype)
    before = y.detach().clone(), x.detach().clone()
    leaves = [y, x, *(matrix for _, A, B, _ in parts for matrix in (A, B))]
    found, want = lora_rows(y, x, parts), reference(y, x, parts)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(found, leaves, g.to(dtype)), torch.autograd.grad(want, leaves, g.to(dtype).double())
    # a product of at most 8 terms of size 3, rounded in each of three steps
    close = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found.double(), want, **close)
    for one, other in zip(*grads, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **close)
    assert torch.equal(found[3:5], y[3:5]) and torch.equal(y, before[0]) and torch.equal(x, before[1])


def test_gradients_of_any_order() -> None:
    y, x, parts = drawn(2)
    factors = [matrix for _, A, B, _ in parts for matrix in (A, B)]

    def run(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        of = zip(parts, factors[::2], factors[1::2], strict=True)
        return lora_rows(y, x, [(place, A, B, scale) for (place, _, _, scale), A, B in of])

    assert gradcheck(run, (y, x, *factors)) and gradgradcheck(run, (y, x, *factors))


def test_an_input_that_wants_no_gradient_gets_none() -> None:
    y, x, parts = drawn(3)
    (grad,) = torch.autograd.grad(lora_rows(y.detach(), x.detach(), parts).sum(), parts[0][1])
    want = torch.autograd.grad(reference(y, x, parts).sum(), parts[0][1])[0]
    torch.testing.assert_close(grad, want)
