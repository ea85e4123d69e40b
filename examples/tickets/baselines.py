"""Two yardsticks for the ticket task: always the commonest answer, and logistic regression on word counts.

Neither reads a sentence. A task that the second one solves is decided by single words and needs no language model;
`python baselines.py` prints how far each gets, field by field and on all three at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

FIELDS = ("category", "priority", "team")
Ticket = tuple[str, str]  # the text, the right answer


def read_tickets(path: Path) -> list[Ticket]:
    """(ticket, answer) of every row."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(row["messages"][1]["content"], row["messages"][2]["content"]) for row in rows]


def fields(answer: str) -> tuple[str, ...]:
    """`category: account / priority: low / team: support` -> ("account", "low", "support")."""
    return tuple(part.partition(":")[2].strip() for part in answer.split("/"))


def words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes, in lower case."""
    return re.findall(r"[a-z0-9']+", text.lower())


def majority(train: list[Ticket], count: int) -> list[str]:
    """The commonest answer in train, `count` times."""
    return [Counter(answer for _, answer in train).most_common(1)[0][0]] * count


def count_words(texts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """How often each text holds each word of the vocabulary, [N, V + 1]."""
    counts = torch.zeros(len(texts), len(vocabulary) + 1)  # [N, V + 1], the last column is the bias
    counts[:, -1] = 1
    for row, text in enumerate(texts):
        for word in words(text):
            if word in vocabulary:
                counts[row, vocabulary[word]] += 1
    return counts


def fit_logistic(inputs: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """Multinomial logistic regression: weights [V, classes] that minimise cross-entropy + decay * |weights|^2."""
    weights = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(inputs @ weights, labels) + decay * weights.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach()


def bag_of_words(train: list[Ticket], texts: list[str], decay: float = 1e-3) -> list[str]:
    """One classifier a field, on counts of the words of train; returns the answers for `texts`."""
    vocabulary = {word: i for i, word in enumerate(sorted({w for text, _ in train for w in words(text)}))}
    inputs, asked = count_words([text for text, _ in train], vocabulary), count_words(texts, vocabulary)
    columns = []
    for field, values in zip(FIELDS, zip(*(fields(answer) for _, answer in train), strict=True), strict=True):
        names = sorted(set(values))
        labels = torch.tensor([names.index(value) for value in values])
        weights = fit_logistic(inputs, labels, len(names), decay)
        columns.append([f"{field}: {names[best]}" for best in (asked @ weights).argmax(1).tolist()])
    return [" / ".join(parts) for parts in zip(*columns, strict=True)]


def score(answers: list[str], truth: list[str]) -> dict[str, float]:
    """The share of answers that equal the truth, `exact`, and the share right in each field."""
    pairs = [(fields(said), fields(right)) for said, right in zip(answers, truth, strict=True)]
    shares = {
        field: sum(len(said) > i and said[i] == right[i] for said, right in pairs) / len(pairs)
        for i, field in enumerate(FIELDS)
    }
    exact = sum(said.strip() == right for said, right in zip(answers, truth, strict=True)) / len(truth)
    return {"exact": exact, **shares}


def main() -> None:
    """Print the exact match of the commonest answer and of a bag of words."""
    here = Path(__file__).parent
    train, test = read_tickets(here / "train.jsonl"), read_tickets(here / "test.jsonl")
    texts, truth = [text for text, _ in test], [answer for _, answer in test]
    for name, answers in (("majority", majority(train, len(test))), ("bag of words", bag_of_words(train, texts))):
        print(f"{name:14}", "  ".join(f"{key} {value:6.1%}" for key, value in score(answers, truth).items()))


if __name__ == "__main__":
    main()
