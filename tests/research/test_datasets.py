"""A researcher's rows: lists, HF and torch datasets, generators, ready tokens; each trains as its file would."""

import itertools
import json
from collections import UserDict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import fourbit
from fourbit.data import read
from fourbit.data.encode import load
from fourbit.data.order import fingerprint
from fourbit.data.row import Row
from fourbit.errors import InputError

ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TALK = {"messages": [ASK, SAY]}


class Mapped(torch.utils.data.Dataset):  # type: ignore[type-arg]  # as users write it
    """Map-style, without a length; ends with IndexError, as sequences do."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Sized(Mapped):
    """With one; it would go on for ever, so that only its length says where it ends."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]  # as users write it
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


SHAPES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "lists of messages": lambda rows: [row["messages"] for row in rows],
    "mappings": lambda rows: [UserDict(row) for row in rows],
    "datasets.Dataset": datasets.Dataset.from_list,
    "datasets, a subset": lambda rows: datasets.Dataset.from_list([*rows, TALK]).select(range(len(rows))),
    "datasets.IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2),
    "IterableDataset of a generator": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "torch, no length": Mapped,
    "torch, a length": Sized,
    "torch, a subset": lambda rows: torch.utils.data.Subset(Sized(rows), range(len(rows))),
    "torch, a stream": Stream,
    "torch, a loader": lambda rows: torch.utils.data.DataLoader(rows, batch_size=None),
}


def adapted(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = fourbit.load(folder)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, alpha=4), seed=0)
    return model, tokenizer


def trainer_of(folder: Path, out: Path, train: Any, val: Any = None, **options: Any) -> fourbit.SFTTrainer:
    config = fourbit.SFTConfig(out=str(out), **({"batch_size": 4, "lr": 1e-2, "epochs": 1} | options))
    return fourbit.SFTTrainer(*adapted(folder), train=train, val=val, config=config)


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_the_rows_that_a_file_of_them_holds(
    shape: str, tiny_folder: Path, rows: Path, val_rows: Path, tmp_path: Path
) -> None:
    made = [SHAPES[shape]([json.loads(line) for line in file.read_text().splitlines()]) for file in (rows, val_rows)]
    ours = trainer_of(tiny_folder, tmp_path, *made)
    assert ours.fingerprint == trainer_of(tiny_folder, tmp_path, rows, val_rows).fingerprint
    assert [e.source for e in ours.train_set.examples[:2]] == ["row 1 of train", "row 2 of train"]
    assert ours.val_set.examples[0].source == "row 1 of val"


def test_an_hf_dataset_trains_bit_for_bit_as_its_file(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found = datasets.Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])
    losses = [
        trainer_of(tiny_folder, Path(out), given, batch_size=11)
        .train(display=None)
        .loss  # "train": the name of the rows is no path
        for out, given in (("file", rows), ("train", found))
    ]
    assert losses[0] is not None and losses[0] == losses[1]


PAIRS = [{"prompt": "say a", "chosen": "aaa", "rejected": "b"}, {"prompt": "say c", "chosen": "c", "rejected": "ccd"}]
TALKS = [
    {"prompt": [ASK], "chosen": [SAY], "rejected": [{"role": "assistant", "content": word, "name": None}]}
    for word in ("no", "never")
]


@pytest.mark.parametrize("pairs", [PAIRS, TALKS, [{**row, "system": None, "tools": None} for row in PAIRS]])
def test_preferences_of_an_hf_dataset(pairs: list[dict[str, Any]], tiny_folder: Path, tmp_path: Path) -> None:
    """Columns hold None where a row lacks the key."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    config = fourbit.DPOConfig(out=str(tmp_path / "out"), epochs=1, batch_size=2)
    made = [
        fourbit.DPOTrainer(*adapted(tiny_folder), train=given, config=config)
        for given in (datasets.Dataset.from_list(pairs), datasets.Dataset.from_list(pairs).to_iterable_dataset(), file)
    ]
    assert len({trainer.fingerprint for trainer in made}) == 1
    if pairs is TALKS:
        assert made[0].train(display=None).steps == 1


READY: dict[str, Callable[[list[int], list[int]], dict[str, Any]]] = {
    "lists": lambda ids, labels: {"input_ids": ids, "labels": labels},
    "numpy": lambda ids, labels: {"input_ids": np.array(ids, np.int32), "labels": np.array(labels)},
    "torch": lambda ids, labels: {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)},
    "a mask": lambda ids, labels: {"input_ids": ids, "labels": labels, "attention_mask": [True] * len(ids)},
    "padding": lambda ids, labels: {
        "input_ids": torch.tensor([*ids, 5, 5]),
        "labels": torch.tensor([*labels, -100, -100]),
        "attention_mask": torch.tensor([1] * len(ids) + [0, 0]),
    },
}


@pytest.mark.parametrize("form", READY)
def test_ready_tokens_are_taken_as_they_are(form: str, tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    tokenizer = fourbit.load(tiny_folder)[1]
    (wanted,) = zip(*(example.parts for example in load(rows, tokenizer).examples), strict=True)
    labels = [[i if t else -100 for i, t in zip(part.ids, part.trained, strict=True)] for part in wanted]
    given = [READY[form](part.ids, label) for part, label in zip(wanted, labels, strict=True)]
    trainer = trainer_of(tiny_folder, tmp_path, given, 0.2)
    assert fingerprint(load(given, tokenizer)) == fingerprint(load(rows, tokenizer))
    assert len(trainer.train_set) + len(trainer.val_set) == len(given) and len(trainer.val_set) > 1
    if form != "padding":
        return
    assert trainer.train(display=None).loss is not None
    with torch.no_grad():  # as transformers' loss of the same labels: they are not shifted
        ids, label = torch.tensor(wanted[0].ids), torch.tensor(labels[0])
        logits = trainer.model.lm_head(trainer.model.hidden(ids[None]))[0]
        theirs = torch.nn.functional.cross_entropy(logits[:-1], label[1:], ignore_index=-100)
    ours = fourbit.evaluate_loss(trainer.model, given[:1], tokenizer)
    assert ours == pytest.approx(theirs.item(), rel=1e-5)


def test_a_formatted_hf_dataset_of_ready_tokens(tiny_folder: Path) -> None:
    tokenizer = fourbit.load(tiny_folder)[1]
    plain = datasets.Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}] * 2)
    made = {fingerprint(load(plain.with_format(form), tokenizer)) for form in (None, "numpy", "torch")}
    assert len(made) == 1


BAD: dict[str, tuple[Any, str]] = {
    "a text": ([TALK, "hello"], "row 2 of rows: row: is a string, not an object"),
    "None": ([TALK, None], "row 2 of rows: row: is null, not an object"),
    "one row": (TALK, "rows is one dict, of ['messages']: give a list of rows, or one of its parts"),
    "a DatasetDict": (datasets.DatasetDict(train=datasets.Dataset.from_list([TALK])), "of ['train']: give a list"),
    "no rows": ([], "rows holds no rows: give one dict a row"),
    "a spent generator": ((_ for _ in ()), "a generator gives its rows but once"),
    "a number": (5, "rows must be a file's path, several, a list of dicts or another iterable of dicts, got 5 (int)"),
    "nothing": (None, "got None (NoneType)"),
    "an object": ([{"messages": [ASK, SAY], "when": datetime(2020, 1, 1)}], "when holds a datetime, which is no text"),
    "a picture": (
        [{**TALK, "image": object()}],
        "image holds a object, which is no text, number or list: leave the key",
    ),
    "bytes": ([{"messages": [ASK, {**SAY, "content": b"x"}]}], "messages[1].content holds a bytes"),
    "NaN, as pandas fills holes": ([{**TALK, "system": float("nan")}], "system holds nan, which is no text"),
    "a key of another type": ([{**TALK, 1: 2}], "the row has the key 1, which is no text"),
    "half a character": ([{"messages": [ASK, {**SAY, "content": "\ud800"}]}], "holds a lone surrogate"),
    "a bad role": (
        [TALK, {"messages": [{**ASK, "role": "User "}, SAY]}],
        "row 2 of rows: messages[0].role: is 'User '",
    ),
    "another form": (
        [TALK, {"prompt": "a", "completion": "b"}],
        "row 2 of rows: row: is of the prompt/completion form",
    ),
    "tokens alone": ([{"input_ids": [1, 2]}], "labels: must be a list of whole numbers, of one row, not None"),
    "a batch": (
        [{"input_ids": [[1, 2]], "labels": [[1, 2]]}],
        "input_ids: must be a list of whole numbers, of one row",
    ),
    "floats": ([{"input_ids": [1.0, 2.0], "labels": [1, 2]}], "input_ids: must be a list of whole numbers"),
    "booleans": ([{"input_ids": [1, 2], "labels": [True, True]}], "labels: must be a list of whole numbers"),
    "no tokens": ([{"input_ids": [], "labels": []}], "input_ids: must be a list of whole numbers"),
    "lengths": ([{"input_ids": [1, 2], "labels": [1]}], "labels: has 1 numbers, and input_ids 2: one for each token"),
    "shifted labels": (
        [{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}],
        "labels[0]: is neither -100 (not trained) nor",
    ),
    "a hole": (
        [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}],
        "attention_mask: must be 1 for every token, but for padding at the end",
    ),
    "padding on the left": (
        [{"input_ids": [0, 2, 3], "labels": [-100, 2, 3], "attention_mask": [0, 1, 1]}],
        "attention_mask: must be 1 for every token, but for padding at the end",
    ),
    "trained padding": (
        [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 0]}],
        "labels[2]: is neither -100",
    ),
    "a token of another vocabulary": (
        [{"input_ids": [1, 259], "labels": [1, 259]}],
        "holds 259, and the tokenizer has",
    ),
    "a token below 0": ([{"input_ids": [1, -1], "labels": [1, -1]}], "input_ids: holds -1, and the tokenizer has"),
    "nothing to train": ([{"input_ids": [1, 2], "labels": [1, -100]}], "nothing to train"),
    "packed by another tool": (
        [{"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}],
        "position_ids: holds tokens or a loss mask of another tool",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_object_is_one_clear_sentence(case: str, tiny_folder: Path) -> None:
    given, says = BAD[case]
    with pytest.raises(InputError) as caught:
        load(given, fourbit.load(tiny_folder)[1])
    assert says in str(caught.value)


def test_good_rows_are_left_where_bad_ones_are_skipped(tiny_folder: Path, tmp_path: Path) -> None:
    given = [TALK, None, {"messages": "x"}, {**TALK, "note": "y"}]
    trainer = trainer_of(tiny_folder, tmp_path, given, on_bad_row="skip", batch_size=2)
    report = trainer.train_set.report
    assert (report.rows, report.skipped.kinds) == (2, {"json": 1, "row": 1})
    assert "1 of 2 rows: not used: 'note'" in report.notices


@pytest.mark.parametrize(
    "endless", [lambda: itertools.repeat(TALK), lambda: Mapped(type("", (list,), {"__getitem__": lambda *_: TALK})())]
)
def test_what_has_no_end_is_told_of_and_the_advice_works(endless: Any, tiny_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(read, "MAX_UNCOUNTED", 50)
    tokenizer = fourbit.load(tiny_folder)[1]
    with pytest.raises(
        InputError, match=r"rows goes on after 50 rows: list\(itertools.islice\(rows, N\)\) takes the first N"
    ):
        load(endless(), tokenizer)
    assert len(load(list(itertools.islice(iter(endless()), 60)), tokenizer)) == 60, "what has a length has an end"


def test_a_run_goes_on_with_the_same_rows_alone(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    trainer_of(tiny_folder, tmp_path, given, schedule="constant", batch_size=11).train(display=None)
    options: dict[str, Any] = {"schedule": "constant", "epochs": 2, "resume": "auto", "batch_size": 11}
    for other in (given[::-1], [*given[:-1], TALK]):
        with pytest.raises(InputError, match="a run on other training data; resume with the same"):
            trainer_of(tiny_folder, tmp_path, other, **options).train(display=None)
    assert trainer_of(tiny_folder, tmp_path, iter(given), **options).train(display=None).steps == 4


def test_evaluations_take_rows(tiny_folder: Path, rows: Path) -> None:
    model, tokenizer = fourbit.load(tiny_folder)
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    wanted = fourbit.evaluate_loss(model, load(rows, tokenizer).examples)
    for shape in (rows, given, datasets.Dataset.from_list(given), iter(given), load(rows, tokenizer)):
        assert fourbit.evaluate_loss(model, shape, tokenizer) == wanted
    answers = [*fourbit.answer_all(model, tokenizer, None, given[:3], max_new_tokens=3)]
    assert [a.source for a in answers] == ["row 1 of rows", "row 2 of rows", "row 3 of rows"]
    assert fourbit.share_right(answers) == 0
    with pytest.raises(InputError, match="row 1 of rows: text: has no messages, so it asks for no answer"):
        [*fourbit.answer_all(model, tokenizer, None, [{"input_ids": [1, 2], "labels": [1, 2]}])]


def test_chats_in_tokens_and_packing_stand_alone(tiny_folder: Path, rows: Path) -> None:
    model, tokenizer = fourbit.load(tiny_folder)
    talks = [row.data["messages"] for row in fourbit.data.read_rows(rows) if isinstance(row, Row)][:3]
    examples = load(rows, tokenizer).examples[:3]
    made = [fourbit.data.encode_chat(talk, tokenizer) for talk in talks]
    assert made == [(example.parts[0].ids, example.parts[0].trained) for example in examples]
    batch, same = fourbit.data.pack(made), fourbit.data.pack([*enumerate(examples)])
    assert batch.spans == same.spans and torch.equal(batch.position_ids, same.position_ids)
    with torch.no_grad():
        hidden = model.hidden(batch.input_ids, batch.position_ids, batch.spans).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[batch.rows]), batch.targets)
    assert loss.item() == pytest.approx(fourbit.evaluate_loss(model, examples), rel=1e-5)
    tools = [{"type": "function", "function": {"name": "look"}}]
    says = "{{ tools[0].function.name }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    template = fourbit.data.ChatTemplate(says)
    ids, _ = fourbit.data.encode_chat([ASK, SAY], tokenizer, template=template, tools=tools)
    assert tokenizer.decode(ids) == "look|hi|yes"
    with pytest.raises(InputError, match="row 1 of rows: last message: has the role 'user'"):
        fourbit.data.encode_chat([ASK], tokenizer)
    with pytest.raises(ValueError, match="without a trained token after its first"):
        fourbit.data.pack([([1, 2], [True, False])])
    for mask in ([False, True], [-100, -100, 3]):  # one too short, and labels
        with pytest.raises(ValueError, match=r"example 1 needs a mask of 3 times True or False, as its tokens, got \["):
            fourbit.data.pack([([1, 2], [0, 1]), ([1, 2, 3], mask)])


def test_a_dataset_is_shown_by_its_counts_and_its_kind_is_checked(tiny_folder: Path) -> None:
    tokenizer = fourbit.load(tiny_folder)[1]
    data = load([TALK, {"messages": [ASK, SAY]}], tokenizer)
    assert "rows=2" in repr(data) and "ids=" not in repr(data)
    with pytest.raises(InputError, match="kind must be one of sft, pairs, judged or prompts, got 'dpo'"):
        load([TALK], tokenizer, "dpo")  # type: ignore[arg-type]  # wrong on purpose
