"""Examples into tensors: packed in one row without padding, or padded rows; how a step is split into forward passes.

A step is always the same examples; packing and micro-batches change the layout only. What predicts what is settled
here, once, so that nothing later can shift a target across the border between two packed examples. A packed row runs
what texts begin with in common once (a system prompt, a pair's prompt): a trie of token ids, laid out depth first (see
`kernels.spans`). A hidden state of a trunk serves every text, and where it predicts for several, it stands in `rows`
once for each.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, pairwise, takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

MicroBatch = int | Literal["auto"]
Span = tuple[int, ...]
ANY = 1 << 62
WORTH = 3  # tokens; a fork costs about as much as running one or two more would at 135M on a CPU, less above


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
    Every answer has its prompt before it."""

    parts: tuple[Encoded, ...]
    label: bool | None = None  # of a judged answer: whether it is a good one
    group: int = 0  # texts of one group may share what they begin with: of another adapter they are read otherwise

    @property
    def source(self) -> str:
        """`file:line`."""
        return self.parts[0].source

    def content(self) -> list[object]:
        """All that training sees, as JSON."""
        parts: list[list[object]] = [[part.ids, [int(trained) for trained in part.trained]] for part in self.parts]
        return [*parts, self.label]

    def size(self, packing: bool, forks_up_to: int = ANY) -> int:
        """Tokens it takes by itself: packed as `pack` lays it out; padded a row of the longest for each answer."""
        lengths = [len(part.ids) for part in self.parts]
        if not packing:
            return len(lengths) * max(lengths)
        return sum(lengths) - sum(_neighbours([(part, self.group) for part in self.parts], forks_up_to)[1])


Numbered = tuple[int, Example]  # with its place in the dataset


def _neighbours(texts: Sequence[tuple[Encoded, int]], forks_up_to: int) -> tuple[list[int], list[int]]:
    """Places of texts (with their groups) in an order in which those that begin alike are neighbours, and how many
    tokens each of them shares with the one before: 0 where that is not worth a fork."""
    keys = [(group, len(part.ids) > forks_up_to, np.array(part.ids, ">i4").tobytes()) for part, group in texts]
    order, forks = sorted(range(len(keys)), key=keys.__getitem__), [0]
    for a, b in pairwise(keys[i] for i in order):
        x, y = (np.frombuffer(ids[: min(len(a[2]), len(b[2]))], ">i4") for *_, ids in (a, b))
        count = next(iter(np.flatnonzero(x != y).tolist()), len(x))
        forks.append(count if count >= WORTH and a[:2] == (b[0], False) == b[:2] else 0)
    return order, forks


@dataclass(frozen=True)
class Batch:
    """One forward pass over P examples of A answers each (2: chosen, rejected), of L trained tokens at most.
    `slots` says which prediction belongs to which answer, so what follows never sees how the answers were laid out."""

    input_ids: Tensor  # [B, T] int64; packed [1, T], padded [A * P, T] with answer a of example p in row a * P + p
    position_ids: Tensor  # [B, T] int64, from 0 in every answer; a branch goes on from the end of its trunk
    spans: tuple[Span, ...] | None  # packed: (start, end) or (start, end, parent), as `kernels.spans` says; or None
    owners: tuple[int, ...] | None  # of each span one of the examples that it is part of, 0 to P - 1
    rows: Tensor  # [R] int64: flattened places whose hidden state predicts a trained token
    targets: Tensor  # [R] int64: the token each of them predicts
    # Of rated answers, which are pairs or have labels; None of rows to learn from, whose loss is about tokens:
    slots: Tensor | None  # [A, P, L] int64: which of the R is trained token l of answer a of example p; R: none
    lengths: Tensor | None  # [A, P] int64: trained tokens of each answer
    last: Tensor | None  # [A, P] int64: flattened place of each answer's last trained token, its end of turn
    labels: Tensor | None  # [P] bool: judged good; None of what is not judged
    numbers: tuple[int, ...]  # the examples' places in the dataset
    tokens: int  # run through the model, without padding
    trained: int  # R: predictions; of rated answers one that several share counts once
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
    examples: Sequence[Numbered],
    *,
    packing: bool = True,
    micro_batch: MicroBatch = "auto",
    token_budget: int = 2048,
    pad_id: int = 0,
    forks_up_to: int = ANY,
) -> list[Batch]:
    """Examples (their numbers in the dataset beside them), each exactly once, split into forward passes.

    `micro_batch` is a number of examples each (packed those that begin alike together, padded the longest first), or
    "auto": as few passes as best-fit-decreasing finds within `token_budget` tokens a pass, padding counted, what is
    shared once; a larger example goes alone. forks_up_to: as `CausalLM` says. ValueError for what makes no batch."""
    _check(examples)
    only, forks = [example for _, example in examples], list[int]()
    sizes = [example.size(packing, forks_up_to) for example in only]
    if packing:
        order, forks = _neighbours([(example.parts[0], example.group) for example in only], forks_up_to)
    else:
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    if micro_batch != "auto":
        groups = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    elif packing:
        groups = _packed_groups(only, order, sizes, forks, token_budget)
    else:
        groups = _padded_groups(order, sizes, token_budget)
    chosen = [[examples[i] for i in group] for group in groups]
    return [pack(group, forks_up_to) if packing else pad(group, pad_id) for group in chosen]


def _check(examples: Sequence[Numbered]) -> None:
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    if len({(len(example.parts), example.label is None) for _, example in examples}) > 1:
        raise ValueError("a batch holds one kind of example: rows to learn from, pairs or judged answers")
    for number, example in examples:
        if not all(any(part.trained[1:]) for part in example.parts):
            raise ValueError(f"example {number} has an answer without a trained token after its first")


def _packed_groups(
    examples: Sequence[Example], order: Sequence[int], sizes: Sequence[int], forks: Sequence[int], budget: int
) -> list[list[int]]:
    """At every fork, the deepest first, those together that fit: so what few begin with is not run in several passes
    for the sake of what all do. An example counts at least its predictions, which no other makes for it."""
    nodes: list[tuple[int, list[tuple[int, list[int]]]]] = [(0, [])]  # of forks: depth; tokens behind it, examples
    for i, before, after in zip(order, forks, [*forks[1:], 0], strict=True):
        depth, least = max(before, after), sum(sum(part.trained) for part in examples[i].parts)
        if depth > nodes[-1][0]:
            nodes.append((depth, []))
        nodes[-1][1].append((max(sizes[i] - depth, least), [i]))
        while (depth := nodes[-1][0]) > after:
            items = _best_fit(nodes.pop()[1], budget - depth)
            if after > nodes[-1][0]:
                nodes.append((after, []))
            nodes[-1][1].extend((size + depth - nodes[-1][0], members) for size, members in items)
    return [members for _, members in _best_fit(nodes[0][1], budget)]


def _best_fit(items: Sequence[tuple[int, list[int]]], budget: int) -> list[tuple[int, list[int]]]:
    """Best-fit-decreasing: put each item (size, members), largest first, where it leaves the least room."""
    ordered = sorted(items, key=lambda item: -item[0])
    alone = [*takewhile(lambda item: item[0] + ordered[-1][0] > budget, ordered)]  # not even the least fits beside it
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for size, members in ordered[len(alone) :]:
        k = bisect_left(rooms, (size, 0))
        room, group = rooms.pop(k) if k < len(rooms) else (budget, len(groups))
        groups[group : group + 1] = [[*(groups[group] if group < len(groups) else []), *members]]
        insort(rooms, (room - size, group))
    return alone + [(budget - room, groups[group]) for room, group in sorted(rooms, key=lambda item: item[1])]


def _padded_groups(order: Sequence[int], sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """For padded rows, where each example costs as much as the longest: neighbours in length go together."""
    groups: list[list[int]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * sizes[groups[-1][0]] > token_budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def pack(given: Sequence[Numbered | tuple[Sequence[int], Sequence[bool]]], forks_up_to: int = ANY) -> Batch:
    """All examples in one row [1, total] without padding: examples with their numbers, or token ids with loss masks, as
    `encode_chat` gives them. What texts of at most `forks_up_to` tokens begin with in common stands there once; texts
    that share nothing stand in the order given. ValueError where nothing is trained."""
    pairs: Any = ((i, a, b) for i, (a, b) in enumerate(given))
    examples = [(a, b) if isinstance(b, Example) else (i, Example((_encoded(i, a, b),))) for i, a, b in pairs]
    _check(examples)
    answers = len(examples[0][1].parts)
    parts = [(part, example.group) for _, example in examples for part in example.parts]
    trees = list[list[tuple[int, int]]]()  # of texts and how many tokens they share with the one before
    for text, fork in zip(*_neighbours(parts, forks_up_to), strict=True):
        trees += [] if fork else [[]]
        trees[-1].append((text, fork))
    ids, positions, path = list[int](), list[int](), list[int]()
    places = [path] * len(parts)  # of each text: where its tokens stand
    begun = dict[int, tuple[int, int]]()  # where a text's own tokens begin: where those end that it goes on from, whose
    for text, fork in chain.from_iterable(sorted(trees, key=min)):
        own = parts[text][0].ids[fork:]
        if own:
            begun[len(ids)] = path[fork - 1] + 1 if fork else 0, text // answers
        places[text] = path = [*path[:fork], *range(len(ids), len(ids) + len(own))]
        ids += own
        positions += range(fork, len(path))
    spans, owners, ends = list[Span](), list[int](), dict[int, int]()
    for start, end in pairwise(sorted({*begun, *(after for after, _ in begun.values()), len(ids)})):
        after, owner = begun.get(start) or (start, owners[-1])
        ends[end] = len(spans)
        spans.append((start, end, ends[after]) if after else (start, end))
        owners.append(owner)
    return _batch(examples, places, _tensor([ids]), _tensor([positions]), tuple(spans), tuple(owners))


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
    return _batch(examples, places, ids, torch.arange(width, device="cpu").expand(len(flat), -1).contiguous())


def _batch(
    examples: Sequence[Numbered],
    places: Sequence[Sequence[int]],
    ids: Tensor,
    positions: Tensor,
    spans: tuple[Span, ...] | None = None,
    owners: tuple[int, ...] | None = None,
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
        # What answers predict from one place is made once, and has the place of the first of them.
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
        owners=owners,
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(targets),
        labels=torch.tensor(labels, device="cpu") if None not in labels else None,
        numbers=tuple(number for number, _ in examples),
        tokens=sum(len(part.ids) for part in answers) if spans is None else ids.numel(),
        trained=len(rows),
        examples=len(examples),
        **rated,
    )


def _tensor(values: Sequence[Any]) -> Tensor:
    """Numbers as int64, in a fifth of the time that torch takes for lists."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
