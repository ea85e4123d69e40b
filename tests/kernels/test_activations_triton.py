"""RMSNorm, SwiGLU and rotary positions as Triton kernels: values and gradients against the definitions in float64."""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels.dispatch import force_path
from fourbit.kernels.lora_paths import LARGEST_RANK
from fourbit.kernels.rms_norm import LARGEST, rms_norm, rms_norm_reference
from fourbit.kernels.rope import rope, rope_reference
from fourbit.kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
shapes = st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 63, 64, 65, 257]))


def sample(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _largest() -> None:
    """Forward and backward of all three at the largest sizes that they take; gates take any, here a 70B layer's, and
    swiglu's backward also with LoRA after it."""
    from fourbit.kernels import swiglu_triton

    rms_norm(meta(1, 512, LARGEST), torch.empty(LARGEST, device="meta"), 1e-5).sum().backward()
    for op in (swiglu, geglu):
        op(meta(512, 28672), meta(512, 28672)).sum().backward()
    lora = meta(512, LARGEST_RANK).detach(), meta(LARGEST_RANK, 28672).detach()
    swiglu_triton.backward(*(meta(512, 28672).detach() for _ in range(3)), False, lora)
    rope(meta(1, 512, 128, 128), meta(1, 512, 1, 64).detach(), meta(1, 512, 1, 64).detach()).sum().backward()


SCENARIOS = {"largest": _largest}


def assert_close(got: Tensor, exact: Tensor, size: Tensor, roundings: float, what: str) -> None:
    """One rounding to got's dtype, and `roundings` of fp32 relative to `size`, the sum of magnitudes behind it."""
    unit = torch.finfo(got.dtype).eps / 2
    bound = unit * exact.abs() + roundings * 2.0**-24 * size + torch.finfo(got.dtype).tiny
    excess = (got.double() - exact).abs() - bound
    assert not got.numel() or float(excess.max()) <= 0, f"{what}: off by {float(excess.max())} beyond the bound"


def both(op, reference, tensors: list[Tensor], dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:  # type: ignore[no-untyped-def]
    """Output and gradients of the kernels, and of the definition in float64 on the same rounded inputs."""
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    with force_path("triton"):
        y = op(*ours)
        gradients = torch.autograd.grad(y, ours, dy)
    z = reference(*exact)
    return [y.detach(), *gradients], [z.detach(), *torch.autograd.grad(z, exact, dy.double())]


@settings(max_examples=40)
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    x, dy, weight = (sample(*s, dtype=dtype, seed=seed + i) for i, s in enumerate([shape, shape, shape[1:]]))
    got, exact = both(
        lambda x: rms_norm(x, weight, 1e-5), lambda x: rms_norm_reference(x, weight.double(), 1e-5), [x], dy
    )
    columns = shape[1]
    assert_close(got[0], exact[0], exact[0].abs(), 8 + columns / 2, "y")
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    dz = (dy.double() * weight.double()).abs()
    size = scale * (dz + x.double().abs() * scale.square() * (dz * x.double().abs()).mean(-1, keepdim=True))
    assert_close(got[1], exact[1], size, 16 + 3 * columns, "dx")


@settings(max_examples=40)
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_geglu(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    gate, up, dy = (sample(*shape, dtype=dtype, seed=seed + i) for i in range(3))
    got, exact = both(geglu, geglu_reference, [gate, up], dy)
    g = gate.double().abs()
    roundings = 24 + 8 * (g + g**3)  # its exponent, 1.6 (g + 0.045 g^3), is rounded before the power
    for a, b, s, what in zip(
        got, exact, (g * up.abs(), (1 + g**3) * (dy * up).abs(), g * dy.abs()), "ygu", strict=True
    ):
        assert_close(a, b, roundings * s.double(), 1.01, what)


@settings(max_examples=40)
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    gate, up, dy = (sample(*shape, dtype=dtype, seed=seed + i) for i in range(3))
    gate = gate * 8
    got, exact = both(swiglu, swiglu_reference, [gate, up], dy)
    roundings = 16 + 2 * gate.double().abs()  # exp(-g) from 2^x: g / ln 2 is rounded before the power
    size = gate.double().abs() * up.double().abs()
    sizes = size, (dy * up).double().abs() * (1 + gate.double().abs()), (dy * gate).double().abs()
    for a, b, s, what in zip(got, exact, sizes, ("y", "dgate", "dup"), strict=True):
        assert_close(a, b, roundings * s, 1.01, what)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 2), st.integers(0, 4), st.integers(1, 5), st.sampled_from([2, 6, 64])),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_rope(shape: tuple[int, ...], shared: bool, dtype: torch.dtype, seed: int) -> None:
    """Tables for each row of the batch, or one set for all of them."""
    x, dy = (sample(*shape, dtype=dtype, seed=seed + i) for i in range(2))
    angle = sample(1 if shared else shape[0], shape[1], 1, shape[3] // 2, dtype=torch.float32, seed=seed)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got, exact = both(lambda x: rope(x, cos, sin), lambda x: rope_reference(x, cos.double(), sin.double()), [x], dy)
    for value, want, of, what in zip(got, exact, (x, dy), ("y", "dx"), strict=True):
        a, b = of.double().abs().chunk(2, dim=-1)
        size = (
            torch.cat((a, b), -1) * torch.cat((cos, cos), -1).abs()
            + torch.cat((b, a), -1) * torch.cat((sin, sin), -1).abs()
        )
        assert_close(value, want, size, 3, what)


def test_strided_inputs() -> None:
    """A transposed x, a gradient of another layout: the same as contiguous copies."""
    x, dy = (sample(6, 4, dtype=torch.float32, seed=i).T for i in range(2))
    weight = torch.ones(6, device=DEVICE)
    for op in (lambda t: rms_norm(t, weight, 1e-5), lambda t: swiglu(t, t)):
        results = []
        for a, upstream in ((x, dy), (x.contiguous(), dy.contiguous())):
            a = a.detach().requires_grad_()
            with force_path("triton"):
                y = op(a)
                y.backward(upstream)
            results.append((y.detach(), a.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float64_takes_the_plain_form() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    with force_path("triton"):
        torch.testing.assert_close(rms_norm(x, x[0], 1e-5), rms_norm_reference(x, x[0], 1e-5))
        torch.testing.assert_close(swiglu(x, x), swiglu_reference(x, x))


def test_rows_beyond_one_program_take_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no block for a million columns, and no GPU registers for a tenth of them."""
    from fourbit.kernels import rms_norm_triton

    x, weight = torch.randn(1, LARGEST + 1, device=DEVICE, requires_grad=True), torch.ones(LARGEST + 1, device=DEVICE)
    for way in ("forward", "backward"):
        monkeypatch.setattr(rms_norm_triton, f"rms_norm_{way}_kernel", None)
    with force_path("triton"):
        y = rms_norm(x, weight, 1e-5)
        (got,) = torch.autograd.grad(y, x, weight[None])
    (want,) = torch.autograd.grad(rms_norm_reference(x, weight, 1e-5), x, weight[None])
    torch.testing.assert_close(y, rms_norm_reference(x, weight, 1e-5))
    torch.testing.assert_close(got, want)
    with force_path("triton"), pytest.raises(TypeError):  # there is no kernel here: one column less would take it
        rms_norm(x[:, :-1], weight[:-1], 1e-5)


def test_a_weight_that_trains_gets_its_gradient() -> None:
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(8, device=DEVICE, requires_grad=True)
    with force_path("triton"):
        got = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), weight)[0]
    want = torch.autograd.grad(rms_norm_reference(x, weight, 1e-5).square().sum(), weight)[0]
    torch.testing.assert_close(got, want)


def test_no_kernel_spills(aot: ModuleType, costs: list[Any]) -> None:
    both_ways = {f"{op}_{way}_kernel" for op in ("rms_norm", "swiglu") for way in ("forward", "backward")}
    assert {cost.kernel for cost in costs} == both_ways | {"rope_kernel"}
    aot.assert_no_spills(costs)
