"""Which trained tensors have not moved after some steps, from a checksum of each: no copy of the weights.

A checksum is the sum of a tensor's bits, each element's times an odd number drawn for its place, modulo 2^64: values
that move against each other do not cancel, and one that moved alone always shows.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .update import NARROW

REASONS = (
    "their learning rate is 0, no gradient reaches them, or updates are rounded away, too small for their dtype: in 16 "
    "bits use rounding stochastic, in float32 a higher lr"
)
SHOWN = 3  # names in a notice
PIECE = 1 << 20  # elements at a time: 8 MB of random numbers
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _factors(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**62), 2**62, (PIECE,), generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * drawn + 1).to(device)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Of a tensor of 16, 32 or 64 bits an element: 0-d int64 on its device."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total, factors = torch.zeros((), dtype=torch.int64, device=tensor.device), _factors(tensor.device)
    for piece in bits.split(PIECE):
        total = total * 3 + (piece * factors[: len(piece)]).sum()
    return total


def unmoved(
    parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[str]:
    """Names of the parameters whose checksums are those of `before`, after a step of the optimizer whose gradients are
    still there. Stochastic rounding freezes nothing: a few small steps may move a small tensor or not."""
    now = {name: checksum(p) for name, p in parameters.items() if p.numel()}
    moved = (torch.stack([*now.values()]) != torch.stack([before[name] for name in now])).tolist()  # one wait
    same = [name for name, has in zip(now, moved, strict=True) if not has]
    drawn = NARROW if getattr(optimizer, "rounding", "") == "stochastic" else ()
    learning = {id(p) for g in optimizer.param_groups if g["lr"] > 0 for p in g["params"] if p.dtype in drawn}
    lucky = {n for n in same if id(p := parameters[n]) in learning and p.grad is not None and bool(p.grad.any())}
    return [name for name in same if name not in lucky]


def notice(found: Sequence[str], trained: int, steps: int) -> str:
    """One line about what `unmoved` found among so many trained tensors, after so many steps."""
    more = f" and {len(found) - SHOWN} more" * (len(found) > SHOWN)
    what = f"{len(found)} of {trained} trained tensors did not move in {steps} steps: {', '.join(found[:SHOWN])}{more}"
    return f"note: {what}; {REASONS}"
