"""The fused 4-bit product: its rounding against float64, its edges, that it repeats, and what it compiles to.

The oracle is the exact product of x with code * scale; the kernel rounds the code values to x's dtype, which has a term
in the bound.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import border, codes, dispatch, lora_paths
from fourbit.nf4 import Weight4bit, dequantize, quantize

matmul4bit = pytest.importorskip("fourbit.kernels.matmul4bit_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BUDGET = 5.0  # SASS instructions a parameter in the main loop, for a single row of x
SMALL = {"COLUMNS": 32, "WARPS": 2, "COPIES": 4}  # quicker in the interpreter
dtypes = st.sampled_from([torch.bfloat16, torch.float16])


class Sample:
    """A random weight [N, K] in its quantised form and as exact values, and operands to go with it."""

    def __init__(self, guards: Any, N: int, K: int, seed: int, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        made = quantize(self.random(N, K), **{"double_quant": True} | options)
        self.dense = dequantize(made)
        self.weight = made._replace(packed=guards.around(made.packed), absmax=guards.around(made.absmax))

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)


def strided(x: Tensor, pad: int) -> Tensor:
    """x with rows `pad` elements farther apart, NaN between and around them."""
    M, K = x.shape
    around = torch.full((M + 2, K + pad), float("nan"), dtype=x.dtype, device=x.device)
    inside = around[1:-1, :K]
    inside.copy_(x)
    return inside


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


def check(sample: Sample, x: Tensor, bias: Tensor | None, rank: int, guards: Any, poisoned: Any) -> Tensor:
    lora, N = None, sample.weight.rows
    terms = [(x, sample.dense, UNIT[x.dtype])]
    if rank:
        s, B = sample.random(x.shape[0], rank, dtype=x.dtype), sample.random(N, rank)
        lora = (strided(s, 3), strided(B, 5), 0.75)
        terms.append((s, 0.75 * B.to(x.dtype).double(), 0.0))
    with poisoned():
        y: Tensor = matmul4bit.matmul(x, sample.weight, bias, lora)
    guards.check()
    assert y.shape == (x.shape[0], N) and y.dtype == x.dtype
    assert_product(y, terms, sample.weight.columns + rank, bias.expand_as(y) if bias is not None else None)
    return y


@settings(max_examples=30)
@given(
    st.booleans(),
    st.sampled_from([{}, SMALL, SMALL, {"COLUMNS": 64, "WARPS": 2, "COPIES": 4}]),
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
    guards: Any, poisoned: Any, new_layout: bool, tile: dict[str, int], dtype: torch.dtype, M: int, N: int, K: int,
    blocksize: int, nested: bool, quant_type: str, seed: int,
) -> None:  # fmt: skip
    sample = Sample(guards, N, K, seed, double_quant=nested, quant_type=quant_type, blocksize=blocksize)
    x = strided(sample.random(M, K, dtype=dtype), seed % 3)
    bias = sample.random(N, dtype=[dtype, torch.float32][seed % 2]) if seed % 5 else None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NEW_LAYOUT": new_layout, **tile}.items():
            patch.setattr(matmul4bit, name, value)
        check(sample, x, bias, [0, 1, 16, 70][seed % 4], guards, poisoned)


@pytest.mark.parametrize("new_layout", [True, False])
def test_split_sums_repeat_and_nothing_is_written_outside(
    monkeypatch: pytest.MonkeyPatch, guards: Any, poisoned: Any, new_layout: bool
) -> None:
    """Parts of 9, 9 and 8 steps."""
    monkeypatch.setattr(matmul4bit, "NEW_LAYOUT", new_layout)
    monkeypatch.setattr(matmul4bit, "splits_for", lambda tiles, steps, slots: 3)
    sample = Sample(guards, 65, 64 * 26, seed=3)
    x, bias = strided(sample.random(9, 64 * 26, dtype=torch.bfloat16), 1), sample.random(65)
    results = []
    for _ in range(2):
        sample.generator.manual_seed(0)
        results.append(check(sample, x, bias, 20, guards, poisoned))
    assert torch.equal(*results)


def test_no_rows(guards: Any) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert matmul4bit.matmul(x, Sample(guards, 65, 64, seed=0).weight, None).shape == (0, 65)


def test_what_it_applies_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in 16 bits on the kernels' path, of weights whose rows are whole steps; not to keep what is decoded."""

    def few(rows: int, weight: Weight4bit, dtype: torch.dtype = torch.bfloat16, keep: bool = False) -> bool:
        x = torch.empty(rows, weight.columns, dtype=dtype, device="meta")
        return lora_paths.few_rows(x, lora_paths.Group([meta(128, weight.columns), weight]), keep)

    monkeypatch.setattr(border, "BORDER", {"NVIDIA H200": 48})
    monkeypatch.setattr(dispatch, "model", lambda device: "NVIDIA H200")
    weight = meta(128, 192)
    assert not few(1, weight), "a device without kernels"
    with dispatch.force_path("triton"):
        assert few(1, weight) and few(48, weight, torch.float16)
        assert not few(49, weight) and not few(0, weight)
        assert not few(1, weight, torch.float32) and not few(1, weight, keep=True)
        assert not few(1, meta(128, 160)), "K not a multiple of 64"
        assert not few(1, meta(0, 192)) and not few(1, weight._replace(shape=(1 << 26, 192)))


def test_gpus_below_8_0_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        """A tensor on a GPU that is not there."""

        device = torch.device("cuda", 7)

    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    for capability, path in (((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        dispatch._runs_kernels.cache_clear()
        assert dispatch.path_for(Here()) == path  # type: ignore[arg-type]
    dispatch._runs_kernels.cache_clear()


def test_a_model_that_was_measured_steers_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "BORDER", {"NVIDIA H200": 96, "sm_80": 48})
    assert border.border("NVIDIA H200", "sm_90") == 96 and border.border("NVIDIA A40", "sm_80") == 48
    assert border.border("NVIDIA H100 PCIe", "sm_90") == border.border("", "") == border.SAFE


@given(st.integers(1, 5000), st.integers(1, 500), st.integers(1, 600))
def test_parts_of_k_cover_it_and_none_is_empty(tiles: int, steps: int, slots: int) -> None:
    splits = matmul4bit.splits_for(tiles, steps, slots)
    share = -(-steps // splits)
    assert splits >= 1 and (splits - 1) * share < steps <= splits * share


def test_k_is_split_until_the_gpu_is_full() -> None:
    assert matmul4bit.splits_for(16, 64, 264) == 16  # 4096 x 4096 in tiles of 256 rows on 132 multiprocessors
    assert matmul4bit.splits_for(56, 64, 264) == 4  # 14336 x 4096: one wave of 224, not two
    assert matmul4bit.splits_for(264, 64, 264) == matmul4bit.splits_for(1000, 64, 264) == 1
    assert matmul4bit.splits_for(1, 1, 264) == 1


def meta(N: int, K: int, nested: bool = True) -> Weight4bit:
    blocks = N * K // 64
    empty = lambda size, dtype: torch.empty(size, dtype=dtype, device="meta")
    packed = empty(N * K // 2, torch.uint8)
    if not nested:
        return Weight4bit(packed, empty(blocks, torch.float32), None, None, (N, K))
    scales = empty(-(-blocks // 256), torch.float32), empty(1, torch.float32)
    return Weight4bit(packed, empty(blocks, torch.uint8), *scales, (N, K))


def _rows(M: int, *, full: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """A launch for M rows.

    `full` with all that may come with it; else only the main loop, which is the longest one then.
    """
    (N, K), device = (14336, 4096) if full else (1 << 17, 256), torch.device("meta")
    x = torch.empty(M, K, dtype=dtype, device=device)
    lora, bias = None, None
    if full:
        s, B = torch.empty(M, 16, dtype=dtype, device=device), torch.empty(N, 16, device=device)
        lora, bias = (s, B, 0.5), torch.empty(N, dtype=dtype, device=device)
    matmul4bit.matmul(x, meta(N, K, nested=full), bias, lora)


SERVED = (8, 16, 32)
SCENARIOS = {f"full {M}": lambda M=M: _rows(M - 1, full=True) for M in SERVED}  # M - 1: no size is a round number
SCENARIOS |= {f"plain {M}": lambda M=M: _rows(M, full=False, dtype=torch.float16) for M in (1, 16, 32)}


def test_no_spills_and_shared_memory_fits(aot: ModuleType, costs: list[Any]) -> None:
    aot.assert_no_spills(costs)


def test_as_many_programs_run_at_a_time_as_k_is_split_for(costs: list[Any]) -> None:
    """For up to 8 rows, by registers, shared memory and warps of what was compiled."""
    few = [cost for cost in costs if cost.constants["BM"] == 8]
    assert few and all(cost.programs >= matmul4bit.PROGRAMS for cost in few), few


def test_from_triton_3_7_on_a_fence_stands_between_copies_and_the_matrix_units_of_sm_90(costs: list[Any]) -> None:
    """3.6 makes none, and PTX promises no order without one: CONTRIBUTING says so where it speaks of versions."""
    plain = [cost for cost in costs if cost.capability == 90 and cost.scenario.startswith("plain")]
    assert plain and all(bool(cost.proxy_fences) == matmul4bit.NEW_LAYOUT for cost in plain)


INSTRUCTIONS = {1: BUDGET, 16: 5.5, 32: 6}  # a parameter, for up to so many rows of x


def test_instructions_a_parameter(costs: list[Any]) -> None:
    """The main loop's SASS instructions, times threads, over the BN x BK parameters that one pass of it consumes."""
    for cost in costs:
        kind, M = cost.scenario.split()
        if kind == "plain":
            a_parameter = cost.loop_instructions * cost.threads / (cost.constants["BN"] * cost.constants["BK"])
            assert a_parameter <= INSTRUCTIONS[int(M)], (cost.scenario, cost.capability, a_parameter)


def test_tables_made_while_a_compiler_looks_on_are_real() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

    with FakeTensorMode(), unset_fake_temporarily():
        matmul4bit.prepare(torch.device(DEVICE), torch.bfloat16, "fp4")
    assert not isinstance(codes.pair_table("fp4", torch.bfloat16, DEVICE), FakeTensor)
