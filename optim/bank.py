"""Which parameter's state lies where: members of a bank share one layout and one storage, banks of a device a pool.

A parameter joins at the first step that it has a gradient for; until then it costs nothing, as in torch.optim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout
from .rules import Rule
from .states import Storage, fields

Group = dict[str, Any]  # a parameter group of torch.optim
MakeStorage = Callable[..., Storage]  # (fields, device) -> Storage


@dataclass(eq=False)
class Member:
    """One parameter whose state is kept."""

    parameter: nn.Parameter
    number: int  # among all parameters of the optimizer, as in state dicts
    group: int
    row: int  # in the pool's step counts
    index: int  # in the bank's layout
    strides: tuple[int, ...]  # dense: the order of its elements in the flat state

    @property
    def gradient(self) -> Tensor | None:
        return self.parameter.grad

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
        return flat.as_strided(self.parameter.shape, self.strides)

    @property
    def is_contiguous(self) -> bool:
        return self.strides == _contiguous(self.parameter)


class Bank:
    """Parameters of one group, one dtype and one width of state."""

    def __init__(self, group: int, dtype: torch.dtype, bits: int, rule: Rule, storage: Storage) -> None:
        self.group, self.dtype, self.bits, self.rule, self.storage = group, dtype, bits, rule, storage
        self.layout = Layout()
        self.members: list[Member] = []
        self.plans: dict[object, Any] = {}  # what a path worked out for this layout; emptied when it changes

    def add(self, parameter: nn.Parameter, number: int, row: int) -> Member:
        """The member that `parameter` becomes; its state is there after `grow`."""
        like = torch.empty_like(parameter, device="meta")  # dense, in the parameter's own order
        strides = like.stride() if self.bits == 32 else _contiguous(parameter)
        member = Member(parameter, number, self.group, row, self.layout.add(parameter.numel()), strides)
        self.members.append(member)
        return member

    def grow(self) -> None:
        self.storage.grow(self.layout.total)
        self.plans.clear()

    def wanted(self) -> list[tuple[int, int]]:
        """The spans of the flat state that this step needs: those of parameters that have a gradient."""
        return [
            self.layout.span(m.index)
            for m in self.members
            if m.parameter.grad is not None and self.layout.sizes[m.index]
        ]

    def state(self, member: Member) -> dict[str, Tensor]:
        """A member's state by name, moments shaped like it: views where the storage is resident."""
        start, end = self.layout.span(member.index)
        tensors = dict(self.storage.read(start, end))
        for moment in self.rule.moments:
            tensors[moment.name] = member.shaped(tensors[moment.name])
        return tensors

    def load(self, member: Member, state: dict[str, Tensor]) -> None:
        """Overwrite a member's state with what `state` gave, on any device and of any float dtype."""
        start, end = self.layout.span(member.index)
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

    def add(self, parameters: list[tuple[nn.Parameter, int, int, int]]) -> list[tuple[Bank, Member]]:
        """Members for (parameter, number, group, bits) each, with zero state and no steps taken."""
        added = []
        for parameter, number, group, bits in parameters:
            key = (group, parameter.dtype, bits)
            if key not in self.banks:
                kept = fields(self.rule.moments, bits, parameter.dtype)
                self.banks[key] = Bank(*key, self.rule, self.make_storage(kept, self.device))
            member = self.banks[key].add(parameter, number, len(self.members))
            self.members.append(member)
            added.append((self.banks[key], member))
        for bank in {id(bank): bank for bank, _ in added}.values():
            bank.grow()
        self.steps = torch.cat([self.steps, self.steps.new_zeros(len(added))])
        self.plans.clear()
        return added


def _contiguous(parameter: Tensor) -> tuple[int, ...]:
    return torch.empty(parameter.shape, device="meta").stride()
