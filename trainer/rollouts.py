"""Answers that were drawn to learn from: what was drawn, what it earned, and what the losses need of each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Encoded, Example
from ..models.generate import Sampled


@dataclass
class Rollouts:
    """N answers to N / group_size prompts, those of one prompt beside each other.

    first: the step (from 0) that begins with them. tokens: [N, L] of them on the CPU by name, float32: `sampled`, the
    log-probabilities they were drawn with; `old`, those of the policy that trains, before it moves; `reference`;
    `advantages`. answers: [N] each: rewards by source (`reward/NAME`), their sum (`reward`), and what else metrics are
    made of."""

    first: int
    numbers: list[int]  # of each answer's prompt, in the dataset
    examples: list[Example]
    counts: Tensor  # [N, L] bool: tokens that are trained
    tokens: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)
    rate: float = 0.0  # tokens a second that they were drawn with; of restored ones unknown

    def at(self, name: str, rows: Sequence[int], length: int) -> Tensor:
        """[len(rows), length] of a tensor of tokens."""
        return self.tokens[name][[*rows], :length]

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for `restored`."""
        flat = [part for example in self.examples for part in example.parts]
        ids = torch.tensor([token for part in flat for token in part.ids], dtype=torch.int64)
        lengths = torch.tensor([[len(part.ids), sum(part.trained)] for part in flat], dtype=torch.int64)
        own = {"first": torch.tensor(self.first), "numbers": torch.tensor(self.numbers), "counts": self.counts}
        tables = {f"tokens.{n}": t for n, t in self.tokens.items()} | {
            f"answers.{n}": t for n, t in self.answers.items()
        }
        return own | {"ids": ids, "lengths": lengths} | tables


def restored(state: Mapping[str, Tensor]) -> Rollouts:
    """Rollouts from what `Rollouts.state` gave."""
    lengths = state["lengths"].tolist()
    ids = [part.tolist() for part in state["ids"].split([total for total, _ in lengths])]
    examples = [
        example(each[: len(each) - new], each[len(each) - new :]) for each, (_, new) in zip(ids, lengths, strict=True)
    ]
    made = Rollouts(int(state["first"]), state["numbers"].tolist(), examples, state["counts"])
    for name, tensor in state.items():
        table, _, key = name.partition(".")
        if key:
            getattr(made, table)[key] = tensor
    return made


def example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A prompt and an answer as an example whose answer is rated."""
    return Example((Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)),), label=True)


def drawn(first: int, numbers: Sequence[int], prompts: Sequence[Sequence[int]], made: Sequence[Sampled]) -> Rollouts:
    """Rollouts of these answers, nothing known yet of what they earn."""
    examples = [example(prompt, one.ids) for prompt, one in zip(prompts, made, strict=True)]
    lengths = torch.tensor([len(one.ids) for one in made])
    sampled = torch.zeros(len(made), int(lengths.max()))
    for row, one in zip(sampled, made, strict=True):
        row[: len(one.logps)] = torch.tensor(one.logps)
    counts = torch.arange(sampled.shape[1]) < lengths[:, None]
    ended = torch.tensor([one.ended for one in made])
    answers = {"answer_tokens": lengths.float(), "truncated": (~ended).float()}
    return Rollouts(first, [*numbers], examples, counts, {"sampled": sampled}, answers)


def exchanged(made: Rollouts, groups: Sequence[int], others: Rollouts, size: int) -> Rollouts:
    """Rollouts with the answers of these groups replaced by others', in order."""
    width = max(made.counts.shape[1], others.counts.shape[1])
    at = [place * size + i for place in groups for i in range(size)]

    def wide(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[1]))

    def put(mine: Tensor, theirs: Tensor) -> Tensor:
        mine = mine.clone()
        mine[at] = theirs
        return mine

    numbers, examples = [*made.numbers], [*made.examples]
    for place, number, example in zip(at, others.numbers, others.examples, strict=True):
        numbers[place], examples[place] = number, example
    tokens = {name: put(wide(x), wide(others.tokens[name])) for name, x in made.tokens.items()}
    answers = {name: put(x, others.answers[name]) for name, x in made.answers.items()}
    counts = put(wide(made.counts), wide(others.counts))
    return replace(made, numbers=numbers, examples=examples, counts=counts, tokens=tokens, answers=answers)
