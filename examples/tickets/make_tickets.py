"""Writes train.jsonl, valid.jsonl and test.jsonl: tickets to an online shop, and how its help desk would file them.

A ticket says what happened, for whom the order was, and how soon an answer is needed, each in a phrase from
`phrases.toml`. Every bank of phrases is dealt out to the three splits first, so no phrase of a test ticket occurs in
train, and a good score cannot come from remembered strings. `triage` is the whole rule from those facts to the labels.
The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = {"train": 640, "valid": 60, "test": 216}
SHARES = {"test": 0.2, "valid": 0.1}  # of the phrases of each bank; train has the rest
SYSTEM = "File this ticket."
TEAMS = {"delivery": "logistics", "payment": "finance", "account": "support", "product": "returns"}
PRIORITIES = ("high", "medium", "low")
CUSTOMERS = ("business", "private")
ORDERS = (  # of the three sentences {what}, {whom} and {when}
    "{what}. {whom}. {when}.",
    "{whom}. {what}. {when}.",
    "{what}. {when}. {whom}.",
    "{when}. {what}. {whom}.",
    "Hello, {what}. {whom}. {when}.",
    "{whom}, and {what}. {when}.",
    "{what}, and {whom}. {when}.",
)


def triage(category: str, priority: str, customer: str) -> dict[str, str]:
    """The rule: business customers have a team of their own; for private ones the category decides."""
    team = "business" if customer == "business" else TEAMS[category]
    return {"category": category, "priority": priority, "team": team}


def answer_text(labels: dict[str, str]) -> str:
    """`category: account / priority: low / team: support`."""
    return " / ".join(f"{field}: {value}" for field, value in labels.items())


def split_phrases(banks: dict[str, list[str]], seed: int) -> dict[str, dict[str, list[str]]]:
    """Every bank shuffled and dealt out: split -> bank -> its phrases. No phrase goes to two splits."""
    splits: dict[str, dict[str, list[str]]] = {name: {} for name in ROWS}
    for bank, phrases in banks.items():
        left = random.Random(f"{seed}-{bank}").sample(phrases, len(phrases))
        for split, share in SHARES.items():
            count = round(share * len(phrases))
            splits[split][bank], left = left[:count], left[count:]
        splits["train"][bank] = left
    return splits


class Deck:
    """Deals cards in shuffled order, again and again, so that all are used alike."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.left: dict[str, list[str]] = {}

    def deal(self, name: str, cards: list[str] | tuple[str, ...]) -> str:
        if not self.left.get(name):
            self.left[name] = self.random.sample(cards, len(cards))
        return self.left[name].pop()


def make_ticket(deck: Deck, banks: dict[str, list[str]], number: int) -> dict[str, Any]:
    """Ticket `number`: categories and priorities come in turn, so that every pair is equally frequent."""
    category, priority = list(TEAMS)[number % 4], PRIORITIES[number // 4 % 3]
    customer = deck.random.choice(CUSTOMERS)
    facts = {"category": category, "priority": priority, "customer": customer}
    phrases = {
        blank: deck.deal(bank, banks[bank])
        for blank, bank in zip(("what", "when", "whom"), facts.values(), strict=True)
    }
    text = deck.deal("order", ORDERS).format(**phrases)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": ". ".join(sentence[0].upper() + sentence[1:] for sentence in text.split(". "))},
        {"role": "assistant", "content": answer_text(triage(**facts))},
    ]
    return {"messages": messages, "facts": facts, "phrases": list(phrases.values())}


def make_split(split: str, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of one split, no two tickets alike."""
    banks = split_phrases(tomllib.loads((HERE / "phrases.toml").read_text("utf-8")), seed)[split]
    deck, seen = Deck(f"{seed}-{split}"), set()
    while len(seen) < ROWS[split]:
        row = make_ticket(deck, banks, len(seen))
        if row["messages"][1]["content"] not in seen:
            seen.add(row["messages"][1]["content"])
            yield row


def jsonl(rows: Iterator[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description="write the ticket data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        (args.out / f"{split}.jsonl").write_text(jsonl(make_split(split, seed=args.seed)), "utf-8")


if __name__ == "__main__":
    main()
