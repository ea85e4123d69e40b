"""Preference examples into tensors: answers that share their beginning in one packed row, or one padded row each.

A packed row runs what the answers of an example have in common once: the trunk, then a branch for each answer (see
`kernels.attention`). A hidden state of the trunk serves every answer, and where it predicts another next token for
each, it stands in `rows` once for each. `slots` says which prediction belongs to which answer, so what follows never
sees how the answers were laid out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .batch import sent, split_groups
from .encode import Encoded
from .pairs import Judgement, Pair

Numbered = tuple[int, Pair | Judgement]
Span = tuple[int, ...]


@dataclass(frozen=True)
class AnswerBatch:
    """One forward pass over P examples of A answers each (2: chosen, rejected; 1: judged), L trained tokens at most."""

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

    def to(self, device: torch.device | str) -> "AnswerBatch":
        """The same batch with its tensors on `device`. The host does not wait for a GPU."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: sent(x, device) for name, x in named.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def answer_batches(
    examples: Sequence[Numbered],
    *,
    packing: bool,
    micro_batch: int | Literal["auto"],
    token_budget: int,
    pad_id: int,
) -> list[AnswerBatch]:
    """One step's examples (their numbers in the dataset beside them), each exactly once, split into forward passes.

    `micro_batch` is a number of examples each, or "auto": as few passes as best-fit-decreasing finds within
    `token_budget` tokens a pass. An example counts what it takes: packed its trunk once and its branches, padded A rows
    of the longest. One larger than the budget goes alone.
    """
    _check(examples)
    groups = split_groups(
        examples,
        [packed_size(example) if packing else padded_size(example) for _, example in examples],
        packing=packing,
        micro_batch=micro_batch,
        token_budget=token_budget,
    )
    return [pack_answers(group) if packing else pad_answers(group, pad_id) for group in groups]


def packed_size(example: Pair | Judgement) -> int:
    """Tokens an example takes in a packed row: the trunk once, then each branch."""
    return sum(len(part.ids) for part in example.parts) - _shared(example) * (len(example.parts) - 1)


def padded_size(example: Pair | Judgement) -> int:
    """Tokens an example takes in padded rows of its own."""
    return len(example.parts) * max(len(part.ids) for part in example.parts)


def pack_answers(examples: Sequence[Numbered]) -> AnswerBatch:
    """All examples end to end in one row without padding, each with its trunk once."""
    _check(examples)
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    places = []  # of each example, of each of its answers: where its tokens stand
    for _, example in examples:
        start, fork, parts = len(ids), _shared(example), example.parts
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
    _check(examples)
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
    return AnswerBatch(
        input_ids=ids,
        position_ids=positions,
        spans=spans,
        rows=rows.contiguous(),
        targets=targets.contiguous(),
        slots=torch.tensor(filled).transpose(0, 1).contiguous(),
        lengths=lengths.contiguous(),
        last=torch.tensor(last).T.contiguous(),
        labels=_labels(examples),
        numbers=tuple(number for number, _ in examples),
        tokens=tokens,
        trained=len(made),
        examples=len(examples),
    )


def _shared(example: Pair | Judgement) -> int:
    return example.shared if isinstance(example, Pair) else 0


def _labels(examples: Sequence[Numbered]) -> Tensor | None:
    labels = [example.label for _, example in examples if isinstance(example, Judgement)]
    return torch.tensor(labels) if labels else None


def _last_trained(part: Encoded) -> int:
    return max(i for i, trained in enumerate(part.trained) if trained)


def _check(examples: Sequence[Numbered]) -> None:
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    if len({type(example) for _, example in examples}) > 1:
        raise ValueError("a batch holds pairs or judged answers, not both")
    for number, example in examples:
        if not all(any(part.trained[1:]) for part in example.parts):
            raise ValueError(f"example {number} has an answer without a trained token after its first")
        shortest, shared = min(len(part.ids) for part in example.parts), _shared(example)
        if not 0 <= shared < shortest or len({tuple(part.ids[:shared]) for part in example.parts}) > 1:
            raise ValueError(f"example {number} says that its answers share {shared} tokens, which they do not")
