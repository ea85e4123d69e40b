"""Writes train.jsonl, valid.jsonl and test.jsonl: support tickets, and how a help desk would file them.

A ticket is put together from independent parts: what it is about, how soon it is needed, who is affected, and a
sentence that says what it is *not* about. Each part is one phrase of `phrases.toml`, whose banks hold one list per
split; so no phrase of a test ticket occurs in train, and a good score cannot come from remembered strings.
`triage` is the whole rule from those facts to the labels. The same seed writes the same bytes.
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
ROWS = {"train": 520, "valid": 60, "test": 220}
SYSTEM = "File this support ticket."
ABOUT = ("bug", "access", "billing", "request", "question")
TROUBLE = ("bug", "access")  # the categories in which it matters who is affected
PRIORITY = {"today": "high", "days": "medium", "whenever": "low"}
TEAM = {"billing": "finance", "request": "product", "question": "support"}


def triage(about: str, when: str, who: str) -> dict[str, str]:
    """The rule: what a ticket is about, when it is needed and who is affected -> its three labels."""
    team = TEAM.get(about) or ("engineering" if who == "many" else "support")
    return {"category": about, "priority": PRIORITY[when], "team": team}


def answer_text(labels: dict[str, str]) -> str:
    return " / ".join(f"{field}: {value}" for field, value in labels.items())


class Decks:
    """Deals the phrases of each bank in shuffled order and reshuffles when it runs out, so that all are used alike."""

    def __init__(self, phrases: dict[str, Any], split: str, seed: int) -> None:
        self.random = random.Random(f"{seed}-{split}")
        self.cards = {bank: lists[split] for bank, lists in phrases.items() if bank != "fill"}
        self.cards |= phrases["fill"]
        self.left: dict[str, list[int]] = {}

    def deal(self, bank: str) -> tuple[str, str]:
        """The next phrase of a bank and its name, as `bug.3`."""
        if not self.left.get(bank):
            self.left[bank] = self.random.sample(range(len(self.cards[bank])), len(self.cards[bank]))
        index = self.left[bank].pop()
        return f"{bank}.{index}", self.cards[bank][index]

    def chance(self, share: float) -> bool:
        return self.random.random() < share


def draw_facts(decks: Decks, number: int) -> dict[str, str]:
    """Facts of ticket `number`: categories and priorities in turn, so that every pair is equally frequent."""
    about = ABOUT[number % len(ABOUT)]
    when = list(PRIORITY)[number // len(ABOUT) % len(PRIORITY)]
    return {"about": about, "when": when, "who": "many" if decks.chance(0.5) else "one"}


def choose_phrases(decks: Decks, facts: dict[str, str]) -> list[tuple[str, str]]:
    """The named phrases of one ticket in the order they are read. What goes without saying is often left unsaid."""
    about, when, who = facts["about"], facts["when"], facts["who"]
    parts = [decks.deal(about)]
    if decks.chance(0.4):
        parts = contrast(decks, about, *parts)
    if (about in TROUBLE and (who == "many" or decks.chance(0.7))) or (about == "billing" and decks.chance(0.3)):
        parts.append(decks.deal(who))
    if when != "days" or decks.chance(0.6):
        parts.insert(decks.random.choice([0, len(parts), len(parts)]), decks.deal(when))
    return parts


def contrast(decks: Decks, about: str, core: tuple[str, str]) -> list[tuple[str, str]]:
    """Puts a sentence before the core that rules out another category, and so brings in the words of that one."""
    denial = decks.deal("not_" + decks.random.choice([name for name in ABOUT if name != about]))
    if decks.chance(0.5):
        return [(f"{denial[0]}+{core[0]}", f"{denial[1]}, but {core[1]}")]
    return [denial, core]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def fill_in(decks: Decks, text: str) -> str:
    for name in ("thing", "feature", "task", "sum"):
        if "{" + name + "}" in text:
            text = text.replace("{" + name + "}", decks.deal(name)[1])
    return text


def make_ticket(decks: Decks, number: int) -> dict[str, Any]:
    facts = draw_facts(decks, number)
    parts = choose_phrases(decks, facts)
    sentences = [sentence(fill_in(decks, text)) for _, text in parts]
    ticket = " ".join(text if text[-1] in "?." else text + "." for text in sentences)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": ticket},
        {"role": "assistant", "content": answer_text(triage(**facts))},
    ]
    return {"messages": messages, "facts": facts, "phrases": "+".join(name for name, _ in parts).split("+")}


def make_split(split: str, *, seed: int = 0, rows: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one split, no two tickets alike."""
    decks = Decks(tomllib.loads((HERE / "phrases.toml").read_text("utf-8")), split, seed)
    seen: set[str] = set()
    while len(seen) < (ROWS[split] if rows is None else rows):
        row = make_ticket(decks, len(seen))
        if row["messages"][1]["content"] not in seen:
            seen.add(row["messages"][1]["content"])
            yield row


def jsonl(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="write the ticket data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        (args.out / f"{split}.jsonl").write_text(jsonl(make_split(split, seed=args.seed)), "utf-8")


if __name__ == "__main__":
    main()
