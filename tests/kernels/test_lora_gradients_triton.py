"""LoRA's two products with a wide gradient, in one pass: against float64, in parts of rows and of columns."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.kernels import lora_paths
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.linear4bit import lora_linears4bit
from fourbit.kernels.lora_paths import LARGEST_RANK
from fourbit.kernels.quantize4bit import quantize

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _largest() -> None:
    from fourbit.kernels.lora_gradients_triton import narrow

    for rank in (16, 32, LARGEST_RANK):
        shapes = (8192, 28672), (28672, rank), (8192, rank), (8192, rank)
        narrow(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes), 0.5, 1.0)


SCENARIOS = {"largest": _largest}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 1, 1), (33, 513, 3), (513, 70, 16), (1100, 40, 17), (40, 600, 64)]
)
def test_against_float64(rows: int, columns: int, rank: int, dtype: torch.dtype, poisoned: Any) -> None:
    """The gradient of s, columns of a wider one, rounded once; that of B in fp32; what lies beside is left alone."""
    from fourbit.kernels.lora_gradients_triton import narrow

    wide, B = drawn(rows, columns + 3).to(dtype), drawn(columns, rank).to(dtype)
    g, s = wide[:, 2:-1], drawn(rows, rank + 5).to(dtype)
    with poisoned():
        grad_s = torch.full((rows, rank + 4), 7.0, dtype=dtype, device=DEVICE)
        of_B, again = (narrow(g, B, s[:, 1 : rank + 1], grad_s[:, 4:], 0.5, -2.0) for _ in range(2))
    assert torch.equal(of_B, again) and of_B.dtype == torch.float32 and (grad_s[:, :4] == 7).all()
    wide_g, wide_s, wide_B = g.double(), s[:, 1 : rank + 1].double(), B.double()
    unit = torch.finfo(dtype).eps / 2
    for got, a, b, factor, rounded, terms in (
        (grad_s[:, 4:], wide_g, wide_B, 0.5, unit, columns),
        (of_B, wide_g.T, wide_s, -2.0, 0.0, rows),
    ):
        exact, size = factor * (a @ b), abs(factor) * (a.abs() @ b.abs())
        bound = rounded * exact.abs() + (terms + 8) * 2.0**-24 * size + torch.finfo(dtype).tiny
        assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 2.0)])
def test_linears_of_one_input(scales: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits up to LARGEST_RANK the kernel gives all gradients of plain products; past that it is not asked."""
    from fourbit.kernels import lora_gradients_triton as kernels

    asked, narrow = list[int](), kernels.narrow
    monkeypatch.setattr(kernels, "narrow", lambda g, B, *rest: asked.append(B.shape[1]) or narrow(g, B, *rest))
    monkeypatch.setattr(lora_paths.dispatch, "product_dtype", lambda x: x.dtype)  # as on CUDA
    for ranks, dtype in (((3, 5), torch.bfloat16), ((3, 65), torch.bfloat16), ((3, 5), torch.float32)):
        x, outs, found = drawn(40, 64).to(dtype), (24, 40), []
        weights = [quantize(drawn(out, 64, seed=out)) for out in outs]
        As = [drawn(rank, 64) for rank in ranks]
        Bs = [drawn(out, rank) for out, rank in zip(outs, ranks, strict=True)]
        gs = [drawn(40, out, seed=1).to(dtype) for out in outs]
        for path in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x, *As, *Bs)]
            with force_path(path):
                ys = lora_linears4bit(leaves[0], weights, [None, None], leaves[1:3], leaves[3:], scales)
                found.append(torch.autograd.grad(ys, leaves, gs))
        for a, b in zip(*found, strict=True):
            size = b.double().abs() + b.double().abs().mean()
            assert ((a.double() - b.double()).abs() <= 8 * max(torch.finfo(dtype).eps, 2.0**-20) * size).all()
    assert asked == [3, 5]


def test_nothing_to_read() -> None:
    """No rows, or a linear without outputs."""
    group = lora_paths.Group([], A=[drawn(2, 8)], B=[drawn(0, 2)], scales=[1.0])
    with force_path("triton"):
        for rows, out in ((0, 4), (3, 0)):
            g, B, s = (torch.zeros(shape, device=DEVICE).bfloat16() for shape in ((rows, out), (out, 2), (rows, 2)))
            grad_s, (of_B,) = lora_paths._narrow([g], [B], s, group)
            assert grad_s.shape == s.shape and of_B.shape == B.shape and not grad_s.any() and not of_B.any()


def test_no_kernel_spills(aot: ModuleType, costs: list[Any]) -> None:
    assert {cost.kernel for cost in costs} == {"lora_narrow_kernel", "lora_sums_kernel"}
    aot.assert_no_spills(costs)
