"""The ticket example: its data are what its generator writes, labels follow the rule, and words alone do not tell.

The score that `make demo` claims is checked by running it, among the slow tests.
"""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "tickets"
SPLITS = ("train", "valid", "test")
CATEGORIES = {"bug", "access", "billing", "request", "question"}
TEAMS = {"bug": {"support", "engineering"}, "access": {"support", "engineering"}, "billing": {"finance"}}
TEAMS |= {"request": {"product"}, "question": {"support"}}


def script(name: str) -> ModuleType:
    """A script of the example as a module (its folder is no package)."""
    spec = importlib.util.spec_from_file_location(f"tickets_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return script("make_tickets")


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    return script("baselines")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def phrases() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "phrases.toml").read_text("utf-8"))


def ticket(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def answer(row: dict[str, Any]) -> str:
    return str(row["messages"][2]["content"])


def labels(row: dict[str, Any]) -> dict[str, str]:
    return dict(part.split(": ") for part in answer(row).split(" / "))


def test_committed_files_are_what_the_generator_writes(generator: ModuleType) -> None:
    for split in SPLITS:
        assert generator.jsonl(generator.make_split(split)).encode() == (FOLDER / f"{split}.jsonl").read_bytes(), split
    assert generator.jsonl(generator.make_split("test", seed=1)) != generator.jsonl(generator.make_split("test"))


def test_sizes_and_balance(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert len(rows["train"]) >= 300 and len(rows["valid"]) >= 40 and len(rows["test"]) >= 200
    for split in SPLITS:
        for field, values in {"category": 5, "priority": 3}.items():
            counts = Counter(labels(row)[field] for row in rows[split])
            assert len(counts) == values
            assert max(counts.values()) - min(counts.values()) <= 5, f"{split}: {field} dealt in turn, so about equal"
        troubled = Counter(labels(row)["team"] for row in rows[split] if labels(row)["category"] in ("bug", "access"))
        assert min(troubled.values()) >= 0.35 * troubled.total(), f"{split}: who is affected is about even"


def test_rows_are_chats_and_no_ticket_occurs_twice(rows: dict[str, list[dict[str, Any]]]) -> None:
    every = [row for split in SPLITS for row in rows[split]]
    assert {tuple(message["role"] for message in row["messages"]) for row in every} == {("system", "user", "assistant")}
    assert len({ticket(row) for row in every}) == len(every)
    assert not [ticket(row) for row in every if "{" in ticket(row) or re.search(r"(^|[.?] )[a-z]", ticket(row))]


def test_every_label_follows_the_rule(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The rule of the README, written a second time from its words."""
    for row in itertools.chain(*rows.values()):
        facts, said = row["facts"], labels(row)
        assert said["category"] == facts["about"] in CATEGORIES
        assert said["priority"] == {"today": "high", "days": "medium", "whenever": "low"}[facts["when"]]
        assert said["team"] in TEAMS[said["category"]]
        if len(TEAMS[said["category"]]) > 1:
            assert said["team"] == ("engineering" if facts["who"] == "many" else "support")


def test_facts_are_in_the_ticket(rows: dict[str, list[dict[str, Any]]], phrases: dict[str, Any]) -> None:
    """Each row names its phrases; they stand in the ticket, and they say what the facts say."""
    for split in SPLITS:
        for row in rows[split]:
            banks = [name.partition(".")[0] for name in row["phrases"]]
            for name in row["phrases"]:
                bank, number = name.split(".")
                assert pattern(phrases[bank][split][int(number)]).search(ticket(row)), (split, name, ticket(row))
            about, when, who = row["facts"].values()
            assert banks.count(about) == 1 and not set(banks) & (CATEGORIES - {about}) and f"not_{about}" not in banks
            assert set(banks) & {"today", "days", "whenever"} in ({when}, set()), "another time than the fact"
            assert set(banks) & {"one", "many"} in ({who}, set()), "another number of people than the fact"
            assert when in banks or when == "days", "only the middle priority goes without saying"
            assert who in banks or who == "one" or about not in ("bug", "access"), "only one user goes without saying"


def pattern(phrase: str) -> re.Pattern[str]:
    """A phrase as it may stand in a ticket: blanks filled in, a capital at a sentence's start."""
    text = re.sub(r"\\{\w+\\}", ".+?", re.escape(phrase))
    return re.compile(text, re.IGNORECASE)


def test_no_phrase_of_a_test_ticket_occurs_in_train(
    rows: dict[str, list[dict[str, Any]]], phrases: dict[str, Any]
) -> None:
    lists = {split: {text for name in phrases if name != "fill" for text in phrases[name][split]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not lists[one] & lists[other]
    train = " \n ".join(ticket(row) for row in rows["train"])
    found = [text for text in sorted(lists["test"]) if pattern(text).search(train)]
    assert not found, "a test phrase stands in a train ticket, if under another name"


def test_test_tickets_share_few_word_sequences_with_train(
    rows: dict[str, list[dict[str, Any]]], baselines: ModuleType, phrases: dict[str, Any]
) -> None:
    """Five words in a row, the filled-in names aside: those of test tickets are nearly all unseen."""
    names = sorted(itertools.chain(*phrases["fill"].values()), key=len, reverse=True)

    def sequences(row: dict[str, Any]) -> set[tuple[str, ...]]:
        text = re.sub("|".join(map(re.escape, names)), "X", ticket(row), flags=re.IGNORECASE)
        words = baselines.words(text)
        return set(zip(*(words[i:] for i in range(5)), strict=False))

    train = set().union(*(sequences(row) for row in rows["train"]))
    shares = [len(sequences(row) & train) / len(sequences(row)) for row in rows["test"]]
    assert sum(shares) / len(shares) < 0.02


def test_words_alone_do_not_tell(rows: dict[str, list[dict[str, Any]]], baselines: ModuleType) -> None:
    train = baselines.read_tickets(FOLDER / "train.jsonl")
    texts, truth = zip(*baselines.read_tickets(FOLDER / "test.jsonl"), strict=True)
    known = [text for text, _ in train]
    seen = baselines.score(baselines.bag_of_words(train, known), [right for _, right in train])
    assert seen["exact"] > 0.95, "the classifier is a fair one: it knows the tickets it was fitted on"
    words = baselines.score(baselines.bag_of_words(train, list(texts)), list(truth))
    most = baselines.score(baselines.majority(train, len(texts)), list(truth))
    assert most["exact"] < 0.15 < words["exact"] < 0.45


def test_score_counts_fields_and_exact_answers(baselines: ModuleType) -> None:
    right = "category: bug / priority: low / team: support"
    said = [right, f" {right}\n", "category: bug / priority: high / team: support", "The team: support", ""]
    scores = baselines.score(said, [right] * len(said))
    assert scores == {"exact": 2 / 5, "category": 3 / 5, "priority": 2 / 5, "team": 3 / 5}


@pytest.mark.slow
def test_demo_scores_what_it_promises(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, FOLDER / "demo.py", "--out", tmp_path], check=False)
    assert done.returncode == 0
    figures = json.loads((tmp_path / "scores.json").read_text())
    exact = {name: values["exact"] for name, values in figures["scores"].items()}
    assert exact["base model"] <= 0.20 and exact["tuned model"] >= 0.75
    assert exact["tuned model"] >= exact["bag of words"] + 0.25
    assert figures["peak_rss_gib"] < 1.5
    assert {"adapter_model.safetensors", "metrics.jsonl", "loss.png"} <= {path.name for path in tmp_path.iterdir()}
