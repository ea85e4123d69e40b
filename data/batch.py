"""Examples into tensors: packed in one row without padding, or padded rows; how a step is split into forward passes.

A step is always the same examples; packing and micro-batches change the layout only. What predicts what is settled
here, once, so that nothing later can shift a target across the border between two packed examples. A packed row runs
what the answers of a pair have in common once: the trunk, then a branch for each answer (see `kernels.attention`). A
hidden state of the trunk serves every answer, and where it predicts another next token for each, it stands in `rows`
once for each.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, compress, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

MicroBatch = int | Literal["auto"]
Span = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, for each whether the loss counts it, the text they stand for, and `file:line`."""

    ids: list[int]
    trained: list[bool]
    text: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """What a row becomes: a conversation to learn from, a judged answer, or two of which the first is preferred.
    Every answer has its prompt before it. The first `shared` tokens of two answers are the same; at least one token of
    each is not shared, so a model that runs shared tokens once still has two branches."""

    parts: tuple[Encoded, ...]
    shared: int = 0
    label: bool | None = None  # of a judged answer: whether it is a good one

    @property
    def source(self) -> str:
        """`file:line`."""
        return self.parts[0].source

    def content(self) -> list[object]:
        """All that training sees, as JSON."""
        parts: list[list[object]] = [[part.ids, [int(trained) for trained in part.trained]] for part in self.parts]
        return [*parts, self.label]

    def size(self, packing: bool) -> int:
        """Tokens it takes: packed the trunk once, then each branch; padded a row of the longest for each answer."""
        lengths = [len(part.ids) for part in self.parts]
        return sum(lengths) - self.shared * (len(lengths) - 1) if packing else len(lengths) * max(lengths)


Numbered = tuple[int, Example]  # with its place in the dataset


def shared_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with, leaving at least one of each."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)


@dataclass(frozen=True)
class Batch:
    """One forward pass over P examples of A answers each (2: chosen, rejected), of L trained tokens at most.
    `slots` says which prediction belongs to which answer, so what follows never sees how the answers were laid out."""

    input_ids: Tensor  # [B, T] int64; packed [1, T], padded [A * P, T] with answer a of example p in row a * P + p
    position_ids: Tensor  # [B, T] int64, from 0 in every answer; a branch goes on from the end of its trunk
    spans: tuple[Span, ...] | None  # packed: (start, fork, end_1, ..., end_A) of each example, or (start, end); or None
    rows: Tensor  # [R] int64: flattened places whose hidden state predicts a trained token
    targets: Tensor  # [R] int64: the token each of them predicts
    # Of rated answers, which are pairs or have labels; None of rows to learn from, whose loss is about tokens:
    slots: Tensor | None  # [A, P, L] int64: which of the R is trained token l of answer a of example p; R: none
    lengths: Tensor | None  # [A, P] int64: trained tokens of each answer
    last: Tensor | None  # [A, P] int64: flattened place of each answer's last trained token, its end of turn
    labels: Tensor | None  # [P] bool: judged good; None of what is not judged
    numbers: tuple[int, ...]  # the examples' places in the dataset
    tokens: int  # run through the model, without padding
    trained: int  # R: predictions; what a packed row shares counts once
    examples: int  # P

    @property
    def weight(self) -> int:
        """What a loss summed over this batch is a sum over: trained tokens, or examples where answers are rated."""
        return self.trained if self.lengths is None else self.examples

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`. The host does not wait for a GPU."""
        moved: dict[str, Any] = {n: sent(x, device) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`; to a GPU through pinned memory, for a copy from other memory waits for all its work."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def micro_batches(
    examples: Sequence[Numbered], *, packing: bool, micro_batch: MicroBatch, token_budget: int, pad_id: int = 0
) -> list[Batch]:
    """One step's examples (their numbers in the dataset beside them), each exactly once, split into forward passes.

    `micro_batch` is a number of examples each, longest first, or "auto": as few passes as best-fit-decreasing finds
    within `token_budget` tokens a pass, padding counted (`Example.size`). An example larger than that goes alone.
    Raises ValueError for what makes no batch."""
    _check(examples)
    sizes = [example.size(packing) for _, example in examples]
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    if micro_batch == "auto":
        groups = (_packed_groups if packing else _padded_groups)(order, sizes, token_budget)
    else:
        groups = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    chosen = [[examples[i] for i in group] for group in groups]
    return [pack(group) if packing else pad(group, pad_id) for group in chosen]


def in_batches(examples: Sequence[Numbered], token_budget: int = 2048) -> list[Batch]:
    """Examples to be scored, packed into passes of about so many tokens; none of none."""
    how: Any = {"packing": True, "micro_batch": "auto", "token_budget": token_budget, "pad_id": 0}
    return micro_batches(examples, **how) if examples else []


def _check(examples: Sequence[Numbered]) -> None:
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    if len({(len(example.parts), example.label is None) for _, example in examples}) > 1:
        raise ValueError("a batch holds one kind of example: rows to learn from, pairs or judged answers")
    for number, example in examples:
        if not all(any(part.trained[1:]) for part in example.parts):
            raise ValueError(f"example {number} has an answer without a trained token after its first")


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


def pack(given: Sequence[Numbered | tuple[Sequence[int], Sequence[bool]]]) -> Batch:
    """All examples end to end in one row [1, total] without padding, each with its trunk once: examples with their
    numbers, or token ids with loss masks, as `encode_chat` gives them. ValueError where nothing is trained."""
    pairs: Any = ((i, a, b) for i, (a, b) in enumerate(given))
    examples = [(a, b) if isinstance(b, Example) else (i, Example((_encoded(i, a, b),))) for i, a, b in pairs]
    _check(examples)
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    places: list[Sequence[int]] = []  # of each answer of each example: where its tokens stand
    for _, example in examples:
        start, fork, parts = len(ids), example.shared, example.parts
        ids += parts[0].ids[:fork]
        positions += range(fork)
        for part in parts:
            ids += part.ids[fork:]
            positions += range(fork, len(part.ids))
        ends = list(accumulate((len(part.ids) - fork for part in parts), initial=start + fork))
        spans.append((start, *ends) if len(parts) > 1 else (start, ends[-1]))
        places += [[*range(start, start + fork), *range(a, b)] for a, b in pairwise(ends)]
    return _batch(examples, places, _tensor([ids]), _tensor([positions]), tuple(spans))


def _encoded(number: int, ids: Sequence[int], mask: Sequence[bool]) -> Encoded:
    if len(ids) != len(mask) or any(trained not in (0, 1) for trained in mask):  # labels, say
        raise ValueError(f"example {number} needs a mask of {len(ids)} times True or False, as its tokens, got {mask}")
    return Encoded([*ids], [*mask])


def pad(examples: Sequence[Numbered], pad_id: int) -> Batch:
    """Every answer in a row of its own with its prompt, padded on the right: first all first answers, then the rest."""
    _check(examples)
    flat = [part for row in zip(*(example.parts for _, example in examples), strict=True) for part in row]
    width, count = max(len(part.ids) for part in flat), len(examples)
    ids = _tensor([part.ids + [pad_id] * (width - len(part.ids)) for part in flat])
    starts = [row * width for p in range(count) for row in range(p, len(flat), count)]
    places = [range(start, start + width) for start in starts]
    return _batch(examples, places, ids, torch.arange(width).expand(len(flat), -1).contiguous(), None)


def _batch(
    examples: Sequence[Numbered],
    places: Sequence[Sequence[int]],
    ids: Tensor,
    positions: Tensor,
    spans: tuple[Span, ...] | None,
) -> Batch:
    """The predictions of a layout: `places[p * A + a][i]` is where token i of answer a of example p stands."""
    answers = [part for _, example in examples for part in example.parts]
    given = [list(compress(at, part.trained[1:])) for at, part in zip(places, answers, strict=True)]
    rows = np.fromiter(chain.from_iterable(given), np.int64)
    following = (compress(part.ids[1:], part.trained[1:]) for part in answers)
    targets = np.fromiter(chain.from_iterable(following), np.int64)
    labels = [example.label for _, example in examples]
    rated: dict[str, Tensor | None] = dict.fromkeys(("slots", "lengths", "last"))
    if labels[0] is not None or len(examples[0][1].parts) > 1:
        # What two answers predict from one place is made once, and has the place of the first of them.
        _, first, same = np.unique(rows << 32 | targets, return_index=True, return_inverse=True)
        order = first.argsort()
        rows, targets = rows[first[order]], targets[first[order]]
        lengths = np.array([len(own) for own in given]).reshape(len(examples), -1)  # [P, A]
        there = np.arange(lengths.max()) < lengths[..., None]
        slots = np.full(there.shape, len(rows))  # [P, A, L]
        slots[there] = order.argsort()[same]
        last = np.array([[*compress(at, part.trained)][-1] for at, part in zip(places, answers, strict=True)])
        made = {"slots": slots, "lengths": lengths, "last": last.reshape(lengths.shape)}
        rated = {name: torch.from_numpy(values.swapaxes(0, 1).copy()) for name, values in made.items()}
    return Batch(
        input_ids=ids,
        position_ids=positions,
        spans=spans,
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(targets),
        labels=torch.tensor(labels) if None not in labels else None,
        numbers=tuple(number for number, _ in examples),
        tokens=sum(len(part.ids) for part in answers) if spans is None else ids.numel(),
        trained=len(rows),
        examples=len(examples),
        **rated,
    )


def _tensor(values: Sequence[Any]) -> Tensor:
    """Numbers as int64, in a fifth of the time that torch takes for lists."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
