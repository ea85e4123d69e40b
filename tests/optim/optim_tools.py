"""Parameters with gradients, drawn from a seed; steps; comparisons."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fourbit.kernels.dispatch import force_path
from fourbit.optim import AdamW, Lion

AdamW8bit, Lion8bit = partial(AdamW, bits=8), partial(Lion, bits=8)
PATHS = ["cpu", "reference", "triton"]


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, path: str = "cpu"
) -> list[nn.Parameter]:
    """Normal weights; equal for equal shapes, whatever the dtype but for its rounding. Kernels get them on a GPU."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if path == "triton" and torch.cuda.is_available() else "cpu"
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in shapes]


def give_gradients(*lists: Sequence[nn.Parameter], seed: int, missing: Sequence[int] = ()) -> None:
    """Corresponding parameters get equal gradients, up to their dtype's rounding; those at `missing` none."""
    generator = torch.Generator().manual_seed(seed)
    for i, same in enumerate(zip(*lists, strict=True)):
        gradient = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
        for p in same:
            p.grad = None if i in missing else gradient.to(p.device, p.dtype)


def step(optimizer: torch.optim.Optimizer, path: str) -> None:
    with force_path(path):
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer, ps: Sequence[nn.Parameter]) -> Any:
    """Copies of weights and state."""
    return copy.deepcopy(([p.detach() for p in ps], optimizer.state_dict()))


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of theirs, all tensors as one vector, in float64."""
    a, b = (torch.cat([t.detach().cpu().double().reshape(-1) for t in tensors]) for tensors in (ours, theirs))
    return float((a - b).norm() / b.norm())


def assert_equal(ours: Any, theirs: Any) -> None:
    """Two nested states or lists of tensors, bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(*(t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (ours, theirs)))
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs
