"""Quantising weights by kernel: the reference's bytes at every edge, and what it compiles to."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels.codes import code_midpoints
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.weight4bit import BLOCKSIZES
from fourbit.nf4 import quantize

quantizing = pytest.importorskip("fourbit.kernels.quantize4bit_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def weight_of(n: int, kind: str, size: float, quant_type: str, seed: int) -> Tensor:
    """Normal values, or the midpoints of the code, where dividing and multiplying by the reciprocal part ways."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(n, generator=generator) * size
    midpoints = code_midpoints(quant_type)[0]
    points = torch.cat([midpoints, torch.tensor([1.0, -1.0])])
    return points[torch.randint(17, (n,), generator=generator)] * (size * 0.7)


@given(
    st.one_of(
        st.integers(1, 9000), st.builds(lambda k, d: 32 * k + d, st.integers(1, 200), st.sampled_from([-1, 0, 1]))
    ),
    st.sampled_from(["normal", "midpoints"]),
    st.sampled_from([0.05, 0.3, 1e-20, 1e-39, 0.0]),
    st.integers(0, 1000),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCKSIZES),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
@settings(max_examples=100)
def test_quantising_gives_the_references_bytes(
    guards: Any, n: int, kind: str, size: float, seed: int, quant_type: str, blocksize: int, dtype: torch.dtype,
    shift: int,
) -> None:  # fmt: skip
    """Lengths, ties, zeros, subnormals, dtypes, alignment, and what lies beside the buffers."""
    weight = weight_of(n, kind, size, quant_type, seed).to(dtype)
    with force_path("reference"):
        want = quantize(weight, quant_type=quant_type, blocksize=blocksize)
    with force_path("triton"), pytest.MonkeyPatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *a, **k: guards.around(empty(*a, **k)))
        got = quantize(guards.around(weight, shift), quant_type=quant_type, blocksize=blocksize)
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])
    guards.check()


def _quantizing(shape: tuple[int, int], dtype: torch.dtype, quant_type: str, blocksize: int) -> Callable[[], None]:
    """Without quantize's last step, which looks at the result."""
    n = shape[0] * shape[1]
    meta: Any = {"device": "meta"}

    def run() -> None:
        packed, absmax = torch.empty((n + 1) // 2, dtype=torch.uint8, **meta), torch.empty(-(-n // blocksize), **meta)
        quantizing.quantize_into(torch.empty(n, dtype=dtype, **meta), quant_type, blocksize, packed, absmax)

    return run


SCENARIOS = {"weights": _quantizing((4097, 14337), torch.float32, "fp4", 64)}


def test_no_spills_and_shared_memory_fits(aot: ModuleType) -> None:
    costs = aot.costs_of(__file__)
    aot.assert_no_spills(costs)
    assert {cost.kernel for cost in costs} == {"quantize4bit_kernel"}
    for cost in costs:
        assert cost.registers * cost.threads <= 1 << 15, f"fewer than two programs fit a multiprocessor: {cost}"
