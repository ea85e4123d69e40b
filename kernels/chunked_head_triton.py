"""The figures and the gradient of a chunk of logits on a GPU, in place and in the logits' own dtype, in one launch.

A program takes a row, reads it for the figures, and again for the gradient, which it writes over it. As many rows are
in work as there are multiprocessors, 34 MB of 16-bit logits at a vocabulary of 128k: the second read is of an L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 8192  # columns at a time, eight a thread: one 16-byte load of 16-bit logits
FLOOR = tl.constexpr(-3.0e38)  # stands for -inf, a banned token's, so that no difference is inf - inf


def token_scores(logits: Tensor, target: Tensor, gradient: bool) -> tuple[Tensor, ...]:
    """As TokenScorer's call, for rows of stride-1 columns and int64 targets [n, 1]."""
    at_target = logits.gather(1, target)  # its assertion on the device refuses targets out of range
    rows, columns = logits.shape
    found = logits.new_empty(3, rows, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(columns))
    launch(token_scores_kernel, (rows,))(
        *(logits, logits, at_target, target.contiguous(), found, rows, columns, logits.stride(0)),
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return found[0], found[1], found[2] == 0


@triton.jit
def token_scores_kernel(
    logits_ptr, gradient_ptr, at_target_ptr, target_ptr, found_ptr, rows, columns, stride,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's log-probability, entropy and distance below the largest logit; gradient_ptr is logits_ptr."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), FLOOR, tl.float32)  # of a thread's own columns; sums of e^z and e^z z, z = x - top:
    total, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + i < columns
        x = tl.load(logits_ptr + row * stride + start + i, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        higher = tl.maximum(top, x)
        fall, z = tl.maximum(top - higher, FLOOR), tl.maximum(x - higher, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        shrink, e = tl.exp(fall), tl.where(inside, tl.exp(z), 0.0)
        weighted = shrink * (weighted + total * fall) + e * z
        total = shrink * total + e
        top = higher
    highest = tl.max(top)
    fall, shrink = tl.maximum(top - highest, FLOOR), tl.exp(tl.maximum(top - highest, FLOOR))
    weighted_sum, total_sum = tl.sum(shrink * (weighted + total * fall)), tl.sum(shrink * total)
    below = tl.load(at_target_ptr + row).to(tl.float32) - highest
    log_total = tl.log(total_sum)
    tl.store(found_ptr + row, below - log_total)
    tl.store(found_ptr + rows + row, log_total - weighted_sum / total_sum)
    tl.store(found_ptr + 2 * rows + row, below + 0.0 * total_sum)  # NaN is no likeliest token
    if GRADIENT:
        target = tl.load(target_ptr + row)
        for start in range(0, columns, BLOCK):
            place = row * stride + start + i
            x = tl.load(logits_ptr + place, mask=start + i < columns, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - highest) / total_sum
            slope = tl.where(start + i == target, 1.0, 0.0) - p
            tl.store(gradient_ptr + place, slope.to(gradient_ptr.dtype.element_ty), mask=start + i < columns)
