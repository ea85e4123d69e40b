"""Write train.jsonl, valid.jsonl and test.jsonl: two sums in words, and an answer; a program can tell who is right.

`python make_problems.py [--seed N]`. Of the answers that fine-tuning shows, most give the result alone and some the way
to it: people answer so. Test problems have numbers that stand in no other problem and are asked in words of their own,
so what is right there was not remembered.
"""

import argparse
import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
Wordings = dict[str, tuple[str, ...]]  # by the signs of the two sums
TRAIN: Wordings = {
    "+-": (
        "{name} has {a} {thing}, buys {b} more and gives away {c}. How many {thing} are left?",
        "There are {a} {thing} in a box and {b} in a bag; {c} of them are broken. How many {thing} are whole?",
        "{name} finds {a} {thing}, then {b} others, and loses {c}. How many {thing} are left?",
    ),
    "++": (
        "{name} has {a} {thing}, buys {b} and is given {c}. How many {thing} does {name} have?",
        "There are {a} {thing} in a box, {b} in a bag and {c} on a table. How many {thing} are there?",
        "{name} counts {a} {thing}, then {b} others, then {c}. How many is that?",
    ),
    "-+": (
        "{name} has {a} {thing}, gives away {b} and buys {c}. How many {thing} does {name} have?",
        "Of {a} {thing} in a box {b} are taken out, and {c} are put in. How many {thing} are in it then?",
        "{name} had {a} {thing}, lost {b} and found {c}. How many {thing} does {name} have now?",
    ),
}
TEST: Wordings = {
    "+-": ("{name} picks {a} {thing}, is given {b} more and loses {c}. How many {thing} does {name} keep?",),
    "++": ("{name} sees {a} {thing} today, {b} tomorrow and {c} on Sunday. How many {thing} in all?",),
    "-+": ("A shop has {a} {thing}, gives away {b} and gets {c} more. How many {thing} does the shop have?",),
}
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("apples", "pens", "shells", "stamps", "coins", "books", "cups", "nails")
Triple = tuple[int, int, int]


def worked(signs: str, a: int, b: int, c: int) -> tuple[str, int]:
    """The way to the answer, and the answer."""
    between = a + b if signs[0] == "+" else a - b
    result = between + c if signs[1] == "+" else between - c
    return f"{a} {signs[0]} {b} = {between}, {between} {signs[1]} {c} = {result}", result


def problems(count: int, wordings: Wordings, numbers: Sequence[Triple], ways: float, draw: random.Random) -> list[str]:
    """Rows as JSON, each of other numbers or words; of the answers a share of `ways` shows the way."""
    made = dict[str, str]()
    while len(made) < count:
        a, b, c = draw.choice(numbers)
        signs = draw.choice([*wordings])
        text = draw.choice(wordings[signs]).format(a=a, b=b, c=c, name=draw.choice(NAMES), thing=draw.choice(THINGS))
        way, result = worked(signs, a, b, c)
        if result < 0 or (signs[0] == "-" and a < b):
            continue
        shown = way if draw.random() < ways else str(result)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": shown}]
        made[text] = json.dumps({"messages": messages, "answer": str(result)})
    return [*made.values()]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="two sums in words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=7, help="the largest number in a problem")
    parser.add_argument("--ways", type=float, default=0.2, help="share of the answers that show the way")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    triples = [*product(range(2, args.most + 1), repeat=3)]
    draw.shuffle(triples)
    held, known = triples[: len(triples) // 5], triples[len(triples) // 5 :]
    for name, count, wordings, numbers in (
        ("train", 600, TRAIN, known), ("valid", 60, TRAIN, held), ("test", 200, TEST, held)
    ):  # fmt: skip
        (HERE / f"{name}.jsonl").write_text("\n".join(problems(count, wordings, numbers, args.ways, draw)) + "\n")


if __name__ == "__main__":
    main()
