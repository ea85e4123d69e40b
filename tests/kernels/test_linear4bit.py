"""The 4-bit linear against the dense product: values, gradients, what it saves and what it never makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit.kernels import border, dispatch, lora_paths
from fourbit.kernels import linear4bit as module
from fourbit.kernels.dispatch import force_path, product_dtype
from fourbit.kernels.weight4bit import flatten
from fourbit.nf4 import Weight4bit, dequantize, linear4bit, quantize

# Where there is a GPU kernels are compiled for it, and take no tensors of the CPU.
PATHS = [path for path in dispatch.PATHS if path != "triton" or not torch.cuda.is_available()]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Weight:
    """A random quantised weight and what it decodes to."""

    def __init__(self, rows: int, columns: int, *, nested: bool = False, seed: int = 0, **quantisation: Any):
        generator = torch.Generator().manual_seed(seed)
        self.shape = (rows, columns)
        self.stored = quantize(torch.randn(rows, columns, generator=generator), double_quant=nested, **quantisation)
        self.dense = dequantize(self.stored)

    def to(self, device: str) -> "Weight":
        self.stored, self.dense = self.stored.to(device), self.dense.to(device)
        return self

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear4bit(x, self.stored, bias)


def assert_product(got: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None, unit: float = 0.0) -> None:
    """got = a @ b (+ start) within the rounding of one fp32 (fp64) accumulation and one rounding of the result.

    `unit`: what the kernel for few rows may be off in each code value of b, and the reference in each of its values.
    """
    a, b = a.double(), b.double()
    exact, size, terms = a @ b, a.abs() @ b.abs(), a.shape[-1]
    if start is not None:
        exact, size, terms = exact + start.double(), size + start.double().abs(), terms + 1
    accumulate = UNIT[torch.float64 if got.dtype == torch.float64 else torch.float32]
    tiny = 2.0**-24 * (got.dtype == torch.float16)
    bound = (2 * terms * accumulate + 2.01 * unit) * size + UNIT[got.dtype] * exact.abs() + tiny
    excess = (got.double() - exact).abs() - bound
    assert not got.numel() or float(excess.max()) <= 0, f"off by {float(excess.max())} beyond the bound"


def check_against_dense(weight: Weight, x: Tensor, bias: Tensor | None, grad: Tensor) -> None:
    x = x.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    y = weight(x, bias)
    assert y.dtype == x.dtype and y.shape == x.shape[:-1] + weight.shape[:1]
    y.backward(grad)
    dense = weight.dense
    if dispatch.product_dtype(x) == torch.bfloat16:
        dense = dense.bfloat16()
    assert_product(y.detach(), x.detach(), dense.T, None if bias is None else bias.detach())
    assert_product(x.grad, grad, dense)
    if bias is not None:
        ones = torch.ones(1, grad[..., 0].numel())
        assert_product(bias.grad.unsqueeze(0), ones, grad.reshape(-1, weight.shape[0]))


@given(
    st.integers(0, 9),
    st.integers(1, 200),
    st.integers(1, 130),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([32, 64, 256]),
    st.integers(0, 2**31),
)
@settings(max_examples=500)
def test_values_and_gradients_equal_the_dense_product(
    n: int, columns: int, rows: int, dtype: torch.dtype, nested: bool, quant_type: str, blocksize: int, seed: int
) -> None:
    weight = Weight(rows, columns, nested=nested, seed=seed, quant_type=quant_type, blocksize=blocksize)
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(n, size, generator=generator).to(dtype) for size in (columns, rows))
    bias = torch.randn(rows, generator=generator).to(dtype) if seed % 2 else None
    check_against_dense(weight, x, bias, grad)


@pytest.mark.parametrize("multiplies_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_either_kind_of_cpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiplies_bf16: bool
) -> None:
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: multiplies_bf16)
    x = torch.randn(17, 96).to(dtype)
    native = multiplies_bf16 and dtype == torch.bfloat16
    assert product_dtype(x) == (torch.bfloat16 if native else torch.float32)
    check_against_dense(Weight(50, 96), x, torch.randn(50).to(dtype), torch.randn(17, 50).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [32, 4096])
@pytest.mark.parametrize("columns", [64, 96, 33])
def test_slabs_equal_the_dense_product(
    monkeypatch: pytest.MonkeyPatch, columns: int, blocksize: int, dtype: torch.dtype
) -> None:
    """Rows that do and do not end with a block, several slabs and a short last one."""
    monkeypatch.setattr(lora_paths, "WHOLE", 1)
    monkeypatch.setattr(lora_paths, "SLAB", 1000)
    weight = Weight(133, columns, nested=True, blocksize=blocksize)
    slabs = list(lora_paths.slabs(weight.stored, dtype))
    assert len(slabs) > 1 or (columns, blocksize) == (33, 4096)  # where a row ends with a block only after 4096 rows
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 3, size, generator=generator).to(dtype) for size in (columns, 133))
    check_against_dense(weight, x, torch.randn(133, generator=generator).to(dtype), grad)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gradcheck_in_float64(nested: bool, quant_type: str) -> None:
    weight = Weight(7, 30, nested=nested, quant_type=quant_type)
    x = torch.randn(2, 3, 30, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight, (x, bias))


@pytest.mark.parametrize("slabs", [False, True])
def test_paths_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch, slabs: bool) -> None:
    if slabs:
        monkeypatch.setattr(lora_paths, "WHOLE", 1)
        monkeypatch.setattr(lora_paths, "SLAB", 1000)
    weight = Weight(60, 77, nested=True)
    results = []
    for path in PATHS:
        x = torch.randn(5, 77, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with force_path(path):
            y = weight(x)
            y.square().sum().backward()
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", [(77,), (1, 77), (0, 77), (2, 0, 77), (2, 3, 4, 77)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    weight = Weight(10, 77)
    x = torch.randn(shape, requires_grad=True)
    y = weight(x, torch.zeros(10))
    assert y.shape == (*shape[:-1], 10)
    y.sum().backward()
    assert x.grad.shape == shape
    torch.testing.assert_close(y, x @ weight.dense.T)
    torch.testing.assert_close(x.grad, weight.dense.sum(0).expand(shape))


def test_an_fp32_bias_under_bf16_x_gets_an_fp32_gradient() -> None:
    """Summed in fp32: 513 ones stop at 256 when each sum is rounded to bf16, and a last rounding to bf16 gives 512."""
    bias = torch.zeros(3, requires_grad=True)
    Weight(3, 64)(torch.zeros(513, 64, dtype=torch.bfloat16), bias).backward(torch.ones(513, 3, dtype=torch.bfloat16))
    assert bias.grad.dtype == torch.float32 and bias.grad.tolist() == [513.0] * 3


def test_layouts_of_x_and_of_its_gradient_do_not_matter() -> None:
    weight = Weight(10, 77)
    base = torch.randn(6, 77)
    strided = torch.randn(77, 12).T[::2].copy_(base)
    assert not strided.is_contiguous()
    assert torch.equal(weight(strided), weight(base))
    assert torch.equal(weight(base[:1].expand(6, 77)), weight(base[:1].repeat(6, 1)))
    for grad in (torch.randn(10, 6).T, torch.randn(1, 10).expand(6, 10)):
        x, copy = (base.clone().requires_grad_() for _ in range(2))
        weight(x).backward(grad)
        weight(copy).backward(grad.contiguous())
        assert torch.equal(x.grad, copy.grad)


def test_a_weight_of_no_rows_or_columns() -> None:
    for rows, columns in ((0, 5), (5, 0)):
        x = torch.randn(3, columns, requires_grad=True)
        y = Weight(rows, columns)(x, torch.ones(rows))
        y.sum().backward()
        assert torch.equal(y, torch.ones(3, rows)) and torch.equal(x.grad, torch.zeros(3, columns))


def test_only_packed_tensors_are_saved() -> None:
    weight = Weight(64, 128, nested=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weight(torch.randn(4, 128, requires_grad=True), torch.zeros(64))
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in weight.stored[:4]}


def test_nothing_is_decoded_for_a_gradient_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight(64, 128)
    assert weight(torch.randn(4, 128)).grad_fn is None
    bias = torch.zeros(64, requires_grad=True)
    y = weight(torch.randn(4, 128), bias)
    monkeypatch.setattr(lora_paths, "decode_into", None)  # a call would fail
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((64,), 4.0))


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside the context returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_a_large_weight_is_never_dense() -> None:
    """16 MB in fp32 (2 MB packed): forward and backward make nothing larger than a slab, about 4 MB."""
    shape = (2048, 2048)
    packed = torch.randint(0, 256, (shape[0] * shape[1] // 2, 1), dtype=torch.uint8)
    absmax = torch.ones(shape[0] * shape[1] // 64)
    x = torch.randn(2, 2048, requires_grad=True)
    dequantize(Weight4bit(packed[:32], absmax[:1], None, None, (64,)))  # tables are made once, before the count
    with LargestResult() as largest:
        linear4bit(x, Weight4bit(packed, absmax, None, None, shape)).sum().backward()
    assert largest.bytes <= 4 * lora_paths.SLAB


def test_inference_mode_and_autocast_leave_it_alone() -> None:
    weight = Weight(10, 64)
    x = torch.randn(3, 64)
    want = weight(x)
    with torch.inference_mode():
        assert torch.equal(weight(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weight(x), want)


def test_misfits_are_refused() -> None:
    weight, stored = Weight(10, 64, nested=True), Weight(10, 64, nested=True).stored
    with pytest.raises(ValueError, match=r"the weight is \(10, 64\) \(out, in\), so x must end in 64, got \(3, 65\)"):
        weight(torch.randn(3, 65))
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        linear4bit(torch.randn(3, 64, device="meta"), stored)
    with pytest.raises(ValueError, match="need 640 packed uint8 bytes, got 320"):  # the rest: Weight4bit.check
        linear4bit(torch.randn(3, 64), stored._replace(shape=(20, 64)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
def test_scales_that_want_a_gradient_are_refused_and_the_advice_works() -> None:
    stored = quantize(torch.randn(32, 64))

    def of_scales(scales: Tensor, own: bool) -> Tensor:
        weight = stored._replace(absmax=scales)
        return (linear4bit(torch.ones(3, 64), weight) if own else torch.ones(3, 64) @ dequantize(weight).T).sum()

    for gradient in (
        torch.func.grad(of_scales),
        lambda scales, own: torch.autograd.grad(of_scales(scales.clone().requires_grad_(), own), scales),
        lambda scales, own: torch.func.jvp(lambda s: of_scales(s, own), (scales,), (scales,)),
    ):
        with pytest.raises(ValueError, match=r"scales of a 4-bit weight get no gradient here: .* take dequantize"):
            gradient(stored.absmax, True)
    codes = dequantize(stored._replace(absmax=torch.ones_like(stored.absmax)))
    torch.testing.assert_close(torch.func.grad(of_scales)(stored.absmax, False), 3 * codes.sum(1, keepdim=True))


def test_force_path_names_its_paths_and_restores() -> None:
    before = dispatch.path_for(torch.ones(1))
    with force_path("reference"):
        with force_path("cpu"):
            assert dispatch.path_for(torch.ones(1)) == "cpu"
        assert dispatch.path_for(torch.ones(1)) == "reference"
    assert dispatch.path_for(torch.ones(1)) == before == "cpu"
    with pytest.raises(ValueError, match="path must be one of reference, cpu, triton, got 'fast'"), force_path("fast"):
        pass
    with pytest.raises(KeyError), force_path("reference"):
        raise KeyError
    assert dispatch.path_for(torch.ones(1)) == before


@pytest.mark.parametrize("nested", [False, True])
def test_torch_compile_sees_one_graph(nested: bool) -> None:
    """fullgraph=True raises at a break; values and gradients are those of the plain call."""
    weight = Weight(10, 64, nested=nested)
    compiled = torch.compile(weight, fullgraph=True, backend="aot_eager")
    results = []
    for run in (weight, compiled):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        bias = torch.arange(10.0).requires_grad_()
        y = run(x, bias)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, bias.grad))
    for name, plain, graph in zip(("y", "x", "bias"), *results, strict=True):
        assert torch.equal(plain, graph), name


@pytest.mark.parametrize("nested", [False, True])
def test_the_ops_are_registered_correctly(nested: bool) -> None:
    """torch's own checks: schema, fake kernels, autograd registration, tracing with dynamic shapes."""
    stored = Weight(10, 64, nested=nested).stored
    x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(10, requires_grad=True)
    tensors, *layout = flatten([stored])
    torch.library.opcheck(module._forward_op, (x, tensors, [bias], [], [], None, *layout, [], 0.0, False))
    grads = [torch.randn(2, 3, 10)]
    torch.library.opcheck(module._backward_op, (grads, None, None, [], tensors, [], [], None, *layout, [], 0.0, True))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("shape", [(3, 192), (1, 1, 64), (0, 128), (2, 3, 5, 64)])
def test_both_ways_of_the_triton_path(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], few: bool, dtype: torch.dtype
) -> None:
    """On either side of the border the linear is the product with the rounded weight, and its gradients too."""
    pytest.importorskip("triton")
    monkeypatch.setattr(border, "SAFE", 64 if few else 0)
    monkeypatch.setattr(border, "BORDER", {})
    taken: list[bool] = []
    original = lora_paths.few_rows
    monkeypatch.setattr(lora_paths, "few_rows", lambda *a: taken.append(original(*a)) or taken[-1])
    weight = Weight(33, shape[-1], nested=True).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(33, generator=generator).to(DEVICE, dtype).requires_grad_()
    grad = torch.randn(*shape[:-1], 33, generator=generator).to(DEVICE, dtype)
    with force_path("triton"):
        y = weight(x, bias)
        y.backward(grad)
    assert taken == [few and x.numel() > 0]
    decoded = weight.dense.to(dispatch.product_dtype(x))  # a CPU may multiply in fp32 instead
    assert_product(y.detach(), x.detach(), decoded.T, bias.detach(), UNIT[dtype] if taken[0] else 0.0)
    assert_product(x.grad, grad, decoded)
    assert_product(bias.grad.unsqueeze(0), torch.ones(1, grad[..., 0].numel(), device=DEVICE), grad.reshape(-1, 33))
