"""Examples into tensors: padded rows, or one packed row without padding, and how a step is split into forward passes.

A step is always the same examples; packing and micro-batches change the layout only. Targets are shifted here, once, so
that nothing later can shift them across the border between two packed examples.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .encode import Encoded

IGNORE = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One forward pass. `spans`: (start, end) of each packed example in the flattened tokens, or None when padded."""

    input_ids: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, the next token where it is trained, else -100
    position_ids: Tensor  # [B, T] int64, from 0 in every example
    spans: tuple[tuple[int, int], ...] | None
    tokens: int  # without padding
    trained: int  # targets that count

    @property
    def weight(self) -> int:
        """What a loss summed over this batch is a sum over."""
        return self.trained

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`. The host does not wait for a GPU."""
        ids, targets, positions = (sent(t, device) for t in (self.input_ids, self.targets, self.position_ids))
        return replace(self, input_ids=ids, targets=targets, position_ids=positions)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`; to a GPU through pinned memory, for a copy from other memory waits for all its work."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def shifted_targets(example: Encoded) -> list[int]:
    """For each token the id to predict after it, -100 where that is not trained; always -100 at the last token."""
    following = zip(example.ids[1:], example.trained[1:], strict=True)
    return [token if trained else IGNORE for token, trained in following] + [IGNORE]


def pad_batch(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """One row an example, padded on the right to the longest: [B, longest]."""
    _check(examples)
    longest = max(len(example.ids) for example in examples)
    rows = [(example, longest - len(example.ids)) for example in examples]
    return Batch(
        input_ids=torch.tensor([example.ids + [pad_id] * room for example, room in rows]),
        targets=(targets := torch.tensor([shifted_targets(example) + [IGNORE] * room for example, room in rows])),
        position_ids=torch.arange(longest).expand(len(rows), -1).contiguous(),
        spans=None,
        tokens=sum(len(example.ids) for example in examples),
        trained=int((targets != IGNORE).sum()),
    )


def pack_batch(examples: Sequence[Encoded]) -> Batch:
    """All examples end to end in one row [1, total] without padding; positions start again at 0 in each."""
    _check(examples)
    ids = [token for example in examples for token in example.ids]
    targets = torch.tensor([[target for example in examples for target in shifted_targets(example)]])
    positions = [torch.arange(len(example.ids)) for example in examples]
    ends = torch.tensor([len(example.ids) for example in examples]).cumsum(0).tolist()
    return Batch(
        input_ids=torch.tensor([ids]),
        targets=targets,
        position_ids=torch.cat(positions).unsqueeze(0),
        spans=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        tokens=len(ids),
        trained=int((targets != IGNORE).sum()),
    )


def _check(examples: Sequence[Encoded]) -> None:
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    if any(not example.ids for example in examples):
        raise ValueError("a batch cannot hold an example without tokens")


def micro_batches(
    examples: Sequence[Encoded],
    *,
    packing: bool,
    micro_batch: int | Literal["auto"],
    token_budget: int,
    pad_id: int,
) -> list[Batch]:
    """One step's examples, each exactly once, split into forward passes.

    `micro_batch` is a number of examples each, or "auto": as few passes as best-fit-decreasing finds within
    `token_budget` tokens a pass (padding counted unless packed; an example longer than the budget goes alone).
    """
    _check(examples)
    groups = split_groups(
        examples, [len(e.ids) for e in examples], packing=packing, micro_batch=micro_batch, token_budget=token_budget
    )
    return [pack_batch(group) if packing else pad_batch(group, pad_id) for group in groups]


def split_groups(
    items: Sequence[T],
    sizes: Sequence[int],
    *,
    packing: bool,
    micro_batch: int | Literal["auto"],
    token_budget: int,
) -> list[list[T]]:
    """Items of these sizes (in tokens; longest first from here on) into the groups that `micro_batches` speaks of."""
    order = sorted(range(len(items)), key=sizes.__getitem__, reverse=True)
    if micro_batch == "auto":
        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, not {token_budget}")
        groups = (_packed_groups if packing else _padded_groups)(order, sizes, token_budget)
    elif micro_batch >= 1:
        groups = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    else:
        raise ValueError(f'micro_batch must be "auto" or at least 1, not {micro_batch}')
    return [[items[i] for i in group] for group in groups]


def _packed_groups(order: Sequence[int], sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Best-fit-decreasing: put each example, longest first, where it leaves the least room."""
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for i in order:
        k = bisect_left(rooms, (sizes[i], 0))
        if k < len(rooms):
            room, group = rooms.pop(k)
            groups[group].append(i)
        else:
            room, group = token_budget, len(groups)
            groups.append([i])
        insort(rooms, (room - sizes[i], group))
    return groups


def _padded_groups(order: Sequence[int], sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """For padded rows, where each example costs as much as the longest: neighbours in length go together."""
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * sizes[groups[-1][0]] <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
