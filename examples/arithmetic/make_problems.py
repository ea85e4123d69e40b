"""Write train.jsonl, valid.jsonl and test.jsonl: sums in words, each with its answer; a program can tell who is right.

`python make_problems.py [--seed N]`. Test problems have numbers that stand in no other problem and are asked in words
of their own, so what is right there was not remembered.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TRAIN = (
    "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?",
    "There are {a} {thing} in a box and {b} in a bag. How many {thing} are there?",
    "{name} counts {a} {thing}, then {b} others. How many is that?",
    "{name} had {sum} {thing} and gave away {b}. How many {thing} are left?",
    "Of {sum} {thing}, {b} are broken. How many {thing} are whole?",
)
TEST = (
    "A shelf holds {a} {thing}, and {name} puts {b} on it. How many {thing} does it hold now?",
    "{name} finds {a} {thing} today and {b} tomorrow. How many {thing} in all?",
    "{sum} {thing} lay on a table until {name} took {b}. How many {thing} stayed?",
)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("apples", "pens", "shells", "stamps", "coins", "books", "cups", "nails")
RIGHT = {True: "{a} + {b} = {sum}", False: "{sum} - {b} = {a}"}  # the answer that fine-tuning shows, by whether it adds


def problems(count: int, wordings: Sequence[str], numbers: Sequence[tuple[int, int]], draw: random.Random) -> list[str]:
    """Rows as JSON, each of other numbers or words."""
    made = dict[str, str]()
    while len(made) < count:
        a, b = draw.choice(numbers)
        wording = draw.choice(wordings)
        how = {"a": a, "b": b, "sum": a + b, "name": draw.choice(NAMES), "thing": draw.choice(THINGS)}
        adds = "{sum}" not in wording
        messages = [
            {"role": "user", "content": wording.format(**how)},
            {"role": "assistant", "content": RIGHT[adds].format(**how)},
        ]
        row = {"messages": messages, "answer": str(a + b if adds else a)}
        made[messages[0]["content"]] = json.dumps(row)
    return [*made.values()]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="sums in words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=13, help="the largest number in a problem, but for sums")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    pairs = [(a, b) for a in range(3, args.most) for b in range(3, args.most)]
    draw.shuffle(pairs)
    held, known = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]
    for name, count, wordings, numbers in (
        ("train", 600, TRAIN, known), ("valid", 60, TRAIN, held), ("test", 200, TEST, held)
    ):  # fmt: skip
        (HERE / f"{name}.jsonl").write_text("\n".join(problems(count, wordings, numbers, draw)) + "\n")


if __name__ == "__main__":
    main()
