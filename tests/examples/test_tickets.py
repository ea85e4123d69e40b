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
PRIVATE_TEAMS = {"delivery": "logistics", "payment": "finance", "account": "support", "product": "returns"}


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
def phrases() -> dict[str, list[str]]:
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
        for field, values in {"category": 4, "priority": 3}.items():
            counts = Counter(labels(row)[field] for row in rows[split])
            assert len(counts) == values
            assert max(counts.values()) - min(counts.values()) <= 5, f"{split}: {field} dealt in turn, so about equal"
        business = sum(labels(row)["team"] == "business" for row in rows[split])
        assert 0.35 <= business / len(rows[split]) <= 0.65, f"{split}: business customers are about half"


def test_rows_are_chats_and_no_ticket_occurs_twice(rows: dict[str, list[dict[str, Any]]]) -> None:
    every = [row for split in SPLITS for row in rows[split]]
    assert {tuple(message["role"] for message in row["messages"]) for row in every} == {("system", "user", "assistant")}
    assert len({ticket(row) for row in every}) == len(every)
    assert not [ticket(row) for row in every if "{" in ticket(row) or re.search(r"(^|[.] )[a-z]", ticket(row))]


def test_every_label_follows_the_rule(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The rule of the README, written a second time from its words."""
    for row in itertools.chain(*rows.values()):
        facts, said = row["facts"], labels(row)
        assert said["category"] == facts["category"] and said["priority"] == facts["priority"]
        private = PRIVATE_TEAMS[facts["category"]]
        assert said["team"] == {"business": "business", "private": private}[facts["customer"]]


def test_facts_are_in_the_ticket(rows: dict[str, list[dict[str, Any]]], phrases: dict[str, list[str]]) -> None:
    """Each row names its three phrases: they stand in the ticket, and in the banks of its facts."""
    for row in itertools.chain(*rows.values()):
        facts = row["facts"]
        banks = (facts["category"], facts["priority"], facts["customer"])
        for bank, phrase in zip(banks, row["phrases"], strict=True):
            assert phrase in phrases[bank] and phrase.lower() in ticket(row).lower()


def test_banks_are_wide_and_no_phrase_has_two_meanings(phrases: dict[str, list[str]]) -> None:
    every = [phrase for bank in phrases.values() for phrase in bank]
    assert len(set(every)) == len(every) and min(len(bank) for bank in phrases.values()) >= 35


def test_no_phrase_of_a_test_ticket_occurs_in_train(rows: dict[str, list[dict[str, Any]]]) -> None:
    used = {split: {phrase for row in rows[split] for phrase in row["phrases"]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not used[one] & used[other]
    train = " \n ".join(ticket(row).lower() for row in rows["train"])
    assert not [phrase for phrase in sorted(used["test"]) if phrase.lower() in train]


def test_test_tickets_share_few_word_sequences_with_train(
    rows: dict[str, list[dict[str, Any]]], baselines: ModuleType
) -> None:
    """Five words in a row, inside a sentence: those of test tickets are nearly all unseen."""

    def sequences(row: dict[str, Any]) -> set[tuple[str, ...]]:
        words = [baselines.words(phrase) for phrase in row["phrases"]]
        return {five for part in words for five in zip(*(part[i:] for i in range(5)), strict=False)}

    train = set().union(*(sequences(row) for row in rows["train"]))
    test = [five for row in rows["test"] for five in sequences(row)]
    assert sum(five in train for five in test) < 0.05 * len(test)


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
    right = "category: account / priority: low / team: support"
    said = [right, f" {right}\n", "category: account / priority: high / team: support", "The team: support", ""]
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
