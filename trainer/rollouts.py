"""Answers that were drawn to learn from: what was drawn, what it earned, and what the losses need of each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.generate import Sampled
from .rewards import Answered

on_cpu = partial(torch.tensor, device="cpu")  # whatever torch's default device is


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
        lengths = on_cpu([len(one.made.ids) for one in drawn])
        answers = {"answer_tokens": lengths.float()}
        answers["truncated"] = on_cpu([not one.made.ended for one in drawn]).float()
        for name in drawn[0].earned:
            answers[name] = on_cpu([one.earned[name] for one in drawn], dtype=torch.float64)
        sampled = pad_sequence([on_cpu(one.made.logps, dtype=torch.float32) for one in drawn], batch_first=True)
        counts = torch.arange(sampled.shape[1], device="cpu") < lengths[:, None]
        numbers, ids = [one.number for one in drawn], [one.made.ids for one in drawn]
        return cls(first, numbers, ids, counts, {"sampled": sampled}, answers)

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for `restored`; with masks of what is no number, as a reward that failed, since
        checkpoints hold no NaN."""
        own = {"first": on_cpu(self.first), "numbers": on_cpu(self.numbers), "counts": self.counts}
        own |= {"ids": on_cpu([*chain(*self.ids)]), "lengths": on_cpu([*map(len, self.ids)])}
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
