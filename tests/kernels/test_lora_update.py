"""The LoRA update against the line it stands for: values, every gradient, and what it saves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import dispatch
from fourbit.kernels.lora_paths import lora_update

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NAMES = ("y", "x", "A", "B")


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return y + scale * (x @ A.T) @ B.T


def draw(
    leading: tuple[int, ...], n_in: int, n_out: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """y, x in `dtype`, A, B: leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*leading, n_out), (*leading, n_in), (rank, n_in), (n_out, rank))
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def run(function: object, tensors: list[Tensor], scale: float, grad: Tensor) -> list[Tensor]:
    """The result and the gradients of y, x, A, B."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(leaves[0] * 1, *leaves[1:], scale)  # type: ignore[operator]
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(-4, 4),
    st.integers(0, 2**31),
)
def test_values_and_every_gradient_equal_the_plain_line(
    leading: list[int], n_in: int, n_out: int, rank: int, scale: float, seed: int
) -> None:
    tensors = draw(tuple(leading), n_in, n_out, rank, seed)
    grad = torch.randn(*leading, n_out, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for name, got, want in zip(
        ("out", *NAMES), run(lora_update, tensors, scale, grad), run(plain, tensors, scale, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@given(
    st.integers(1, 30),
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_fp32_masters_under_lower_precision(
    n: int, n_in: int, n_out: int, dtype: torch.dtype, multiplies_bf16: bool, seed: int
) -> None:
    """Within the rounding of each product's operands and sums, for CPUs that multiply bf16 and those that do not."""
    y, x, A, B = (t.detach().float() for t in draw((n,), n_in, n_out, min(8, n_in), seed))
    y, x = y.to(dtype), x.to(dtype)
    grad = torch.randn(n, n_out, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: multiplies_bf16)
        results = run(lora_update, [y, x, A, B], 1.5, grad)
    exact = run(plain, [t.double() for t in (y, x, A, B)], 1.5, grad.double())
    sizes = run(plain, [t.double().abs() for t in (y, x, A, B)], 1.5, grad.double().abs())
    for name, got, want, size, like in zip(("out", *NAMES), results, exact, sizes, (y, y, x, A, B), strict=True):
        assert got.dtype == like.dtype, name
        # Operands are rounded to the lower dtype before each of two products and the result after them: six times its
        # unit; sums over at most 80 terms in fp32: 2 * 80 of that unit, twice. Both relative to the absolute products.
        bound = (6 * UNIT[dtype] + 4 * 80 * UNIT[torch.float32]) * size + 1e-7
        assert not got.numel() or float(((got.double() - want).abs() - bound).max()) <= 0, name


def test_a_strided_y() -> None:
    y = torch.zeros(2, 4, 6).permute(0, 2, 1)  # [2, 6, 4], whose rows cannot be joined into one matrix
    _, x, A, B = (t.detach().float() for t in draw((2, 6), 5, 4, 2))
    torch.testing.assert_close(lora_update(y, x, A, B, 1.0), (x @ A.T) @ B.T)


def test_only_x_and_the_narrow_product_are_saved() -> None:
    y, x, A, B = draw((7,), 30, 40, 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_update(y.detach(), x, A, B, 1.0)
    known = {t.data_ptr() for t in (x, A, B)}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(7, 3)]


def test_gradients_nobody_needs_are_not_made() -> None:
    y, x, A, B = draw((3,), 5, 4, 2)
    out = lora_update(y.detach(), x.detach(), A, B.detach(), 1.0)
    out.sum().backward()
    assert A.grad is not None and x.grad is None and B.grad is None and y.grad is None


@pytest.mark.parametrize(
    ("y", "x", "A", "B"),
    [
        ((3, 4), (3, 5), (2, 6), (4, 2)),
        ((3, 4), (3, 5), (2, 5), (4, 3)),
        ((3, 4), (3, 5), (2, 5), (5, 2)),
        ((2, 4), (3, 5), (2, 5), (4, 2)),
        ((3, 4), (3, 5), (10,), (4, 2)),
    ],
)
def test_misfits_are_refused(y: tuple[int, ...], x: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lora_update needs y \[\.\.\., out\], x .* got y \(\d, 4\), x \(3, 5\), A"):
        lora_update(*(torch.zeros(shape) for shape in (y, x, A, B)), 1.0)
