"""Which trained tensors have not moved after some steps, and why, from a checksum of each: no copy of the weights.

A checksum is the sum of a tensor's bits, each element's times an odd number drawn for its place, modulo 2^64: values
that move against each other do not cancel, and one that moved alone always shows.
"""

from collections.abc import Mapping
from functools import cache
from itertools import groupby

import torch
from torch import Tensor, nn

from .update import NARROW

REASONS = {
    "rate": "their learning rate is 0",
    "no gradient": "no gradient reached them: no row used that part of the model, or it is cut off from the loss",
    "zero gradient": "their gradient is 0",
    "rounding": "updates are rounded away, too small for their dtype; in 16 bits use rounding stochastic, in float32 a "
    "higher lr",
}
SHOWN = 3  # names of each reason in a notice
PIECE = 1 << 20  # elements at a time: 8 MB of random numbers
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _factors(device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**62), 2**62, (PIECE,), generator=torch.Generator().manual_seed(0))
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
) -> dict[str, str]:
    """Name -> the key in REASONS, of the parameters whose checksums are those of `before`, after a step of the
    optimizer whose gradients are still there. Stochastic rounding freezes nothing: a few small steps may move a small
    tensor or not."""
    now = {name: checksum(p) for name, p in parameters.items()}
    moved = (torch.stack([*now.values()]) != torch.stack([before[name] for name in now])).tolist()  # one wait
    same = {name: p for (name, p), has in zip(parameters.items(), moved, strict=True) if p.numel() and not has}
    learning = {id(p) for group in optimizer.param_groups if group["lr"] > 0 for p in group["params"]}
    found = {name: _reason(p, id(p) in learning) for name, p in same.items()}
    drawn = NARROW if getattr(optimizer, "rounding", "") == "stochastic" else ()
    return {name: reason for name, reason in found.items() if reason != "rounding" or same[name].dtype not in drawn}


def _reason(parameter: nn.Parameter, learns: bool) -> str:
    if not learns:
        return "rate"
    if parameter.grad is None:
        return "no gradient"
    return "rounding" if bool(parameter.grad.any()) else "zero gradient"


def notice(found: Mapping[str, str], trained: int, steps: int) -> str:
    """One line about what `unmoved` found among so many trained tensors, after so many steps."""
    parts = []
    for reason, group in groupby(sorted(found, key=found.__getitem__), key=found.__getitem__):
        names = list(group)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{REASONS[reason]} ({', '.join(names[:SHOWN])}{more})")
    return f"note: {len(found)} of {trained} trained tensors did not move in {steps} steps: {'; '.join(parts)}"
