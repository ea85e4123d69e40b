"""The fused 4-bit product: its rounding against float64, its edges, that it repeats, and what it compiles to.

The oracle is the exact product of x with code * scale; the kernel rounds the code values to x's dtype, which has a term
in the bound.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import border, codes, dispatch, lora_paths
from fourbit.kernels.border import Tile
from fourbit.nf4 import Weight4bit, dequantize, quantize

matmul4bit = pytest.importorskip("fourbit.kernels.matmul4bit_triton")
lora = pytest.importorskip("fourbit.kernels.lora_triton")
split_k = pytest.importorskip("fourbit.kernels.split_k_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BUDGET = 5.0  # SASS instructions a parameter in the main loop, for a single row of x
TILES = [
    Tile(16, stages=3, copies=32, programs=1, columns=128, warps=4),
    Tile(8, stages=3, copies=4, programs=1, columns=32, warps=2),
    Tile(32, stages=3, copies=1, programs=1, columns=64, warps=2),
]
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


def check(
    sample: Sample, x: Tensor, tile: Tile, bias: Tensor | None, rank: int, guards: Any, poisoned: Any
) -> tuple[Tensor, list[int]]:
    """The product, and how many numbers each buffer made for it holds."""
    lora, N = None, sample.weight.rows
    terms = [(x, sample.dense, UNIT[x.dtype])]
    if rank:
        s, B = sample.random(x.shape[0], rank, dtype=x.dtype), sample.random(N, rank)
        lora = (strided(s, 3), strided(B, 5), 0.75)
        terms.append((s, 0.75 * B.to(x.dtype).double(), 0.0))
    with poisoned() as made:
        y: Tensor = matmul4bit.matmul(x, sample.weight, bias, lora, tile)
    guards.check()
    assert y.shape == (x.shape[0], N) and y.dtype == x.dtype
    assert_product(y, terms, sample.weight.columns + rank, bias.expand_as(y) if bias is not None else None)
    return y, sorted(buffer.numel() - 512 for buffer in made)


@settings(max_examples=60)
@given(
    st.sampled_from(TILES),
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
    guards: Any, poisoned: Any, tile: Tile, dtype: torch.dtype, M: int, N: int, K: int, blocksize: int, nested: bool,
    quant_type: str, seed: int,
) -> None:  # fmt: skip
    sample = Sample(guards, N, K, seed, double_quant=nested, quant_type=quant_type, blocksize=blocksize)
    x = strided(sample.random(M, K, dtype=dtype), seed % 3)
    bias = sample.random(N, dtype=[dtype, torch.float32][seed % 2]) if seed % 5 else None
    check(sample, x, tile, bias, [0, 1, 16, 70][seed % 4], guards, poisoned)


@pytest.fixture
def shared_counters(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """One buffer for all launches, as on a CUDA stream."""
    buffer = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(matmul4bit, "counters", lambda device, tiles: buffer)
    monkeypatch.setattr(lora, "counters", lambda device, tiles: buffer)
    return buffer


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("new_layout", [True, False])
def test_split_sums_repeat_and_nothing_is_written_outside(
    monkeypatch: pytest.MonkeyPatch, guards: Any, poisoned: Any, shared_counters: Tensor, tile: Tile, new_layout: bool
) -> None:
    """Parts of 9, 9 and 8 steps; the second launch finds the counters as the first one did."""
    monkeypatch.setattr(matmul4bit, "NEW_LAYOUT", new_layout)
    monkeypatch.setattr(dispatch, "processors", lambda device: 1)
    sample = Sample(guards, 65, 64 * 26, seed=3)
    x, bias = strided(sample.random(9, 64 * 26, dtype=torch.bfloat16), 1), sample.random(65)
    tile = tile._replace(programs=3 * -(-9 // tile.rows) * -(-65 // tile.columns))
    results = []
    for _ in range(3):
        sample.generator.manual_seed(0)
        y, made = check(sample, x, tile, bias, 20, guards, poisoned)
        results.append(y)
        assert made == [9 * 65, 3 * 9 * 65], "K is split in three"
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
        s = lora.project_down(x, A)
    assert s.shape == (M, R) and s.dtype == dtype
    assert_product(s, [(x, A.to(dtype), 0.0)], K)


def test_project_down_splits_and_writes_nothing_outside(
    poisoned: Any, shared_counters: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "processors", lambda device: 64)
    x, A = torch.randn(3, 1000).to(DEVICE, torch.bfloat16), torch.randn(20, 1000, device=DEVICE)
    with poisoned() as made:
        first = lora.project_down(x, A)
    assert sorted(buffer.numel() - 512 for buffer in made) == [3 * 20, 4 * 3 * 20], "K is split in four"
    assert torch.equal(first, lora.project_down(x, A)) and not shared_counters.any()


def test_no_rows(guards: Any) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert matmul4bit.matmul(x, Sample(guards, 65, 64, seed=0).weight, None).shape == (0, 65)
    assert lora.project_down(x, torch.ones(8, 64, device=DEVICE)).shape == (0, 8)


def test_what_it_applies_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in 16 bits on the kernels' path, of weights whose rows are whole steps; not to keep what is decoded."""

    def few(rows: int, weight: Weight4bit, dtype: torch.dtype = torch.bfloat16, keep: bool = False) -> bool:
        x = torch.empty(rows, weight.columns, dtype=dtype, device="meta")
        return lora_paths.few_rows(x, lora_paths.Group([meta(128, weight.columns), weight]), keep)

    monkeypatch.setattr(border, "BORDER", {"sm_90": 48})
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
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


def test_the_border_and_the_tiles_are_one_for_all_rows_below_it() -> None:
    assert border.border("sm_75") == border.border("") == border.SAFE
    for tiles in (border.SMALL, *border.TILES.values()):
        assert [tile.rows for tile in tiles] == sorted({tile.rows for tile in tiles})
    assert border.tile_for("sm_90", 9) is border.TILES["sm_90"][1] and border.tile_for("sm_90", 300).rows == 32
    assert border.tile_for("sm_95", 1) is border.SMALL[0]


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
    empty = lambda size, dtype: torch.empty(size, dtype=dtype, device="meta")
    packed = empty(N * K // 2, torch.uint8)
    if not nested:
        return Weight4bit(packed, empty(blocks, torch.float32), None, None, (N, K))
    scales = empty(-(-blocks // 256), torch.float32), empty(1, torch.float32)
    return Weight4bit(packed, empty(blocks, torch.uint8), *scales, (N, K))


@contextmanager
def processors(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "processors", lambda device: count)
        yield


def _rows(M: int, *, full: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """The tile that this architecture has for M rows.

    `full` with all that may come with it; else only the main loop, which is the longest one then.
    """
    (N, K), device = (14336, 4096) if full else (1 << 17, 256), torch.device("meta")  # K is split in full ones alone
    x = torch.empty(M, K, dtype=dtype, device=device)
    lora, bias = None, None
    if full:
        s, B = torch.empty(M, 16, dtype=dtype, device=device), torch.empty(N, 16, device=device)
        lora, bias = (s, B, 0.5), torch.empty(N, dtype=dtype, device=device)
    with processors(132):
        matmul4bit.matmul(x, meta(N, K, nested=full), bias, lora)


def _project(M: int, R: int) -> None:
    x, A = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(R, 4096, device="meta")
    with processors(132):
        lora.project_down(x, A)


SERVED = (8, 16, 32)
SCENARIOS = {f"full {M}": lambda M=M: _rows(M - 1, full=True) for M in SERVED}  # M - 1: no size is a round number
SCENARIOS |= {f"plain {M}": lambda M=M: _rows(M, full=False, dtype=torch.float16) for M in (1, *SERVED)}
SCENARIOS |= {"project 1": lambda: _project(1, 16), "project 64": lambda: _project(64, 64)}


def test_no_spills_and_shared_memory_fits(aot: ModuleType) -> None:
    aot.assert_no_spills(aot.costs_of(__file__))


INSTRUCTIONS = {1: BUDGET, 8: 6.6, 16: 7.2, 32: 8.5}  # a parameter, for up to so many rows of x


def test_instructions_a_parameter(aot: ModuleType) -> None:
    """The main loop's SASS instructions, times threads, over the BN x BK parameters that one pass of it consumes."""
    for cost in aot.costs_of(__file__):
        kind, M = cost.scenario.split()
        if kind == "plain":
            a_parameter = cost.loop_instructions * cost.threads / (cost.constants["BN"] * cost.constants["BK"])
            assert a_parameter <= INSTRUCTIONS[int(M)], (cost.scenario, cost.capability, a_parameter)


def test_as_many_programs_are_resident_as_the_table_says(aot: ModuleType) -> None:
    """By the registers and the shared memory of each compiled kernel: K is split for so many, so no fewer may run."""
    seen = 0
    for cost in aot.costs_of(__file__):
        if cost.kernel == "matmul4bit_kernel":
            tile = border.tile_for(f"sm_{cost.capability}", cost.constants["BM"])
            assert aot.resident(cost) >= tile.programs, cost
            seen += 1
    assert seen >= 7 * len(aot.CAPABILITIES)


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
