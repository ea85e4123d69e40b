"""Writes train.jsonl, valid.jsonl and test.jsonl: support tickets, and how a help desk would file them.

A ticket says what it is about, how soon it is needed and who is affected, each in a phrase from `phrases.toml`, and at
times what it is *not* about. Every bank of phrases is dealt out to the three splits first, so no phrase of a test
ticket occurs in train, and a good score cannot come from remembered strings. `triage` is the whole rule from those
facts to the labels. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = {"train": 600, "valid": 60, "test": 210}
SHARES = {"test": 0.2, "valid": 0.1}  # of the phrases of each bank; train has the rest
SYSTEM = "File this ticket."
ABOUT = ("bug", "access", "billing", "request", "question")
TROUBLE = ("bug", "access")  # the categories in which it matters who is affected
PRIORITY = {"today": "high", "days": "medium", "whenever": "low"}
TEAM = {"billing": "finance", "request": "product", "question": "support"}
STATEMENTS = {"today": "urgent", "whenever": "idle", "one": "only_me", "many": "not_only_me"}  # a fact said outright

Part = tuple[str, str]  # the name of a phrase, as bug.3, and its text


def triage(about: str, when: str, who: str) -> dict[str, str]:
    """The rule: what a ticket is about, when it is needed and who is affected -> its three labels."""
    team = TEAM.get(about) or ("engineering" if who == "many" else "support")
    return {"category": about, "priority": PRIORITY[when], "team": team}


def answer_text(labels: dict[str, str]) -> str:
    return " / ".join(f"{field}: {value}" for field, value in labels.items())


def split_phrases(phrases: dict[str, list[str]], seed: int) -> dict[str, dict[str, list[Part]]]:
    """Every bank shuffled and dealt out: split -> bank -> its named phrases. No phrase goes to two splits."""
    splits: dict[str, dict[str, list[Part]]] = {name: {} for name in ROWS}
    for bank, texts in phrases.items():
        named = [(f"{bank}.{number}", text) for number, text in enumerate(texts)]
        random.Random(f"{seed}-{bank}").shuffle(named)
        for split, share in SHARES.items():
            count = max(1, round(share * len(texts)))
            splits[split][bank], named = named[:count], named[count:]
        splits["train"][bank] = named
    return splits


class Writer:
    """Deals phrases and fillers of one split in shuffled order, again and again, so that all are used alike."""

    def __init__(self, phrases: dict[str, list[Part]], fill: dict[str, list[str]], seed: str) -> None:
        self.random = random.Random(seed)
        self.cards: dict[str, list[Any]] = {**phrases, **{"fill." + name: words for name, words in fill.items()}}
        self.left: dict[str, list[Any]] = {}

    def deal(self, bank: str) -> Any:
        if not self.left.get(bank):
            self.left[bank] = self.random.sample(self.cards[bank], len(self.cards[bank]))
        return self.left[bank].pop()

    def fill(self, part: Part, **fillers: str) -> Part:
        """The phrase with its blanks filled: `{want}` from the list that `fillers` names, `{thing}` from its own."""
        name, text = part
        for blank in re.findall(r"{(\w+)}", text):
            text = text.replace("{" + blank + "}", self.deal("fill." + fillers.get(blank, blank)))
        return name, text

    def time(self, when: str) -> Part | None:
        """How soon it is needed: said outright, by a date, or by a date in place of another; `days` may be unsaid."""
        other = self.random.choice([name for name in PRIORITY if name != when])
        way = self.random.choices(["statement", "date", "new_date"], [0.4, 0.2, 0.4])[0]
        if way == "statement":
            return self.fill(self.deal(STATEMENTS[when])) if when in STATEMENTS else None
        return self.fill(self.deal(way), want=when, other=other)

    def people(self, who: str) -> Part:
        """Who is affected: said outright, by naming them, or by naming them and who is not."""
        other = "one" if who == "many" else "many"
        way = self.random.choices(["statement", "affected", "contrasted"], [0.5, 0.1, 0.4])[0]
        if way == "statement":
            return self.fill(self.deal(STATEMENTS[who]))
        return self.fill(self.deal(way), hit=who, spared=other)

    def core(self, about: str) -> list[Part]:
        """What the ticket is about; half of the time after a denial that brings in the words of another category."""
        core = self.fill(self.deal(about))
        if self.random.random() < 0.5:
            return [core]
        denial = self.fill(self.deal("not_" + self.random.choice([name for name in ABOUT if name != about])))
        if self.random.random() < 0.5:
            return [denial, core]
        return [(f"{denial[0]}+{core[0]}", f"{denial[1]}, but {core[1]}")]


def make_ticket(writer: Writer, number: int) -> dict[str, Any]:
    """Ticket `number`: categories and priorities come in turn, so that every pair is equally frequent."""
    about, when = ABOUT[number % len(ABOUT)], list(PRIORITY)[number // len(ABOUT) % len(PRIORITY)]
    facts = {"about": about, "when": when, "who": writer.random.choice(["one", "many"])}
    parts = writer.core(about)
    if about in TROUBLE and (facts["who"] == "many" or writer.random.random() < 0.8):
        parts.append(writer.people(facts["who"]))  # of one user, it may go without saying
    if time := writer.time(when):
        parts.insert(writer.random.choice([0, len(parts), len(parts)]), time)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": " ".join(sentence(text) for _, text in parts)},
        {"role": "assistant", "content": answer_text(triage(**facts))},
    ]
    return {"messages": messages, "facts": facts, "phrases": "+".join(name for name, _ in parts).split("+")}


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text[-1] in "?." else ".")


def make_split(split: str, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of one split, no two tickets alike."""
    source = tomllib.loads((HERE / "phrases.toml").read_text("utf-8"))
    writer = Writer(split_phrases(source["phrases"], seed)[split], source["fill"], f"{seed}-{split}")
    seen: set[str] = set()
    while len(seen) < ROWS[split]:
        row = make_ticket(writer, len(seen))
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
