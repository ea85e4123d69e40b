"""4-bit bases with LoRA as one op: outputs and every gradient, in every form, against the float64 definition."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import border, dispatch, lora_paths
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.dropout import keep_mask, keep_scale
from fourbit.kernels.linear4bit import lora_linears4bit
from fourbit.kernels.weight4bit import flatten
from fourbit.nf4 import Weight4bit, dequantize, quantize

matmul4bit_triton = pytest.importorskip("fourbit.kernels.matmul4bit_triton")  # where Triton is

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = ["reference"] if DEVICE == "cuda" else ["reference", "cpu"]  # the CPU's path takes no CUDA tensors
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
WAYS = ["few", "many"]


class Sample(NamedTuple):
    """Linears of one input, as the op takes them."""

    weights: list[Weight4bit]
    biases: list[Tensor | None]
    A: list[Tensor]
    B: list[Tensor]
    scales: list[float]

    def leaves(self) -> list[Tensor]:
        return [*(bias for bias in self.biases if bias is not None), *self.A, *self.B]

    def __call__(self, x: Tensor, dropout: float, seed: Tensor | None, **options: Any) -> list[Tensor]:
        return lora_linears4bit(x, *self, dropout=dropout, seed=seed, **options)


def draw(
    columns: int,
    rows: list[int],
    ranks: list[int],
    *,
    bias: bool = False,
    masters: torch.dtype = torch.float32,
    seed: int = 0,
    nested: bool = False,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, masters)
    weights = []
    for n in rows:
        weights.append(quantize(random(n, columns), quant_type, blocksize, nested))
    return Sample(
        weights,
        [random(n).requires_grad_() if bias else None for n in rows],
        [random(r, columns).requires_grad_() for r in ranks],
        [random(n, r).requires_grad_() for n, r in zip(rows, ranks, strict=True)],
        [0.5 * (i + 1) for i in range(len(rows))],
    )


def names(sample: Sample) -> list[str]:
    n = range(len(sample.A))
    biases = [f"bias {i}" for i in n if sample.biases[i] is not None]
    return [*(f"y {i}" for i in n), "x", *biases, *(f"A {i}" for i in n), *(f"B {i}" for i in n)]


def run(sample: Sample, x: Tensor, grads: list[Tensor], dropout: float, seed: Tensor | None, **options: Any) -> Any:
    """Outputs and the gradients of x, biases, A and B."""
    x = x.detach().requires_grad_()
    outputs = sample(x, dropout, seed, **options)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, [x, *sample.leaves()], grads)]


def exact(sample: Sample, x: Tensor, grads: list[Tensor], dropout: float, seed: Tensor | None) -> list[list[Tensor]]:
    """The same in float64 from the plain lines, and the same sums over absolute values."""
    factor = torch.ones(x.shape, dtype=torch.float64, device=DEVICE)
    if seed is not None:
        factor = keep_mask(x.shape, dropout, seed).double() * keep_scale(dropout)
    dense = [dequantize(weight, torch.float64) for weight in sample.weights]
    results = []
    for absolute in (False, True):
        number = (lambda t: t.detach().double().abs()) if absolute else (lambda t: t.detach().double())
        leaf = number(x).requires_grad_()
        biases, A, B = (
            [None if t is None else number(t).requires_grad_() for t in tensors]
            for tensors in (sample.biases, sample.A, sample.B)
        )
        outputs = [
            leaf @ number(W).T + (0 if b is None else b) + scale * ((leaf * factor) @ a.T) @ c.T
            for W, b, a, c, scale in zip(dense, biases, A, B, sample.scales, strict=True)
        ]
        leaves = [leaf, *(b for b in biases if b is not None), *A, *B]
        made = torch.autograd.grad(outputs, leaves, [number(g) for g in grads])
        results.append([*(y.detach() for y in outputs), *made])
    return results


def check(sample: Sample, x: Tensor, grads: list[Tensor], dropout: float, seed: Tensor | None, **options: Any) -> None:
    """Each result within its roundings of the float64 one.

    A result is a sum of products of at most four factors. Each factor, each intermediate result and each stage of a sum
    is rounded to the lower dtype at most once: for y that are W, A, scale * B, s, the first summand, the result (six);
    for x A, B, the gradient of s, W, LoRA's summand and the sum after each linear (five and one each); for A and B the
    other master, the intermediate product and the result (three). 1% more covers products of two such errors. Every
    sum runs in fp32 or better, over at most K + all N + M + all ranks terms, and may be off by twice its unit a term.
    """
    got = run(sample, x, grads, dropout, seed, **options)
    want, size = exact(sample, x, grads, dropout, seed)
    n = len(sample.A)
    terms = x.shape[1] + sum(weight.rows for weight in sample.weights) + x.shape[0] + sum(len(a) for a in sample.A)
    sums = 2 * terms * UNIT[torch.float64 if x.dtype == torch.float64 else torch.float32]
    # What fp16 rounds to a subnormal is off by up to 2^-25, times the few factors it meets.
    tiny = 2.0**-20 if x.dtype == torch.float16 else 1e-300
    for name, mine, exactly, magnitude, like in zip(
        names(sample), got, want, size, [*[x] * (n + 1), *sample.leaves()], strict=True
    ):
        roundings = {"y": 6, "x": 5 + n}.get(name[0], 3)
        assert mine.dtype == like.dtype, name
        excess = (mine.double() - exactly).abs() - (1.01 * roundings * UNIT[x.dtype] + sums) * magnitude - tiny
        assert not mine.numel() or float(excess.max()) <= 0, f"{name}: off by {float(excess.max())} beyond the bound"


def inputs(sample: Sample, M: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [sample.weights[0].columns, *(weight.rows for weight in sample.weights)]
    x, *grads = (torch.randn(M, size, generator=generator).to(DEVICE, dtype) for size in sizes)
    return x, grads


sizes = st.sampled_from([1, 2, 63, 64, 65, 130])
ranks = st.lists(st.sampled_from([1, 3, 8, 16, 17]), min_size=1, max_size=3)
formats = st.fixed_dictionaries(
    {
        "nested": st.booleans(),
        "quant_type": st.sampled_from(["nf4", "fp4"]),
        "blocksize": st.sampled_from([32, 64, 128, 256]),
    }
)


@pytest.mark.parametrize("path", PLAIN)
@settings(max_examples=60)
@given(
    *(st.integers(0, 9), sizes, st.lists(sizes, min_size=3, max_size=3), ranks, formats),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    *(st.booleans(), st.sampled_from([0.0, 0.3]), st.booleans(), st.integers(0, 2**31)),
)
def test_plain_paths(
    path: str, M: int, K: int, rows: list[int], ranks: list[int], quantisation: dict[str, Any], dtype: torch.dtype,
    bias: bool, dropout: float, keep: bool, seed: int,
) -> None:  # fmt: skip
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    sample = draw(K, rows[: len(ranks)], ranks, bias=bias, masters=masters, seed=seed, **quantisation)
    x, grads = inputs(sample, M, dtype, seed)
    with force_path(path), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fourbit.kernels.lora_paths.WHOLE", 1000)  # larger weights go in slabs
        patch.setattr("fourbit.kernels.lora_paths.SLAB", 500)
        check(sample, x, grads, dropout, torch.tensor(seed, device=DEVICE) if dropout else None, keep=keep)


@contextmanager
def way(name: str) -> Iterator[None]:
    """The kernel for few rows in small tiles, or decoding first, for any number of rows."""
    with pytest.MonkeyPatch.context() as patch, force_path("triton"):
        patch.setattr(border, "SAFE", 1 << 20 if name == "few" else 0)
        patch.setattr(border, "BORDER", {})
        for constant, value in {"COLUMNS": 32, "WARPS": 2, "COPIES": 4}.items():
            patch.setattr(matmul4bit_triton, constant, value)
        yield


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=10)  # about a second each in the interpreter
@given(
    *(sizes, sizes, st.lists(sizes, min_size=2, max_size=2), ranks.map(lambda r: r[:2]), formats),
    *(st.sampled_from([torch.bfloat16, torch.float16]), st.booleans(), st.sampled_from([0.0, 0.3])),
    *(st.booleans(), st.sampled_from([1, 3, 100]), st.integers(0, 2**31)),
)
def test_kernels(
    poisoned: Any, name: str, M: int, K: int, rows: list[int], ranks: list[int], quantisation: dict[str, Any],
    dtype: torch.dtype, bias: bool, dropout: float, keep: bool, processors: int, seed: int,
) -> None:  # fmt: skip
    K, keep = (64 * -(-K // 64), False) if name == "few" else (K, keep)
    sample = draw(K, rows[: len(ranks)], ranks, bias=bias, seed=seed, **quantisation)
    x, grads = inputs(sample, M, dtype, seed)
    with pytest.MonkeyPatch.context() as patch, way(name), poisoned() as made:
        patch.setattr(dispatch, "processors", lambda device: processors)
        check(sample, x, grads, dropout, torch.tensor(seed, device=DEVICE) if dropout else None, keep=keep)
        assert made


def test_large_ranks_take_more_than_one_program_and_step(poisoned: Any) -> None:
    sample = draw(128, [70, 20], [130, 20])
    x, grads = inputs(sample, 20, torch.bfloat16, 0)
    with way("few"), poisoned():
        check(sample, x, grads, 0.3, torch.tensor(5, device=DEVICE))


@settings(max_examples=10)
@given(
    st.dictionaries(st.sampled_from(["NVIDIA H200", "NVIDIA H100 PCIe", "sm_90"]), st.integers(0, 9)),
    st.integers(1, 8),
    st.sampled_from([64, 64, 96]),  # 96: one that the kernel does not take
)
def test_all_linears_of_a_call_take_one_way(table: dict[str, int], rows: int, columns: int) -> None:
    """Chosen once, by the rows, whatever has been measured: forward makes no dense weight at all, or every one."""
    decoded: list[int] = []
    slabs, most = lora_paths.slabs, table.get("NVIDIA H100 PCIe", table.get("sm_90", 4))
    sample = draw(columns, [8, 24], [4, 4])
    x, grads = inputs(sample, rows, torch.bfloat16, 0)
    with pytest.MonkeyPatch.context() as patch, way("few"):
        patch.setattr(lora_paths, "slabs", lambda weight, dtype: decoded.append(1) or slabs(weight, dtype))
        patch.setattr(border, "BORDER", table)
        patch.setattr(border, "SAFE", 4)
        patch.setattr(dispatch, "model", lambda device: "NVIDIA H100 PCIe")
        patch.setattr(dispatch, "architecture", lambda device: "sm_90")
        sample(x, 0.0, None)
        assert len(decoded) == (0 if columns == 64 and rows <= most else 2)
        run(sample, x, grads, 0.0, None)  # and backward takes what forward kept


@pytest.mark.parametrize("name", WAYS)
def test_kernels_repeat_to_the_bit_and_take_strided_tensors(name: str) -> None:
    sample = draw(128, [40, 24], [4, 4])
    x, grads = inputs(sample, 50, torch.bfloat16, 0)
    seed = torch.tensor(8, device=DEVICE)
    with way(name):
        first = run(sample, x, grads, 0.2, seed)
        again = run(sample, x, grads, 0.2, seed)
        wide = torch.stack([x, x], dim=1).flatten(1)[:, :128]  # rows 256 apart
        turned = [g.T.contiguous().T for g in grads]  # columns not at stride 1
        strided = run(sample, wide, turned, 0.2, seed)
    for name_, *results in zip(names(sample), first, again, strided, strict=True):
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), name_


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(path: str, dropout: float) -> None:
    sample = draw(24, [16, 9], [3, 2], bias=True, masters=torch.float64)
    x = torch.randn(2, 3, 24, dtype=torch.float64, device=DEVICE, requires_grad=True)
    seed = torch.tensor(7, device=DEVICE) if dropout else None

    def outputs(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            Sample(sample.weights, *(list(leaves[i : i + 2]) for i in (0, 2, 4)), sample.scales)(x, dropout, seed)
        )

    with force_path(path):
        assert torch.autograd.gradcheck(outputs, (x, *sample.leaves()))


@pytest.mark.parametrize(("path", "keep"), [("reference", False), ("cpu", False), ("cpu", True), ("triton", True)])
def test_fake_outputs_and_autograd_rules_are_the_real_ones(path: str, keep: bool) -> None:
    if path not in (*PLAIN, "triton"):
        pytest.skip("the CPU's path takes no CUDA tensors")
    sample = draw(24, [16, 9], [4, 3], bias=True, nested=True)
    x = torch.randn(2, 5, 24, device=DEVICE).bfloat16().requires_grad_()
    stored, *layout = flatten(sample.weights)
    numbers = (*layout, sample.scales, 0.3)
    seed = torch.tensor(3, device=DEVICE)
    with force_path(path):
        torch.library.opcheck(
            torch.ops.fourbit.linears4bit, (x, stored, sample.biases, sample.A, sample.B, seed, *numbers, keep)
        )
        with torch.no_grad():
            *outputs, s = torch.ops.fourbit.linears4bit(
                x, stored, sample.biases, sample.A, sample.B, seed, *numbers, False
            )
        grads = [torch.ones_like(y) for y in outputs]
        for need_x in (False, True):
            torch.library.opcheck(
                torch.ops.fourbit.linears4bit_backward,
                (grads, x.detach(), s, [], stored, *([t.detach() for t in ts] for ts in (sample.A, sample.B)),
                 seed, *numbers, need_x),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip


def test_a_group_is_its_linears_one_by_one() -> None:
    sample = draw(64, [40, 24, 8], [4, 4, 2], bias=True)
    x, grads = inputs(sample, 7, torch.float32, 0)
    seed = torch.tensor(1, device=DEVICE)
    together = run(sample, x, grads, 0.4, seed)
    alone = [run(Sample(*([part[i]] for part in sample)), x, [grads[i]], 0.4, seed) for i in range(3)]
    for i in range(3):
        torch.testing.assert_close(together[i], alone[i][0], rtol=1e-5, atol=1e-5)
        for kind in range(3):  # bias, A, B
            torch.testing.assert_close(together[4 + 3 * kind + i], alone[i][2 + kind], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together[3], sum(each[1] for each in alone), rtol=1e-5, atol=1e-4)


def test_without_a_seed_torchs_generator_decides() -> None:
    sample = draw(64, [8], [4])
    x = torch.randn(5, 64, device=DEVICE)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(sample(x, 0.5, None)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_outputs_nobody_uses_and_gradients_nobody_needs() -> None:
    sample = draw(64, [40, 24], [4, 4])
    x, grads = inputs(sample, 7, torch.float32, 0)
    first, _ = sample(x, 0.0, None)  # x wants no gradient
    got = torch.autograd.grad(first, sample.A + sample.B, grads[0])
    want = run(sample, x, [grads[0], torch.zeros_like(grads[1])], 0.0, None)[3:]
    for mine, expected in zip(got, want, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("path", [*PLAIN[1:], "triton"])
def test_what_is_saved(path: str, keep: bool) -> None:
    """x, s, the adapter, packed weights and the seed; dense weights only to be kept, and then they decode once."""
    sample = draw(64, [96, 160], [4, 4])
    x = torch.randn(6, 64, device=DEVICE).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with force_path(path):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            outputs = sample(x, 0.1, torch.tensor(1, device=DEVICE), keep=keep)
        known = {t.data_ptr() for t in (x, *sample.leaves(), *flatten(sample.weights)[0])}
        extra = sorted(t.numel() for t in saved if t.data_ptr() not in known)
        assert extra == [1, 6 * 8, *([96 * 64, 160 * 64] if keep else [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora_paths, "slabs", None)
            if keep:
                sum(y.sum() for y in outputs).backward()
            else:
                with pytest.raises(TypeError):
                    sum(y.sum() for y in outputs).backward()


def test_under_autocast_dtypes_are_the_ops_own() -> None:
    """fp32 products of bf16 inputs on a CPU that cannot multiply bf16 stay fp32."""
    sample = draw(64, [40], [4])
    x, grads = inputs(sample, 7, torch.bfloat16, 0)
    plain = run(sample, x, grads, 0.0, None)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = run(sample, x, grads, 0.0, None)
    for name, a, b in zip(names(sample), plain, inside, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 65)}, r"x must be \[\.\.\., in\].* got x \(3, 65\), A \(4, 64\), B \(40, 4\)"),
        ({"As": [torch.zeros(4, 60)]}, r"for a weight \(40, 64\)"),
        ({"Bs": [torch.zeros(40, 3)]}, r"for a weight \(40, 64\)"),
        ({"scales": []}, "1 weights, 1 biases, 1 A, 1 B, 0 scales"),
        ({"dropout": 1.5}, "dropout must lie between 0 and 1, got 1.5"),
    ],
)
def test_misfits_are_refused(change: dict[str, Any], message: str) -> None:
    sample = draw(64, [40], [4])
    arguments = dict(zip(("weights", "biases", "As", "Bs", "scales"), sample, strict=True)) | {"x": torch.zeros(3, 64)}
    with pytest.raises(ValueError, match=message):
        lora_linears4bit(**(arguments | change))


def test_weights_of_two_formats_are_refused() -> None:
    one, other = draw(64, [40], [4]), draw(64, [40], [4], nested=True)
    mixed = [[*a, *b] for a, b in zip(one, other, strict=True)]
    with pytest.raises(ValueError, match="must share quant_type, blocksize and whether they are double quantised"):
        lora_linears4bit(torch.zeros(3, 64), *mixed)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_in_any_layout(name: str, dtype: torch.dtype) -> None:
    """Transposed or sliced A and B, such as factors of an SVD: everything as from contiguous copies."""
    sample = draw(64, [40], [4])
    A, B = sample.A[0].detach(), sample.B[0].detach()
    wide = torch.cat([B, B], dim=1)
    odd = Sample(sample.weights, sample.biases, [A.T.contiguous().T], [wide[:, :4]], sample.scales)
    turned = Sample(sample.weights, sample.biases, [A], [B.T.contiguous().T], sample.scales)
    x, grads = inputs(sample, 7, dtype, 0)
    seed = torch.tensor(1, device=DEVICE)
    results = []
    with way(name):
        for one in (sample, odd, turned):
            for leaf in one.leaves():
                leaf.requires_grad_()
            results.append(run(one, x, grads, 0.1, seed))
    for other in results[1:]:
        assert all(torch.equal(mine, expected) for mine, expected in zip(other, results[0], strict=True))


def _drop(rows: int, columns: int, dtype: torch.dtype) -> None:
    from fourbit.kernels.dropout_triton import drop

    meta = {"device": "meta"}
    drop(torch.empty(rows, columns, dtype=dtype, **meta), 0.05, torch.empty((), dtype=torch.int64, **meta))


SCENARIOS = {
    "8b down": lambda: _drop(8192, 14336, torch.bfloat16),
    "odd": lambda: _drop(999, 577, torch.float16),
    "fp32": lambda: _drop(999, 4096, torch.float32),
}
BUDGET = 32  # SASS instructions an element of dropout, read and written: at full bandwidth an H100 has 39, an A100 46


def test_kernels_compile_without_spills_within_their_budgets(aot: ModuleType, costs: list[Any]) -> None:
    """The product for s stands with the one that uses it, in test_matmul4bit_triton.py."""
    aot.assert_no_spills(costs)
    assert {cost.kernel for cost in costs} == {"dropout_kernel"}
    for cost in costs:
        tile = cost.constants["ROWS"] * cost.constants["COLUMNS"]
        assert cost.instructions * cost.threads <= BUDGET * tile and cost.registers <= 64, cost


def test_slabs_are_multiplied_in_bf16_where_the_cpu_does_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight too; the input's gradient is summed over slabs in fp32. Bound: roundings of 2^-9 of each slab's
    share and of the result, of sums of 64 or 40 products of the size of one."""
    sample, seen = draw(64, [40, 8], [4, 2], bias=True), list[torch.dtype]()
    x, grads = inputs(sample, 7, torch.float32, 0)
    with force_path("cpu"):
        want = run(sample, x, grads, 0.0, None)
        monkeypatch.setattr("fourbit.kernels.dispatch._cpu_multiplies_bf16", lambda: True)
        monkeypatch.setattr(lora_paths, "WHOLE", 1000)
        monkeypatch.setattr(lora_paths, "SLAB", 512)
        slabs = lora_paths.slabs
        monkeypatch.setattr(lora_paths, "slabs", lambda weight, dtype: seen.append(dtype) or slabs(weight, dtype))
        found = run(sample, x.detach().bfloat16().requires_grad_(), [g.bfloat16() for g in grads], 0.0, None)
    assert {*seen} == {torch.bfloat16}
    for own, exact in zip(found, want, strict=True):
        assert (own.float() - exact.float()).norm() < 2**-6 * exact.float().norm()
