"""The fused 4-bit product: its rounding against float64, its edges, that it repeats, and what it compiles to.

The oracle is the exact product of x with code * scale. "weight" configurations round code * scale to x's dtype first
and so are held to the rounded matrix; "sums" configurations round the code values instead, and get the term for it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import codes, dispatch, plan
from fourbit.kernels.nf4 import dequantize, quantize
from fourbit.kernels.weight4bit import Weight4bit

matmul4bit = pytest.importorskip("fourbit.kernels.matmul4bit_triton")
project = pytest.importorskip("fourbit.kernels.project_triton")
split_k = pytest.importorskip("fourbit.kernels.split_k_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BUDGET = 5.0  # SASS instructions a parameter in the main loop, for a single row of x
SMALL = {"BM": 16, "BN": 64, "BK": 64, "warps": 4, "stages": 3, "copies": 1, "direct": False, "programs": 1}
FORMS = [
    SMALL | {"scale_on": "sums"},
    SMALL | {"scale_on": "weight"},
    SMALL | {"scale_on": "sums", "direct": True, "copies": 32, "BN": 128},
    SMALL | {"scale_on": "weight", "direct": True, "copies": 4, "warps": 2, "BM": 8, "BN": 32},
    SMALL | {"scale_on": "sums", "direct": True, "BM": 32, "warps": 2},
]
GUARDS: list[Tensor] = []  # the memory before and behind the weight of the latest sample
forms = st.sampled_from(FORMS)
dtypes = st.sampled_from([torch.bfloat16, torch.float16])


class Sample:
    """A random weight [N, K] in its quantised form and as exact values, and operands to go with it."""

    def __init__(self, N: int, K: int, seed: int, *, nested: bool = True, quant_type: str = "nf4", blocksize: int = 64):
        GUARDS.clear()
        self.generator = torch.Generator().manual_seed(seed)
        made = quantize(self.random(N, K), quant_type, blocksize, nested)
        self.dense = dequantize(made)
        self.weight = made._replace(packed=guarded(made.packed), absmax=guarded(made.absmax))

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)


def guarded(tensor: Tensor) -> Tensor:
    """The same values between stretches that nothing may read; compiled, a wrong value shows up in the result."""
    around = torch.full((tensor.numel() + 512,), 255, dtype=tensor.dtype, device=DEVICE)
    if tensor.is_floating_point():
        around.fill_(float("nan"))
    around[256:-256] = tensor.flatten()
    GUARDS.extend([around[:256], around[-256:]])
    return around[256:-256]


def strided(x: Tensor, pad: int) -> Tensor:
    """x with rows `pad` elements farther apart, NaN between and around them."""
    M, K = x.shape
    around = torch.full((M + 2, K + pad), float("nan"), dtype=x.dtype, device=x.device)
    inside = around[1:-1, :K]
    inside.copy_(x)
    return inside


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Results and workspaces start as NaN between NaN; returns the buffers, to see that the edges stayed so."""
    buffers: list[Tensor] = []
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *shape, **kwargs)
        if not made.is_floating_point() or made.is_meta or not made.numel():
            return made
        around = torch.full((made.numel() + 512,), float("nan"), dtype=made.dtype, device=made.device)
        buffers.append(around)
        return around[256 : 256 + made.numel()].view(made.shape)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return buffers


@pytest.fixture(autouse=True, scope="module")
def reads_inside() -> Iterator[None]:
    """In the interpreter every load is looked at: none may touch the guards, even if its value is dropped later."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for guard in GUARDS:
            offsets = pointers.data.astype("int64") - guard.data_ptr()
            touched = (offsets >= 0) & (offsets < guard.numel() * guard.itemsize) & mask.data
            assert not touched.any(), "read outside the weight"
        return load(self, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", guarded_load)
        yield


def assert_edges_untouched(buffers: list[Tensor]) -> None:
    assert buffers
    for buffer in buffers:
        assert buffer[:256].isnan().all() and buffer[-256:].isnan().all(), "written outside"
    buffers.clear()


def assert_product(y: Tensor, terms: list[tuple[Tensor, Tensor, float]], K: int, start: Tensor | None = None) -> None:
    """y = sum of a b^T over (a, b, u): fp32 accumulation, u relative rounding of b, one rounding of the result."""
    exact = torch.zeros(y.shape, dtype=torch.float64, device=y.device) if start is None else start.double()
    size, looked_up = exact.abs(), torch.zeros_like(exact)
    for a, b, u in terms:
        exact = exact + a.double() @ b.double().T
        size = size + a.double().abs() @ b.double().abs().T
        looked_up = looked_up + 2 * u * (a.double().abs() @ b.double().abs().T)
    tiny = 2.0**-24 if y.dtype == torch.float16 else 0.0  # fp16's subnormals
    bound = 2 * (K + 1) * 2.0**-24 * size + looked_up + UNIT[y.dtype] * (exact.abs() + looked_up) + tiny
    excess = (y.double() - exact).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float(excess.max())} beyond the bound"


def check(sample: Sample, x: Tensor, config: dict[str, Any], bias: Tensor | None, rank: int = 0) -> Tensor:
    lora, N = None, sample.weight.rows
    exact = config["scale_on"] == "weight"
    terms = [(x, sample.dense.to(x.dtype), 0.0) if exact else (x, sample.dense, UNIT[x.dtype])]
    if rank:
        s, B = sample.random(x.shape[0], rank, dtype=x.dtype), sample.random(N, rank)
        lora = (strided(s, 3), strided(B, 5), 0.75)
        terms.append((s, 0.75 * B.to(x.dtype).double(), 0.0))
    y: Tensor = matmul4bit.matmul(x, sample.weight, bias, config, lora)
    assert y.shape == (x.shape[0], N) and y.dtype == x.dtype
    assert_product(y, terms, sample.weight.columns + rank, bias.expand_as(y) if bias is not None else None)
    return y


@settings(max_examples=60)
@given(
    forms,
    dtypes,
    st.sampled_from([1, 2, 7, 8, 9, 15, 17, 33]),
    st.sampled_from([1, 31, 63, 65, 128, 129]),
    st.sampled_from([64, 128, 192, 512, 576]),
    st.sampled_from([32, 64, 128, 512, 4096]),
    st.booleans(),
    st.sampled_from(["nf4", "fp4"]),
    st.integers(0, 2**31),
)
def test_values(
    form: dict[str, Any],
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    blocksize: int,
    nested: bool,
    quant_type: str,
    seed: int,
) -> None:
    sample = Sample(N, K, seed, nested=nested, quant_type=quant_type, blocksize=blocksize)
    assert matmul4bit.applies(dtype, sample.weight)
    x = strided(sample.random(M, K, dtype=dtype), seed % 3)
    bias = sample.random(N, dtype=[dtype, torch.float32][seed % 2]) if seed % 5 else None
    check(sample, x, form, bias, rank=[0, 1, 16, 70][seed % 4])


@pytest.fixture
def shared_counters(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """One buffer for all launches, as on a CUDA stream."""
    buffer = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(matmul4bit, "counters", lambda device, tiles: buffer)
    monkeypatch.setattr(project, "counters", lambda device, tiles: buffer)
    return buffer


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['scale_on']}-{form['direct']}-{form['copies']}")
@pytest.mark.parametrize("new_layout", [True, False])
def test_split_sums_repeat_and_nothing_is_written_outside(
    monkeypatch: pytest.MonkeyPatch,
    poison: list[Tensor],
    shared_counters: Tensor,
    form: dict[str, Any],
    new_layout: bool,
) -> None:
    """Parts of 9, 9 and 8 steps; the second launch finds the counters as the first one did."""
    monkeypatch.setattr(matmul4bit, "NEW_LAYOUT", new_layout)
    sample = Sample(65, 64 * 26, seed=3)
    x, bias = strided(sample.random(9, 64 * 26, dtype=torch.bfloat16), 1), sample.random(65)
    tiles = -(-9 // form["BM"]) * -(-65 // form["BN"])
    config = form | {"programs": 3 * tiles}
    results = []
    poison.clear()
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "processors", lambda device: 1)
            sample.generator.manual_seed(0)
            results.append(check(sample, x, config, bias, rank=20))
        assert sorted(buffer.numel() - 512 for buffer in poison) == [9 * 65, 3 * 9 * 65], "K is split in three"
        assert_edges_untouched(poison)
        assert not shared_counters.any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@settings(max_examples=30)
@given(
    dtypes,
    st.sampled_from([1, 2, 15, 17, 70]),
    st.sampled_from([1, 8, 16, 17, 64, 100]),
    st.sampled_from([1, 63, 64, 129, 640, 1000]),
    st.integers(0, 2**31),
)
def test_project_down(dtype: torch.dtype, M: int, R: int, K: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, A = (torch.randn(size, K, generator=generator).to(DEVICE) for size in (M, R))
    x, A = strided(x.to(dtype), seed % 4), strided(A.to([dtype, torch.float32][seed % 2]), seed % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "processors", lambda device: 1 + 7 * (seed % 5))
        s = matmul4bit.project_down(x, A)
    assert s.shape == (M, R) and s.dtype == dtype
    assert_product(s, [(x, A.to(dtype), 0.0)], K)


def test_project_down_splits_and_writes_nothing_outside(
    poison: list[Tensor], shared_counters: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "processors", lambda device: 64)
    x, A = torch.randn(3, 1000).to(DEVICE, torch.bfloat16), torch.randn(20, 1000, device=DEVICE)
    first = matmul4bit.project_down(x, A)
    assert sorted(buffer.numel() - 512 for buffer in poison) == [3 * 20, 4 * 3 * 20], "K is split in four"
    assert_edges_untouched(poison)
    assert torch.equal(first, matmul4bit.project_down(x, A)) and not shared_counters.any()


def test_no_rows() -> None:
    sample = Sample(65, 64, seed=0)
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert matmul4bit.matmul(x, sample.weight, None, FORMS[0]).shape == (0, 65)
    assert matmul4bit.project_down(x, torch.ones(8, 64, device=DEVICE)).shape == (0, 8)


def test_what_it_applies_to() -> None:
    weight = meta(128, 192)
    assert matmul4bit.applies(torch.bfloat16, weight) and matmul4bit.applies(torch.float16, weight)
    assert not matmul4bit.applies(torch.float32, weight)
    assert not matmul4bit.applies(torch.bfloat16, meta(128, 160))  # K not a multiple of 64
    assert not matmul4bit.applies(torch.bfloat16, meta(0, 192)) and not matmul4bit.applies(torch.bfloat16, meta(1, 0))
    assert not matmul4bit.applies(torch.bfloat16, weight._replace(shape=(1 << 16, 1 << 16)))


@given(st.integers(1, 5000), st.integers(1, 500), st.integers(1, 600))
def test_parts_of_k_cover_it_and_none_is_empty(tiles: int, steps: int, slots: int) -> None:
    splits = split_k.splits_for(tiles, steps, slots)
    share = -(-steps // splits)
    assert splits >= 1 and (splits - 1) * share < steps <= splits * share


def test_k_is_split_until_the_gpu_is_full() -> None:
    assert split_k.splits_for(16, 64, 264) == 16  # 4096 x 4096 in tiles of 256 rows on 132 multiprocessors
    assert split_k.splits_for(56, 64, 264) == 4  # 14336 x 4096: one wave of 224, not two
    assert split_k.splits_for(264, 64, 264) == split_k.splits_for(1000, 64, 264) == split_k.splits_for(1, 1, 264) == 1


def meta(N: int, K: int, nested: bool = True) -> Weight4bit:
    blocks = N * K // 64
    empty = lambda size, dtype: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
    if not nested:
        return Weight4bit(empty(N * K // 2, torch.uint8), empty(blocks, torch.float32), None, None, (N, K))
    absmax, groups, offset = (
        empty(blocks, torch.uint8),
        empty(-(-blocks // 256), torch.float32),
        empty(1, torch.float32),
    )
    return Weight4bit(empty(N * K // 2, torch.uint8), absmax, groups, offset, (N, K))


def _row(M: int, *, full: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """The configuration that this architecture's table has for M rows.

    `full` with all that may come with it; else only the main loop, which is the longest one then.
    """
    (N, K), device = (14336, 4096) if full else (1 << 17, 256), torch.device("meta")  # K is split in full ones alone
    known = plan.entry(dispatch.architecture(device))
    assert known is not None
    config = next(row for row in known["fused"] if row["M"] >= M)
    x = torch.empty(M, K, dtype=dtype, device=device)
    lora, bias = None, None
    if full:
        s, B = torch.empty(M, 16, dtype=dtype, device=device), torch.empty(N, 16, device=device)
        lora, bias = (s, B, 0.5), torch.empty(N, dtype=dtype, device=device)
    matmul4bit.matmul(x, meta(N, K, nested=full), bias, config, lora)


def _project(M: int, R: int) -> None:
    x, A = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(R, 4096, device="meta")
    matmul4bit.project_down(x, A)


SERVED = sorted({row["M"] for known in plan.table().values() for row in known["fused"]})
SCENARIOS = {f"full {M}": lambda M=M: _row(M - 1, full=True) for M in SERVED}  # M - 1: no size is a round number
SCENARIOS |= {f"plain {M}": lambda M=M: _row(M, full=False, dtype=torch.float16) for M in (1, *SERVED)}
SCENARIOS |= {"project 1": lambda: _project(1, 16), "project 64": lambda: _project(64, 64)}


def test_no_spills_and_shared_memory_fits(aot: ModuleType) -> None:
    aot.assert_no_spills(aot.costs_of(__file__))


def test_instructions_a_parameter(aot: ModuleType) -> None:
    """The main loop's SASS instructions, times threads, over the BN x BK parameters that one pass of it consumes.

    For one row of x at most BUDGET; for every row of the table at most what the cost model reckons with.
    """
    for cost in aot.costs_of(__file__):
        kind, M = cost.scenario.split()
        if kind != "plain":
            continue
        a_parameter = cost.loop_instructions * cost.threads / (cost.constants["BN"] * cost.constants["BK"])
        row = next(row for row in plan.table()[f"sm_{cost.capability}"]["fused"] if row["M"] >= int(M))
        assert a_parameter <= row["instructions"], (cost.scenario, cost.capability, a_parameter)
        assert int(M) > 1 or a_parameter <= BUDGET, (cost.scenario, cost.capability, a_parameter)


def test_counters_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has its own, every captured launch too; none before the device's exist; fresh ones when used up."""
    device = torch.device(DEVICE)
    capturing = [True]
    monkeypatch.setattr(split_k, "_of_device", {})
    monkeypatch.setattr(split_k, "_taken", {})
    monkeypatch.setattr(split_k, "COUNTERS", 64)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert split_k._take(device, 5).numel() == 5 and not split_k._of_device
    capturing[0] = False
    places = [split_k._take(device, tiles) for tiles in (5, 1, 8)]
    whole = split_k.counters_of_device(device)
    assert [(t.data_ptr() - whole.data_ptr()) // 4 for t in places] == [0, 8, 12]
    assert [t.numel() for t in places] == [8, 4, 8]
    assert split_k._take(device, 50).data_ptr() not in range(whole.data_ptr(), whole.data_ptr() + 4 * 64)


def test_tables_made_while_a_compiler_looks_on_are_real() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

    with FakeTensorMode(), unset_fake_temporarily():
        matmul4bit.prepare(torch.device(DEVICE), torch.bfloat16, "fp4")
    assert not isinstance(codes.pair_table("fp4", torch.bfloat16, DEVICE), FakeTensor)
