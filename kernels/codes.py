"""The code tables of every quantised format, derived from the rules that define them.

A table of numbers can be copied wrongly and nobody sees it; a rule can be read. Tests hold each table to the published
numbers, bit by bit. For that the rounding counts too: the published tables step through their ranges in fp32, and so
does `_evenly` here. Tables are cached and shared: do not write to them.
"""

from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

NF4_OUTERMOST = 0.9677083  # probability of the largest quantile: the mean of 1 - 1/30 and 1 - 1/32, as published


def code_for(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The fp32 [16] table of "nf4" or "fp4"; ValueError for any other name."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    return _table(nf4_code if quant_type == "nf4" else fp4_code, torch.device(device))


def code_midpoints(quant_type: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The fp32 midpoints [15] of the ascending code, and the index uint8 [16] that each interval between them gets."""
    ascending, order = code_for(quant_type, device).sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


def dynamic_code(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The 8-bit dynamic map, fp32 [256] ascending (arXiv 1511.04561; in 8-bit optimizers, arXiv 2110.02861).

    Seven decades, i = 0..6, scaled by 10^(i-6): each splits [0.1, 1] into 2^i equal cells, both signs (signed), or
    2^(i+1) cells, positive only (unsigned), and takes the centres of the cells. 0 and 1 are added. So small values
    keep their relative size, and large ones get most of the precision."""
    return _table(_dynamic, torch.device(device), signed)


def dynamic_midpoints(signed: bool, device: torch.device) -> Tensor:
    """float64 [255]: `midpoints` of that map."""
    return _table(_dynamic_midpoints, device, signed)


def midpoints(code: Tensor) -> Tensor:
    """float64 [n - 1]: halfway between neighbours of an ascending fp32 code [n], exactly."""
    wide = code.double()
    return (wide[:-1] + wide[1:]) / 2


def pair_table(quant_type: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[256]: entry b holds the two code values of packed byte b, the first (high nibble's) in the low half.

    Two values rounded to `dtype` make one integer: int64 for fp32, int32 for bf16 and fp16. One look-up so decodes a
    whole byte."""
    return _table(_pairs, torch.device(device), quant_type, dtype)


def _table(make: Callable[..., Tensor], device: torch.device, *arguments: Any) -> Tensor:
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return _kept(make, device, *arguments)
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    with _disable_current_modes():  # a fake table must not be kept, and who listens hears the same each time
        real = _kept(make, torch.device("cpu") if fake else device, *arguments)
    return torch.empty(real.shape, dtype=real.dtype, device=device) if fake else real


@cache
@torch.inference_mode(False)  # a table made in inference mode could not be used for training
def _kept(make: Callable[..., Tensor], device: torch.device, *arguments: Any) -> Tensor:
    return make(*arguments).to(device)


def nf4_code() -> Tensor:
    """NormalFloat-4, fp32 [16], ascending from -1 to 1, an exact 0 at index 7 (QLoRA, arXiv 2305.14314, section 3).

    The values are quantiles of N(0, 1), so that normal weights use all sixteen codes about equally often. The halves
    are built apart, seven values below zero and eight above: an even count has no middle, and zero must be exact."""
    below = -_normal_quantiles(_evenly(NF4_OUTERMOST, 0.5, 7)[:-1])  # the last is 0.5, whose quantile is zero itself
    above = _normal_quantiles(_evenly(NF4_OUTERMOST, 0.5, 8)[:-1])
    values = torch.cat([below, _fp32([0.0]), above]).sort().values
    return values / values[-1]


def _normal_quantiles(probabilities: Tensor) -> Tensor:
    return _fp32([NormalDist().inv_cdf(p) for p in probabilities.tolist()])


def fp4_code() -> Tensor:
    """4-bit floats, fp32 [16]: bit 3 is the sign, bits 2-1 the exponent field e, bit 0 the mantissa m.

    The magnitude is (1 + m/2) * 2^(4 - e) for e = 1, 2, 3 and m/16 for e = 0, all divided by the largest, 12. So the
    codes do not ascend, and index 8 is a second zero, positive like the first."""
    fields = [(code >> 1, code & 1) for code in range(8)]
    magnitudes = [(1 + m / 2) * 2 ** (4 - e) / 12 if e else m / 16 / 12 for e, m in fields]
    return _fp32([*magnitudes, *(-magnitude or 0.0 for magnitude in magnitudes)])


def _dynamic(signed: bool) -> Tensor:
    values = [_fp32([0.0, 1.0])]
    for decade in range(7):
        edges = _evenly(0.1, 1.0, 2**decade if signed else 2 ** (decade + 1))
        centres = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


def _dynamic_midpoints(signed: bool) -> Tensor:
    return midpoints(_dynamic(signed))


def _pairs(quant_type: str, dtype: torch.dtype) -> Tensor:
    byte = torch.arange(256, device="cpu")
    pairs = code_for(quant_type)[torch.stack([byte >> 4, byte & 15], dim=1)].to(dtype)
    return pairs.view({4: torch.int64, 2: torch.int32}[dtype.itemsize]).view(-1)


def _evenly(start: float, end: float, cells: int) -> Tensor:
    """`cells` + 1 edges from start to end in fp32: the step is rounded once, each edge once, from the nearer end.

    torch.linspace means the same, but rounds differently on machines with and without fused multiply-add."""
    first, last = _fp32([start]), _fp32([end])
    step = ((last - first) / cells).double()
    i = torch.arange(cells + 1, device="cpu")
    return torch.where(i < (cells + 1) // 2, first.double() + step * i, last.double() - step * (cells - i)).float()


def _fp32(values: list[float]) -> Tensor:
    """On the CPU, whatever the caller's default dtype and device are: the tables outlive that context."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
