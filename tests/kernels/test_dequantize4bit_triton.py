"""Decoding by kernel: the reference's bits at every edge, in one launch, and what it compiles to.

test_nf4.py holds all paths to bitsandbytes. Here the kernel's own edges are met: tiles, words, groups of 256 scales,
misaligned buffers (which plain PyTorch decodes), memory beside the buffers, weights of more than 2^31 values.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit.kernels import dequantize4bit
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.weight4bit import BLOCKSIZES, Weight4bit
from fourbit.nf4 import dequantize, quantize

decoding = pytest.importorskip("fourbit.kernels.dequantize4bit_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BUDGET = {80: 8, 89: 8, 90: 8, 100: 8, 120: 9.5}  # SASS instructions to decode a value
COLUMNS = (1, 2, 7, 8, 24, 63, 64, 65, 72, 128, 136, 520, 1023, 1024, 2048, 2056, 4100)


def stored(shape: tuple[int, ...], nested: bool, quant_type: str, blocksize: int, seed: int) -> Weight4bit:
    """Random codes and scales: every byte, and scales of many sizes."""
    generator, n = torch.Generator().manual_seed(seed), torch.Size(shape).numel()
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, ((n + 1) // 2,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(blocks, generator=generator) + 0.01
    if not nested:
        return Weight4bit(packed, absmax, None, None, shape, quant_type, blocksize)
    codes = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    scales, offset = torch.rand(-(-blocks // 256), generator=generator) + 0.01, torch.rand(1, generator=generator) + 1
    return Weight4bit(packed, codes, scales, offset, shape, quant_type, blocksize)


def on_device(weight: Weight4bit, guards: Any, shift: int = 0) -> Weight4bit:
    moved = {k: guards.around(v) for k, v in weight._asdict().items() if isinstance(v, Tensor)}
    return weight._replace(**moved | {"packed": guards.around(weight.packed, shift)})


def check_decoding(guards: Any, weight: Weight4bit, dtype: torch.dtype, *, shift: int = 0, shift_out: int = 0) -> None:
    """With codes and target `shift` elements off alignment: the reference's bits, and nothing beside them."""
    with force_path("reference"):
        want = dequantize(weight, dtype)
    out = guards.around(torch.full(weight.shape, float("nan"), dtype=dtype), shift_out)
    with force_path("triton"):
        dequantize4bit.decode_into(out, on_device(weight, guards, shift))
    assert torch.equal(out.cpu(), want)
    guards.check()


@given(
    st.integers(1, 9),
    st.sampled_from(COLUMNS),
    st.booleans(),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCKSIZES),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 0, 1, 2, 4]),
    st.sampled_from([0, 0, 1, 4]),
    st.integers(0, 1000),
)
@settings(max_examples=120)
def test_every_shape_decodes_to_the_references_bits(
    guards: Any, rows: int, columns: int, nested: bool, quant_type: str, blocksize: int, dtype: torch.dtype,
    shift: int, shift_out: int, seed: int,
) -> None:  # fmt: skip
    weight = stored((rows, columns), nested, quant_type, blocksize, seed)
    check_decoding(guards, weight, dtype, shift=shift, shift_out=shift_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "blocksize"),
    [
        (12, 2048, 32),  # tiles are whole
        (13, 1032, 32),  # rows end within a tile
        (6, 2080, 32),
        (33, 2056, 32),  # several groups of 256 blocks, the last tile not full
        (3, 2056, 4096),
    ],
)
def test_scales_of_neighbouring_groups(
    guards: Any, rows: int, columns: int, blocksize: int, dtype: torch.dtype
) -> None:
    check_decoding(guards, stored((rows, columns), True, "nf4", blocksize, 0), dtype)


@pytest.mark.parametrize("n", [1, 63, 2047, 2048, 2049, 2056, 9000])
@pytest.mark.parametrize("nested", [False, True])
def test_a_fresh_tensor_is_filled_and_any_number_of_dimensions_decodes(
    guards: Any, n: int, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = stored((n,), nested, "nf4", 32, n)

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    for shape in ((n,), (1, 1, n), (n, 1, 1)):
        with force_path("reference"):
            want = dequantize(weight._replace(shape=shape))
        with monkeypatch.context() as patch, force_path("triton"):
            patch.setattr(dequantize4bit, "_allocate", poisoned)
            got = dequantize(on_device(weight._replace(shape=shape), guards))
        assert got.shape == shape and torch.equal(got.cpu(), want)
    guards.check()


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight = stored((64, 300), True, "nf4", 64, 0)

    for changed, message in (
        ({"nested_offset": None}, "go together"),
        ({"nested_absmax": None}, "go together"),
        ({"absmax": torch.ones(300)}, r"need 300 uint8 codes of scales, got 300 of torch\.float32"),
        ({"absmax": weight.absmax[1:]}, "need 300 uint8 codes of scales, got 299"),
        ({"nested_absmax": torch.ones(3)}, "300 codes in blocks of 256 need 2 scales in fp32, got 3"),
        ({"nested_offset": torch.ones(2)}, "nested_offset must be one fp32 value, got 2"),
        ({"absmax": weight.absmax.to("meta")}, "on one device, got cpu, meta"),
    ):
        with pytest.raises(ValueError, match=message):
            dequantize(weight._replace(**changed))


def test_stored_tensors_may_be_views() -> None:
    """Every other element of wider tensors: flat, they are still no more than views."""
    weight = stored((3, 4096), True, "nf4", 64, 0)
    with force_path("reference"):
        want = dequantize(weight)
    views = {k: v.repeat_interleave(2).to(DEVICE)[::2] for k, v in weight._asdict().items() if isinstance(v, Tensor)}
    with force_path("triton"):
        got = dequantize(weight._replace(**views))
    assert torch.equal(got.cpu(), want)


class _Launches:
    """Stands in for a kernel and counts. Fused multiply-adds, which would round otherwise, must be off."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: object, enable_fp_fusion: bool, **__: object) -> None:
            assert not enable_fp_fusion
            self.grids.append(grid)

        return launch


class _Ops(TorchDispatchMode):
    """The names of torch's own ops that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_decoding_is_one_launch_and_nothing_else(guards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = on_device(stored((8, 64), True, "nf4", 64, 0), guards)
    with force_path("triton"):
        dequantize(weight)  # the tables are made now
        launches = _Launches()
        monkeypatch.setattr(decoding, "dequantize4bit_kernel", launches)
        with _Ops() as ops:
            dequantize(weight)
    guards.check()
    assert len(launches.grids) == 1
    assert ops.names <= {"empty", "view", "detach"}, ops.names


@pytest.mark.parametrize("shape", [(1 << 20,), ((1 << 33) + 8,), (262_144, 8192), (8192, 262_144)])
def test_grids_stay_within_cudas_limits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size, and matrices with as many rows or columns as a vocabulary has."""
    launches = _Launches()
    monkeypatch.setattr(decoding, "dequantize4bit_kernel", launches)
    n, meta = torch.Size(shape).numel(), {"device": "meta"}
    packed = torch.empty(n // 2, dtype=torch.uint8, **meta)
    weight = Weight4bit(packed, torch.empty(n // 64, **meta), None, None, shape)
    assert decoding.decode_words(torch.empty(n, dtype=torch.bfloat16, **meta), packed, weight)
    assert [grid[0] < 1 << 31 for grid in launches.grids] == [True]


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: 6 GB of it")
def test_more_than_two_to_the_31_values() -> None:
    n, tail = (1 << 31) + 8192, 8192
    for nested in (False, True):
        weight = stored((n,), nested, "nf4", 64, 0).to("cuda")
        last = Weight4bit(weight.packed[-tail // 2 :], weight.scales[-tail // 64 :], None, None, (tail,))
        flat = dequantize(weight, torch.bfloat16)
        assert torch.equal(flat[-tail:], dequantize(last, torch.bfloat16))
        made, again = quantize(flat), quantize(flat[-tail:])
        assert torch.equal(made.packed[-tail // 2 :], again.packed)
        assert torch.equal(made.absmax[-tail // 64 :], again.absmax)


def _decoding(rows: int, columns: int, dtype: torch.dtype, blocksize: int = 64) -> Callable[[], None]:
    """A weight with double quantisation."""

    def run() -> None:
        blocks, meta = -(-rows * columns // blocksize), {"device": "meta"}
        packed, codes = (torch.empty(size, dtype=torch.uint8, **meta) for size in (rows * columns // 2, blocks))
        nested, offset = torch.empty(-(-blocks // 256), **meta), torch.empty(1, **meta)
        weight = Weight4bit(packed, codes, nested, offset, (rows, columns), blocksize=blocksize)
        dequantize(weight, dtype)

    return run


SCENARIOS = {
    "8b down": _decoding(4096, 14336, torch.bfloat16),
    "7b up": _decoding(18944, 3584, torch.float16),
    "fp32": _decoding(4096, 4096, torch.float32, blocksize=128),
    "not whole tiles": _decoding(33, 328, torch.bfloat16, blocksize=32),
}


def test_no_spills_and_shared_memory_fits(aot: ModuleType, costs: list[Any]) -> None:
    aot.assert_no_spills(costs)
    assert {cost.kernel for cost in costs} == {"dequantize4bit_kernel"}


def test_instructions_and_registers_a_value(costs: list[Any]) -> None:
    """All SASS instructions of the kernel (it has no loop), times threads, over the values of a tile: at most BUDGET.

    Scales of double quantisation are included. At full copy bandwidth an H100 has 25 issue slots a value, an RTX 5090
    87. With at most 64 registers a thread, half of a multiprocessor's threads can wait for memory at a time.
    """
    assert len(costs) == len(SCENARIOS) * len({cost.capability for cost in costs})
    for cost in costs:
        a_value = cost.instructions * cost.threads / (cost.constants["TILE"] * decoding.WORD)
        assert a_value <= BUDGET[cost.capability] and cost.registers <= 64, (a_value, cost)
        assert cost.loop_instructions == cost.instructions, "it has a loop: this counting does not hold"
