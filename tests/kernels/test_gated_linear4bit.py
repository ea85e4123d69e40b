"""A 4-bit linear with LoRA whose input is a gated product: made again in backward, where A's gradient asks for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.kernels import lora_paths, swiglu
from fourbit.kernels.dequantize4bit import dequantize
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.linear4bit import lora_linears4bit
from fourbit.kernels.quantize4bit import quantize
from fourbit.kernels.swiglu import gated_reference
from fourbit.kernels.weight4bit import Weight4bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dgate", "dup", "dA", "dB", "dbias")


def drawn(rows: int, columns: int, out: int, rank: int, dtype: torch.dtype) -> tuple[list[Tensor], Weight4bit, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)
    weight = quantize(draw(out, columns) * columns**-0.5)
    halves = [draw(rows, columns).to(dtype), draw(rows, columns).to(dtype)]
    return [*halves, draw(rank, columns) * 0.2, draw(out, rank), draw(out)], weight, draw(rows, out).to(dtype)


def run(path: str, inputs: list[Tensor], weight: Weight4bit, g: Tensor, gelu: bool, **more: Any) -> list[Tensor]:
    gate, up, A, B, bias = leaves = [x.clone().requires_grad_() for x in inputs]
    with force_path(path):
        (y,) = lora_linears4bit(gate, [weight], [bias], [A], [B], [0.5], up=up, gelu=gelu, **more)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 64, 1), (33, 192, 3), (70, 64, 16), (40, 320, 17)])
def test_against_float64(
    rows: int, columns: int, rank: int, gelu: bool, dtype: torch.dtype,
    poisoned: Callable[[], AbstractContextManager[object]],
) -> None:  # fmt: skip
    """Outputs and every gradient on each path, within the roundings of s, of h and its gradient, and of what leaves."""
    inputs, weight, g = drawn(rows, columns, 24, rank, dtype)
    gate, up, A, B, bias = exact = [x.double().requires_grad_() for x in inputs]
    W, h = dequantize(weight).double(), gated_reference(gate, up, gelu)
    z = h @ W.T + bias + 0.5 * (h @ A.T) @ B.T
    want = [z.detach(), *torch.autograd.grad(z, exact, g.double())]
    unit = max(torch.finfo(dtype).eps, 2.0**-23)
    for path in ("reference", "cpu", "triton"):
        with poisoned():
            got = run(path, inputs, weight, g, gelu)
        for name, found, true in zip(NAMES, got, want, strict=True):
            off, size = (found.double() - true).abs(), true.abs().mean() + true.abs()
            assert (off <= 6 * unit * max(columns, rows, 24) ** 0.5 * size).all(), (path, name, float(off.max()))


def test_splits_of_rows_are_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of four multiprocessors: the sum for A in parts, the same bits twice, and near those of one part."""
    from fourbit.kernels import swiglu_triton

    inputs, weight, g = drawn(500, 192, 24, 5, torch.bfloat16)
    whole = run("triton", inputs, weight, g, False)
    monkeypatch.setattr(swiglu_triton, "processors", lambda device: 4)
    parts, again = (run("triton", inputs, weight, g, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[3], whole[3])
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize(("rank", "dropout"), [(4, 0.3), (130, 0.0)])
def test_what_one_pass_cannot_do_is_done_in_two(path: str, rank: int, dropout: float) -> None:
    """Dropout's mask, ranks that no program holds: the same as with the product made before."""
    inputs, weight, g = drawn(20, 64, 24, rank, torch.float32)
    more = {"dropout": dropout, "seed": torch.tensor(7, device=DEVICE)}
    got = run(path, inputs, weight, g, False, **more)
    gate, up, A, B, bias = leaves = [x.clone().requires_grad_() for x in inputs]
    with force_path(path):
        (y,) = lora_linears4bit(swiglu.swiglu(gate, up), [weight], [bias], [A], [B], [0.5], **more)
        want = [y.detach(), *torch.autograd.grad(y, leaves, g)]
    for a, b, name in zip(got, want, NAMES, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gate_and_up_are_kept_and_their_product_is_not() -> None:
    (gate, up, A, B, bias), weight, _ = drawn(20, 64, 24, 4, torch.float32)
    leaves, kept = [x.requires_grad_() for x in (gate, up, A, B, bias)], list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lora_linears4bit(gate, [weight], [bias], [A], [B], [0.5], up=up)
    wide = [x for x in kept if x.shape == gate.shape]
    assert len(wide) == 2 and {x.data_ptr() for x in wide} == {gate.data_ptr(), up.data_ptr()} and len(leaves) == 5


def test_second_derivatives_and_transforms() -> None:
    inputs, weight, g = drawn(3, 64, 8, 2, torch.float32)

    def value(fused: bool, gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x, more = (gate, {"up": up}) if fused else (swiglu.swiglu_reference(gate, up), {})
        (y,) = lora_linears4bit(x, [weight], [None], [A], [B], [0.5], **more)
        return (y * g).sum()

    for order in ("second", "func"):
        both = []
        for fused in (True, False):
            leaves = [x.clone().requires_grad_() for x in inputs[:4]]
            if order == "func":
                both.append(torch.func.grad(lambda *x, f=fused: value(f, *x), argnums=(0, 1, 2, 3))(*leaves))
                continue
            first = torch.autograd.grad(value(fused, *leaves), leaves, create_graph=True)
            both.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [0, 1])
def test_second_derivatives_where_one_half_needs_none(trained: int) -> None:
    inputs, weight, _ = drawn(3, 64, 8, 2, torch.float32)
    halves, leaf, both = inputs[:2], inputs[trained].requires_grad_(), []
    inputs[2].requires_grad_()
    for x, more in ((halves[0], {"up": halves[1]}), (swiglu.swiglu_reference(*halves), {})):
        (y,) = lora_linears4bit(x, [weight], [None], [inputs[2]], [inputs[3]], [0.5], **more)
        (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        both.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_up_that_does_not_fit_is_refused() -> None:
    """A kernel would read beside it; torch would stretch it."""
    (gate, up, A, B, _), weight, _ = drawn(3, 64, 8, 2, torch.float32)
    with pytest.raises(ValueError, match=r"needs one weight, and x and up alike, got 1 .*\(1, 64\) torch.float32"):
        lora_linears4bit(gate, [weight], [None], [A], [B], [0.5], up=up[:1])
    with pytest.raises(ValueError, match=r"got 1 weights, .*\(3, 64\) torch.float64"):
        lora_linears4bit(gate, [weight], [None], [A], [B], [0.5], up=up.double())
    with pytest.raises(ValueError, match="got 2 weights"):
        lora_linears4bit(gate, [weight] * 2, [None] * 2, [A] * 2, [B] * 2, [0.5] * 2, up=up)


@pytest.mark.parametrize(
    ("rank", "dtype"), [(4, torch.bfloat16), (64, torch.float16), (65, torch.float16), (4, torch.float32)]
)
def test_backward_makes_no_product_of_its_own(monkeypatch: pytest.MonkeyPatch, rank: int, dtype: torch.dtype) -> None:
    """On a GPU: neither is h made again by itself, nor LoRA's share of its gradient, where a program has room for it.

    In fp32 its sums spill, and its tiles exceed the shared memory of sm_89 and sm_120; so do ranks above 64."""
    one_pass = rank <= 64 and dtype != torch.float32
    inputs, weight, g = drawn(8, 64, 24, rank, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    with force_path("triton"):
        (y,) = lora_linears4bit(leaves[0], [weight], [leaves[4]], [leaves[2]], [leaves[3]], [0.5], up=leaves[1])
        for name in ("gated", "backward"):
            monkeypatch.setattr(lora_paths, name, None)
        with nullcontext() if one_pass else pytest.raises(TypeError):
            y.backward(g)
    assert all((x.grad is not None) == one_pass for x in leaves)
