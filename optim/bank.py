"""Which parameter's state lies where: members of a bank share one layout and one storage, banks of a device a pool.

A parameter joins at the first step that it has a gradient for; until then it costs nothing, as in torch.optim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout, blocks
from .rules import Rule
from .states import Storage, fields

Group = dict[str, Any]  # a parameter group of torch.optim
MakeStorage = Callable[..., Storage]  # (fields, device) -> Storage
Joining = tuple[nn.Parameter, int, int, int]  # a parameter, its number, its group, and the bits of its state


@dataclass(eq=False)
class Member:
    """One parameter whose state is kept."""

    parameter: nn.Parameter
    number: int  # among all parameters of the optimizer, as in state dicts
    group: int
    row: int  # in the pool's step counts
    index: int  # in the bank's layout
    strides: tuple[int, ...]  # dense: the order of its elements in the flat state
    gradient: Tensor | None = None  # while a step runs, what it goes by

    def __post_init__(self) -> None:
        self.shape, self.dtype = self.parameter.shape, self.parameter.dtype
        self.is_contiguous = self.strides == _contiguous(self.parameter)

    def flat(self, tensor: Tensor) -> Tensor | None:
        """`tensor` (shaped like the parameter) as [n] in the order of the state, without a copy; None if impossible."""
        if tensor.stride() != self.strides and not (self.is_contiguous and tensor.is_contiguous()):
            return None
        return tensor.detach().as_strided((tensor.numel(),), (1,))

    def flattened(self, tensor: Tensor) -> Tensor:
        """`flat`, or a copy in that order where there is no such view."""
        flat = self.flat(tensor)
        if flat is None:
            flat = tensor.new_empty(tensor.numel())
            self.shaped(flat).copy_(tensor.detach())
        return flat

    def shaped(self, flat: Tensor) -> Tensor:
        """The parameter-shaped view of [>= n] values in the order of the state."""
        return flat.as_strided(self.shape, self.strides)


class Bank:
    """Parameters of one group, one dtype and one width of state."""

    def __init__(self, group: int, dtype: torch.dtype, bits: int, rule: Rule, storage: Storage) -> None:
        self.group, self.dtype, self.bits, self.rule, self.storage = group, dtype, bits, rule, storage
        self.layout = Layout()
        self.members: list[Member] = []
        self.spans: list[tuple[int, int]] = []  # of the members, in the flat state
        self.plans: dict[object, Any] = {}  # what a path worked out for this layout; emptied when it changes

    def add(self, parameter: nn.Parameter, number: int, row: int) -> Member:
        """The member that `parameter` becomes. The storage has room for its state already."""
        like = torch.empty_like(parameter, device="meta")  # dense, in the parameter's own order
        strides = like.stride() if self.bits == 32 else _contiguous(parameter)
        member = Member(parameter, number, self.group, row, self.layout.add(parameter.numel()), strides)
        self.members.append(member)
        self.spans.append(self.layout.span(member.index))
        return member

    def wanted(self) -> list[tuple[int, int]]:
        """The spans of the flat state that this step needs: those of parameters that have a gradient.

        One is enough for a resident storage, which gives everything or nothing.
        """
        pairs = zip(self.spans, self.members, strict=True)
        found = (span for span, member in pairs if member.gradient is not None and span[0] < span[1])
        return list(islice(found, 1 if self.storage.resident else None))

    def states(self) -> list[dict[str, Tensor]]:
        """Each member's state by name, moments shaped like it: views where the storage is resident."""
        found = [dict(tensors) for tensors in self.storage.read(self.spans)]
        for member, tensors in zip(self.members, found, strict=True):
            for moment in self.rule.moments:
                tensors[moment.name] = member.shaped(tensors[moment.name])
        return found

    def load(self, member: Member, state: dict[str, Tensor]) -> None:
        """Overwrite a member's state with what `states` gave, on any device and of any float dtype."""
        start, end = self.spans[member.index]
        kept = fields(self.rule.moments, self.bits, self.dtype)
        for name, field in kept.items():
            values = state[name]
            flat = torch.zeros((end - start) // field.per, dtype=field.dtype, device=values.device)
            target = member.shaped(flat) if field.per == 1 else flat
            target.copy_(values)
            self.storage.write(start, {name: flat})


class Pool:
    """Everything kept on one device: step counts, and the banks by (group, dtype, bits)."""

    def __init__(self, device: torch.device, rule: Rule, make_storage: MakeStorage) -> None:
        self.device, self.rule, self.make_storage = device, rule, make_storage
        self.members: list[Member] = []
        self.banks: dict[tuple[int, torch.dtype, int], Bank] = {}
        self.steps = torch.zeros(0, dtype=torch.float32, device=device)  # of each member, as torch.optim counts them
        self.plans: dict[object, Any] = {}
        self.captured = False  # a step, in a CUDA graph: what it reads and writes must stay where it is

    def add(self, parameters: list[Joining]) -> None:
        """Make members of them, with zero state and no steps taken. Memory that runs out leaves all as it was."""
        totals: dict[Bank, int] = {}
        for parameter, _, group, bits in parameters:
            bank = self._bank(group, parameter.dtype, bits)
            totals[bank] = totals.get(bank, bank.layout.total) + blocks(parameter.numel())
        for bank, total in totals.items():
            bank.storage.grow(total)
            bank.plans.clear()
        self.steps = torch.cat([self.steps, self.steps.new_zeros(len(parameters))])
        self.plans.clear()
        for parameter, number, group, bits in parameters:
            member = self._bank(group, parameter.dtype, bits).add(parameter, number, len(self.members))
            self.members.append(member)

    def _bank(self, *key: *tuple[int, torch.dtype, int]) -> Bank:
        if key not in self.banks:
            kept = fields(self.rule.moments, key[2], key[1])
            self.banks[key] = Bank(*key, self.rule, self.make_storage(kept, self.device))
        return self.banks[key]

    def begin(self) -> None:
        """Take up all gradients for a step. ValueError for what is not as it was when its parameter joined.

        Kernels read and write by address alone, as much as there was then.
        """
        device, strided = self.device, torch.strided
        for m in self.members:
            p = m.parameter
            m.gradient = g = p.grad
            if g is not None and (
                p.shape != m.shape
                or p.dtype is not m.dtype
                or p.device != device
                or g.shape != m.shape
                or g.dtype is not m.dtype
                or g.layout is not strided
            ):
                check_gradient(p)
                raise ValueError(
                    f"parameter {m.number} was {_kind(m.shape, m.dtype, device)} when its state was made, and now is "
                    f"{_kind(p.shape, p.dtype, p.device)}; for another dtype or device call "
                    "optimizer.load_state_dict(optimizer.state_dict()), for another shape make a new optimizer"
                )

    def end(self) -> None:
        """Let go of the gradients."""
        for member in self.members:
            member.gradient = None


def check_gradient(p: Tensor) -> None:
    """ValueError if a parameter's gradient is not one that a step can read."""
    g = p.grad
    if g is not None and (g.dtype != p.dtype or g.layout != torch.strided or g.shape != p.shape):
        raise ValueError(
            f"gradients must be dense and of their parameter's dtype and shape, {_kind(p.shape, p.dtype)}, "
            f"got {_kind(g.shape, g.dtype)} ({g.layout})"
        )


def _kind(shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None) -> str:
    return f"{dtype} {list(shape)}" + ("" if device is None else f" on {device}")


def _contiguous(parameter: Tensor) -> tuple[int, ...]:
    return torch.empty(parameter.shape, device="meta").stride()
