"""Products with a split K: few tiles do not fill a GPU, so several programs share one.

Every program writes its partial sum to a workspace; the last of a tile to arrive, known by an integer counter, adds
them all in one fixed order. Results repeat to the bit, in one launch and without floating-point atomics.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

FILL = 4  # steps' worth of time that a program takes to fill its pipeline and to end
COUNTERS = 1 << 18  # of a device; a launch takes some hundred
ADDING = 0.25  # the same for one more partial sum to add

_of_device: dict[torch.device, Tensor] = {}
_taken: dict[torch.device, int] = {}  # how many of each device's counters are somebody's


@cache
def splits_for(tiles: int, steps: int, slots: int) -> int:
    """Parts of K for `tiles` tiles of `steps` steps each, where `slots` programs run at a time; none is empty.

    Programs run in waves, and the last wave takes as long as the others however few are in it.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(tiles * splits, slots) * (triton.cdiv(steps, splits) + FILL) + ADDING * splits

    best = min(range(1, max(2, min(steps, 2 * slots))), key=cost)
    return int(triton.cdiv(steps, triton.cdiv(steps, best)))


def counters(device: torch.device, tiles: int) -> Tensor:
    """int32 zeros, at least one a tile. Kernels leave them zero, so launches on one stream share them.

    A launch that is captured in a CUDA graph gets counters of its own for good: the graph may run on any stream later.
    """
    if device.type != "cuda":
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _take(device, tiles)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _of_stream(device, stream, triton.next_power_of_2(tiles))


@cache
def _of_stream(device: torch.device, stream: int, tiles: int) -> Tensor:
    return _take(device, tiles)


def _take(device: torch.device, tiles: int) -> Tensor:
    """Counters that nobody else gets: a slice of the device's, or fresh zeros where there are none left.

    What a capture allocates is the graph's and holds nothing before it runs: the device's are not made inside one.
    """
    start = _taken.get(device, 0)
    end = start + triton.cdiv(tiles, 4) * 4  # 16 bytes: pointers of one alignment, so kernels compile once
    none = device not in _of_device and torch.cuda.is_current_stream_capturing()
    if none or end > COUNTERS:
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    _taken[device] = end
    return counters_of_device(device)[start:end]


@torch.inference_mode(False)
def counters_of_device(device: torch.device) -> Tensor:
    """The device's counters, made once."""
    if device not in _of_device:
        _of_device[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _of_device[device]


@triton.jit
def is_last(sums_at, total, inside, counter, splits):
    """Writes this program's sum where the last one will find it; True in that last one, which resets the counter."""
    tl.store(sums_at, total, mask=inside)
    tl.debug_barrier()  # all threads have written before one of them says so
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        tl.store(counter, 0)
    return arrived == splits - 1


@triton.jit
def sum_of_splits(sums_at, inside, size, splits):
    """The sum over splits in one order, whoever came last: its own part is read back like the others."""
    total = tl.load(sums_at, mask=inside, other=0.0, cache_modifier=".cg")
    for split in range(1, splits):
        total += tl.load(sums_at + split * size, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def finish(y_at, total, bias_ptr, n, N, inside):
    """Stores the sum, plus bias, rounded once."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_at, total.to(y_at.dtype.element_ty), mask=inside)
