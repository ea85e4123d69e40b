"""Writes train.jsonl and heldout.jsonl: for each ticket the right answer, and a near miss that one misread fact gives.

The tickets are those of `../tickets`: train.jsonl there becomes pairs to learn from, test.jsonl, whose phrases occur in
no training ticket, pairs to be judged by. A near miss is the help desk's own rule applied to facts of which one is
wrong, so it is always a well-formed answer, and differs from the right one in a field or two.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TICKETS = HERE.parent / "tickets"
sys.path.insert(0, str(TICKETS))

from make_tickets import CUSTOMERS, PRIORITIES, TEAMS, answer_text, triage  # noqa: E402  (a script of that folder)

CHOICES = {"category": tuple(TEAMS), "priority": PRIORITIES, "customer": CUSTOMERS}
SOURCES = {"train": ("train.jsonl", 320), "heldout": ("test.jsonl", 216)}  # tickets that pairs are made of


def near_miss(facts: dict[str, str], misread: str, chance: random.Random) -> str:
    """The answer of someone who took one fact for another."""
    others = [value for value in CHOICES[misread] if value != facts[misread]]
    return answer_text(triage(**facts | {misread: chance.choice(others)}))


def pairs(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """One pair a ticket; the three facts are misread in turn."""
    chance = random.Random(f"{seed}-{split}")
    name, count = SOURCES[split]
    rows = [json.loads(line) for line in (TICKETS / name).read_text("utf-8").splitlines()][:count]
    found = []
    for number, row in enumerate(rows):
        misread = list(CHOICES)[number % len(CHOICES)]
        *prompt, right = row["messages"]
        wrong = {"role": "assistant", "content": near_miss(row["facts"], misread, chance)}
        found.append({"prompt": prompt, "chosen": [right], "rejected": [wrong], "misread": misread})
    return found


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description="write the preference pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SOURCES:
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs(split, args.seed)]
        (args.out / f"{split}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
