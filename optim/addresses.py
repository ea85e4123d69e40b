"""The table by which kernels find parameters and gradients, and what CUDA graphs ask of it.

A graph that captured a step repeats the copy of the addresses that it was captured with: out of memory of the host that
nobody may write to again, and whatever other steps have put into the table meanwhile. So a step under capture always
copies, and from memory that was there before (pinning some is not allowed then); and once there is a graph, the host
does not know what the table holds, and every step copies.
"""

import numpy as np
import torch
from torch import Tensor

from .bank import Member, Pool


class Addresses:
    """int64 [members, 2] on the device: of the parameter, and of the gradient, 0 without one."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.table = torch.empty(len(pool.members), 2, dtype=torch.int64, device=pool.device)
        self._known: list[int] | None = None  # what the table holds
        self._spare: Tensor | None = None  # for the next capture
        self._captured: list[Tensor] = []  # which graphs copy from

    def update(self) -> tuple[list[tuple[Member, Tensor]], list[Tensor]]:
        """Bring the table up to date; returns the copies that it refers to: of parameters, of gradients."""
        found: list[int] = []
        weights: list[tuple[Member, Tensor]] = []
        gradients: list[Tensor] = []
        for member in self.pool.members:
            p: Tensor = member.parameter
            g = member.gradient
            if g is None:
                found += (0, 0)
                continue
            if not member.is_contiguous or not p.is_contiguous() or not g.is_contiguous():
                p, g = _laid_out(member, g, weights, gradients)
            found.append(p.data_ptr())
            found.append(g.data_ptr() or 16)  # empty tensors have no address, but a gradient
        if is_capturing(self.pool.device):
            self._capture(found)
        elif self._captured or found != self._known:
            self.table.copy_(self._on_host(found), non_blocking=True)  # not reused before it has been read
            self._known = found
        if self._spare is None and not is_capturing(self.pool.device):
            self._spare = self._on_host(found)
        return weights, gradients

    def _capture(self, found: list[int]) -> None:
        if self._spare is None:
            raise RuntimeError("take one step of the optimizer outside of a CUDA graph before each that is captured")
        self._spare.copy_(torch.from_numpy(np.array(found, np.int64)).view(-1, 2))
        self.table.copy_(self._spare, non_blocking=True)
        self._captured.append(self._spare)
        self._spare = None

    def _on_host(self, found: list[int]) -> Tensor:
        values = torch.from_numpy(np.array(found, np.int64)).view(-1, 2)
        return values.pin_memory() if self.pool.device.type == "cuda" else values


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued now is captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _laid_out(
    member: Member, gradient: Tensor, weights: list[tuple[Member, Tensor]], gradients: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient in the order of the state; copies, where that is needed, are added to the lists."""
    p, g = member.flat(member.parameter), member.flat(gradient)
    if p is None:
        p = member.flattened(member.parameter)
        weights.append((member, p))
    if g is None:
        g = member.flattened(gradient)
        gradients.append(g)
    return p, g
