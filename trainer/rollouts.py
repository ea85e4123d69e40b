"""Answers that were drawn to learn from: what was drawn, what it earned, and what the losses need of each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.generate import Sampled
from .rewards import Answered


class Drawn(NamedTuple):
    """An answer and what it earned: rewards by source (`reward/NAME`), their sum (`reward`), and whether it failed."""

    number: int  # of its prompt, in the dataset
    made: Sampled
    said: Answered
    earned: Mapping[str, float]


@dataclass
class Rollouts:
    """N answers to N / group_size prompts, those of one prompt beside each other.

    first: the step (from 0) that begins with them. tokens: [N, L] of them on the CPU by name, float32: `sampled`, the
    log-probabilities they were drawn with; `old`, those of the policy that trains, before it moves; `reference`;
    `advantages`. answers: [N] each: what they earned, and what else metrics are made of."""

    first: int
    numbers: list[int]  # of each answer's prompt, in the dataset
    ids: list[list[int]]  # each answer's tokens
    counts: Tensor  # [N, L] bool: tokens that are trained
    tokens: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)
    rate: float = 0.0  # tokens a second that they were drawn with; of restored ones unknown

    @classmethod
    def of(cls, first: int, drawn: Sequence[Drawn]) -> "Rollouts":
        """Of these answers, nothing known yet of their tokens."""
        lengths = torch.tensor([len(one.made.ids) for one in drawn])
        answers = {"answer_tokens": lengths.float()}
        answers["truncated"] = torch.tensor([not one.made.ended for one in drawn]).float()
        for name in drawn[0].earned:
            answers[name] = torch.tensor([one.earned[name] for one in drawn], dtype=torch.float64)
        sampled = pad_sequence([torch.tensor(one.made.logps) for one in drawn], batch_first=True)
        counts = torch.arange(sampled.shape[1]) < lengths[:, None]
        numbers, ids = [one.number for one in drawn], [one.made.ids for one in drawn]
        return cls(first, numbers, ids, counts, {"sampled": sampled}, answers)

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for `restored`; with masks of what is no number, as a reward that failed, since
        checkpoints hold no NaN."""
        own = {"first": torch.tensor(self.first), "numbers": torch.tensor(self.numbers), "counts": self.counts}
        own |= {"ids": torch.tensor([*chain(*self.ids)]), "lengths": torch.tensor([*map(len, self.ids)])}
        for table in ("tokens", "answers"):
            for name, tensor in getattr(self, table).items():
                own[f"{table}.{name}"], missing = tensor.nan_to_num(), tensor.isnan()
                own |= {f"missing.{table}.{name}": missing} if missing.any() else {}
        return own


def restored(state: Mapping[str, Tensor]) -> Rollouts:
    """Rollouts from what `Rollouts.state` gave."""
    ids = [part.tolist() for part in state["ids"].split(state["lengths"].tolist())]
    made = Rollouts(int(state["first"]), state["numbers"].tolist(), ids, state["counts"])
    for name, tensor in state.items():
        table, _, key = name.partition(".")
        if table in ("tokens", "answers"):
            missing = state.get(f"missing.{name}")
            getattr(made, table)[key] = tensor if missing is None else tensor.masked_fill(missing, torch.nan)
    return made


def differing(rewards: Tensor) -> Tensor:
    """[P] bool: whether the rewards that are known of a group [P, G] differ."""
    return rewards.nan_to_num(nan=-torch.inf).amax(1) > rewards.nan_to_num(nan=torch.inf).amin(1)
