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
    for row in itertools.chain(*rows.values()):
        banks = [name.partition(".")[0] for name in row["phrases"]]
        fillers: dict[str, str] = {}
        for name in row["phrases"]:
            found = blanks(phrases, name).search(ticket(row))
            assert found, (name, ticket(row))
            fillers |= found.groupdict()
        about, when, who = row["facts"].values()
        assert [bank for bank in banks if bank in CATEGORIES] == [about] and f"not_{about}" not in banks
        check_time(banks, fillers, when, phrases["fill"])
        check_people(banks, fillers, who, phrases["fill"], needed=about in ("bug", "access") and who == "many")


def check_time(banks: list[str], fillers: dict[str, str], when: str, lists: dict[str, list[str]]) -> None:
    said = [bank for bank in banks if bank in ("urgent", "idle", "date", "new_date")]
    assert said in ([], ["date"], ["new_date"], [{"today": "urgent", "whenever": "idle"}.get(when)])
    assert said or when == "days", "only the middle priority goes without saying"
    assert "want" not in fillers or is_one_of(fillers["want"], lists[when])
    assert "other" not in fillers or not is_one_of(fillers["other"], lists[when])


def check_people(
    banks: list[str], fillers: dict[str, str], who: str, lists: dict[str, list[str]], *, needed: bool
) -> None:
    said = [bank for bank in banks if bank in ("affected", "contrasted", "only_me", "not_only_me")]
    assert said in ([], ["affected"], ["contrasted"], [{"one": "only_me", "many": "not_only_me"}[who]])
    assert said or not needed, "only one user goes without saying"
    assert "hit" not in fillers or is_one_of(fillers["hit"], lists[who])
    assert "spared" not in fillers or not is_one_of(fillers["spared"], lists[who])


def is_one_of(text: str, words: list[str]) -> bool:
    return text.lower() in (word.lower() for word in words)  # a sentence's first word has a capital


def blanks(phrases: dict[str, Any], name: str) -> re.Pattern[str]:
    """The named phrase as it may stand in a ticket: dates and people that it has room for in named groups."""
    bank, _, number = name.partition(".")
    lists = {"want": ["today", "days", "whenever"], "other": ["today", "days", "whenever"]}
    lists |= {"hit": ["one", "many"], "spared": ["one", "many"]}
    text = re.escape(phrases["phrases"][bank][int(number)].rstrip("?"))
    for blank in re.findall(r"\\{(\w+)\\}", text):
        words = [word for fill in lists.get(blank, [blank]) for word in phrases["fill"][fill]]
        choice = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        text = text.replace(f"\\{{{blank}\\}}", f"(?P<{blank}>{choice})", 1)
    return re.compile(f"(?:^|(?<=[.?] )|(?<=, but ))(?i:{text})(?=[.,?]|$)")


def test_no_phrase_of_a_test_ticket_occurs_in_train(
    rows: dict[str, list[dict[str, Any]]], phrases: dict[str, Any]
) -> None:
    used = {split: {name for row in rows[split] for name in row["phrases"]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not used[one] & used[other]
    train = " \n ".join(ticket(row) for row in rows["train"])
    assert not [name for name in sorted(used["test"]) if blanks(phrases, name).search(train)]


def test_test_tickets_share_few_word_sequences_with_train(
    rows: dict[str, list[dict[str, Any]]], baselines: ModuleType, phrases: dict[str, Any]
) -> None:
    """Five words in a row, what fills the blanks aside: those of test tickets are nearly all unseen."""
    names = sorted(itertools.chain(*phrases["fill"].values()), key=len, reverse=True)
    blank = re.compile("|".join(map(re.escape, names)), re.IGNORECASE)

    def sequences(row: dict[str, Any]) -> set[tuple[str, ...]]:
        words = [baselines.words(part) for part in re.split("[.?] ", blank.sub("X", ticket(row)))]
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
