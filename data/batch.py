"""Examples into tensors: packed in one row without padding, or padded rows; how a step is split into forward passes.

A step is always the same examples; packing and micro-batches change the layout only. Targets are shifted here, once, so
that nothing later can shift them across the border between two packed examples. A packed row runs what the answers of a
preference have in common once: the trunk, then a branch for each answer (see `kernels.attention`). A hidden state of
the trunk serves every answer, and where it predicts another next token for each, it stands in `rows` once for each.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

IGNORE = -100
MicroBatch = int | Literal["auto"]
Span = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, for each whether the loss counts it, the text they stand for, and `file:line`."""

    ids: list[int]
    trained: list[bool]
    text: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple["Encoded", ...]:
        """The token sequences of this example: itself."""
        return (self,)

    def content(self) -> list[list[int]]:
        """All that training sees, as JSON."""
        return [self.ids, [int(trained) for trained in self.trained]]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt of which the first is preferred, or one that is judged; each with its prompt before it.

    The first `shared` tokens of two answers are the same; at least one token of each is not shared, so a model that
    runs shared tokens once still has two branches.
    """

    parts: tuple[Encoded, ...]
    shared: int = 0
    label: bool | None = None  # of one answer: whether it is a good one

    @property
    def source(self) -> str:
        """`file:line`."""
        return self.parts[0].source

    def content(self) -> list[object]:
        """All that training sees, as JSON."""
        return [part.content() for part in self.parts] + ([] if self.label is None else [self.label])


Numbered = tuple[int, Preference]  # with its place in the dataset


class _Tensors:
    """What a batch of tensors can do."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`. The host does not wait for a GPU."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved: dict[str, Any] = {name: sent(x, device) for name, x in named.items() if isinstance(x, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Batch(_Tensors):
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


@dataclass(frozen=True)
class AnswerBatch(_Tensors):
    """One forward pass over P examples of A answers each (2: chosen, rejected; 1: judged), L trained tokens at most.

    `slots` says which prediction belongs to which answer, so what follows never sees how the answers were laid out.
    """

    input_ids: Tensor  # [B, T] int64; packed [1, T], padded [A * P, T] with answer a of example p in row a * P + p
    position_ids: Tensor  # [B, T] int64; a branch goes on from the end of its trunk
    spans: tuple[Span, ...] | None  # packed: (start, fork, end_1, ..., end_A) of each example, or (start, end); or None
    rows: Tensor  # [R] int64: flattened places whose hidden state predicts a trained token
    targets: Tensor  # [R] int64: the token each of them predicts
    slots: Tensor  # [A, P, L] int64: which of the R is trained token l of answer a of example p; R where it has fewer
    lengths: Tensor  # [A, P] int64: trained tokens of each answer
    last: Tensor  # [A, P] int64: flattened place of each answer's last trained token, its end of turn
    labels: Tensor | None  # [P] bool: judged good; None of pairs
    numbers: tuple[int, ...]  # the examples' places in the dataset
    tokens: int  # run through the model, without padding
    trained: int  # R: predictions; what a packed row shares counts once
    examples: int  # P

    @property
    def weight(self) -> int:
        """What a loss summed over this batch is a sum over."""
        return self.examples


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
    examples: Sequence[Encoded], *, packing: bool, micro_batch: MicroBatch, token_budget: int, pad_id: int
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
    items: Sequence[T], sizes: Sequence[int], *, packing: bool, micro_batch: MicroBatch, token_budget: int
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


def answer_batches(
    examples: Sequence[Numbered], *, packing: bool, micro_batch: MicroBatch, token_budget: int, pad_id: int
) -> list[AnswerBatch]:
    """One step's examples (their numbers in the dataset beside them), each exactly once, split into forward passes.

    `micro_batch` is a number of examples each, or "auto": as few passes as best-fit-decreasing finds within
    `token_budget` tokens a pass. An example counts what it takes: packed its trunk once and its branches, padded A rows
    of the longest. One larger than the budget goes alone.
    """
    _check_answers(examples)
    groups = split_groups(
        examples,
        [packed_size(example) if packing else padded_size(example) for _, example in examples],
        packing=packing,
        micro_batch=micro_batch,
        token_budget=token_budget,
    )
    return [pack_answers(group) if packing else pad_answers(group, pad_id) for group in groups]


def packed_size(example: Preference) -> int:
    """Tokens an example takes in a packed row: the trunk once, then each branch."""
    return sum(len(part.ids) for part in example.parts) - example.shared * (len(example.parts) - 1)


def padded_size(example: Preference) -> int:
    """Tokens an example takes in padded rows of its own."""
    return len(example.parts) * max(len(part.ids) for part in example.parts)


def pack_answers(examples: Sequence[Numbered]) -> AnswerBatch:
    """All examples end to end in one row without padding, each with its trunk once."""
    _check_answers(examples)
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    places = []  # of each example, of each of its answers: where its tokens stand
    for _, example in examples:
        start, fork, parts = len(ids), example.shared, example.parts
        ids += parts[0].ids[:fork]
        positions += range(fork)
        for part in parts:
            ids += part.ids[fork:]
            positions += range(fork, len(part.ids))
        ends = list(accumulate((len(part.ids) - fork for part in parts), initial=start + fork))
        spans.append((start, *ends) if len(parts) > 1 else (start, ends[-1]))
        branches = [range(a, b) for a, b in pairwise(ends)]
        places.append([[*range(start, start + fork), *branch] for branch in branches])
    return _batch(examples, places, torch.tensor([ids]), torch.tensor([positions]), tuple(spans), len(ids))


def pad_answers(examples: Sequence[Numbered], pad_id: int) -> AnswerBatch:
    """Every answer in a row of its own with its prompt, padded on the right: first all first answers, then the rest."""
    _check_answers(examples)
    answers = list(zip(*(example.parts for _, example in examples), strict=True))  # [A][P]
    flat = [part for row in answers for part in row]
    width = max(len(part.ids) for part in flat)
    ids = torch.tensor([part.ids + [pad_id] * (width - len(part.ids)) for part in flat])
    places = [
        [range((a * len(examples) + p) * width, (a * len(examples) + p + 1) * width) for a in range(len(answers))]
        for p in range(len(examples))
    ]
    positions = torch.arange(width).expand(len(flat), -1).contiguous()
    return _batch(examples, places, ids, positions, None, sum(len(part.ids) for part in flat))


def _batch(
    examples: Sequence[Numbered],
    places: Sequence[Sequence[Sequence[int]]],
    ids: Tensor,
    positions: Tensor,
    spans: tuple[Span, ...] | None,
    tokens: int,
) -> AnswerBatch:
    """The predictions of a layout: `places[p][a][i]` is where token i of answer a of example p stands."""
    made: dict[tuple[int, int], int] = {}  # (place, target) -> its number among the R
    slots, last = [], []
    for (_, example), where in zip(examples, places, strict=True):
        predicted = [
            [made.setdefault((at[i - 1], part.ids[i]), len(made)) for i in range(1, len(part.ids)) if part.trained[i]]
            for part, at in zip(example.parts, where, strict=True)
        ]
        slots.append(predicted)
        last.append([at[_last_trained(part)] for part, at in zip(example.parts, where, strict=True)])
    lengths = torch.tensor([[len(answer) for answer in predicted] for predicted in slots]).T  # [A, P]
    longest, none = int(lengths.max()), len(made)
    filled = [[answer + [none] * (longest - len(answer)) for answer in predicted] for predicted in slots]  # [P][A][L]
    rows, targets = torch.tensor(list(made)).T
    labels = [example.label for _, example in examples]
    return AnswerBatch(
        input_ids=ids,
        position_ids=positions,
        spans=spans,
        rows=rows.contiguous(),
        targets=targets.contiguous(),
        slots=torch.tensor(filled).transpose(0, 1).contiguous(),
        lengths=lengths.contiguous(),
        last=torch.tensor(last).T.contiguous(),
        labels=torch.tensor(labels) if None not in labels else None,
        numbers=tuple(number for number, _ in examples),
        tokens=tokens,
        trained=len(made),
        examples=len(examples),
    )


def _last_trained(part: Encoded) -> int:
    return max(i for i, trained in enumerate(part.trained) if trained)


def _check_answers(examples: Sequence[Numbered]) -> None:
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    if len({(len(example.parts), example.label is None) for _, example in examples}) > 1:
        raise ValueError("a batch holds pairs or judged answers, not both")
    for number, example in examples:
        if not all(any(part.trained[1:]) for part in example.parts):
            raise ValueError(f"example {number} has an answer without a trained token after its first")
        shortest, shared = min(len(part.ids) for part in example.parts), example.shared
        if not 0 <= shared < shortest or len({tuple(part.ids[:shared]) for part in example.parts}) > 1:
            raise ValueError(f"example {number} says that its answers share {shared} tokens, which they do not")
