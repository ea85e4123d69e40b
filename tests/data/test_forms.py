"""Rows of every form become samples; every rule that a row can break is one problem.

`good_rows.jsonl` holds rows of each kind and the sample that each must become, `bad_rows.jsonl` rows and what is said.
"""

import copy
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit.data import forms
from fourbit.data.forms import ASIDE, FORMS, WANTED, kind_of, recognise, sample
from fourbit.data.forms import samples as read_samples
from fourbit.data.keys import CALL, ELSEWHERE, TURN
from fourbit.data.row import BadRow, Place, Problems, Row, counted
from fourbit.data.sample import Sample
from fourbit.errors import InputError

GOOD, BAD = (
    {f"{case['kind']}: {case['case']}": case for case in map(json.loads, path.read_text().splitlines())}
    for path in (Path(__file__).with_name(f"{name}_rows.jsonl") for name in ("good", "bad"))
)
BESIDE = ("label", "text", "tools", "variables")
ANSWERS = {"sft": ("",), "pairs": ("chosen", "rejected"), "judged": ("completion",)}
S = {"role": "system", "content": "Be brief."}
U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Hello"}
B = {"role": "assistant", "content": "Green."}
P = {"prompt": "p", "chosen": "c", "rejected": "r"}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def samples(rows: Sequence[Row | BadRow], kind: Any) -> tuple[list[Sample], Problems]:
    problems = Problems()
    return list(read_samples(rows, kind, problems)), problems


def made(data: dict[str, Any], kind: Any = "sft") -> Sample:
    return sample(Row(data, Place("rows.jsonl", 7)), kind)


@pytest.mark.parametrize("case", GOOD)
def test_every_form_becomes_a_sample(case: str) -> None:
    given = GOOD[case]
    kind, data = given["kind"], given["row"]
    before = copy.deepcopy(data)
    got = made(data, kind)
    assert (got.context, [*got.answers]) == (given["context"], given["answers"])
    assert (got.label, got.text, got.tools, got.variables) == tuple(given.get(name) for name in BESIDE)
    assert [*got.notes] == given.get("notes", [])
    assert sorted({key.place for key in got.passed}) == sorted(given.get("passed", []))
    assert set(map(type, parts_of([got.context, *got.answers, got.tools, got.variables]))) <= {dict, list}
    assert data == before, "the row itself was changed"
    assert got.source == "rows.jsonl:7" and got.row == (data if kind == "prompts" else {})
    assert kind == "prompts" or got.names == ANSWERS[kind]


def parts_of(value: Any) -> list[Any]:
    """All objects and lists of a JSON value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] * isinstance(value, (dict, list)) + [part for inner in inside for part in parts_of(inner)]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_clear_problem(case: str) -> None:
    given = BAD[case]
    with pytest.raises(BadRow) as caught:
        made(given["row"], given["kind"])
    problem = caught.value
    assert str(caught.value) == f"rows.jsonl:7: {given['says']}"
    assert (problem.place, problem.kind) == (Place("rows.jsonl", 7), given["counted"])


def test_the_tables_are_whole() -> None:
    assert len(BAD) >= 140
    found = {(case["kind"], form_of(case["row"], case["kind"])) for case in GOOD.values()}
    assert found == {(form.kind, form.name) for form in FORMS}


def form_of(data: dict[str, Any], kind: Any) -> str | None:
    found = recognise(data, kind)
    return None if found is None else found.name


@pytest.mark.parametrize(
    ("kind", "data", "form"),
    [
        ("sft", chat(U, A, prompt="as in some public sets", prompt_id=3), "chat"),
        ("sft", {"prompt": "p"}, "prompt/completion"),
        ("sft", {"prompt": "p", "completion": "c", "label": "a topic"}, "prompt/completion"),
        ("sft", {"prompt": "p", "chosen": "c"}, None),
        ("sft", {"conversations": []}, "conversations"),
        ("sft", {"conversations": [], "chosen": {}}, None),
        ("sft", {"instruction": "i", "kto_tag": True}, None),
        ("sft", {"text": "t", "id": 3}, "text"),
        ("sft", {"text": "t", "input": "i"}, None),
        ("pairs", {"prompt": "p"}, None),
        ("pairs", chat(U, A, chosen=[U, A], rejected=[U, B]), "prompt/chosen/rejected"),  # the chosen one once more
        ("judged", {"prompt": "p", "kto_tag": True}, None),
    ],
)
def test_forms_are_recognised(kind: str, data: dict[str, Any], form: str | None) -> None:
    assert form_of(data, kind) == form


def test_fields_that_are_not_used_are_said() -> None:
    assert made(chat(U, A, id=3, source="x")).notes == ("not used: 'id'", "not used: 'source'")
    assert made({"instruction": "i", "output": "o", "text": "t"}).notes == ("not used: 'text'",)


def test_unused_fields_are_counted_by_key_and_do_not_flood() -> None:
    rows = [made(chat(U, A, id=i, **{f"odd{i}": i})) for i in range(3000)]
    notices = counted(Counter(note for row in rows for note in row.notes), 3000)
    assert notices[:2] == ["3000 of 3000 rows: not used: 'id'", "1 of 3000 rows: not used: 'odd0'"]
    assert len(notices) == 9 and notices[-1] == "... and 2993 more keys that are not used"
    nine = made(chat(U, A, **dict.fromkeys("abcdefghi", 1))).notes
    assert len(nine) == 9 and nine[-1] == "not used: 'i'"


def test_rows_are_grouped_by_prompt_and_told_apart_by_all() -> None:
    """And marks that no model sees make no other row."""
    marked = made(chat(U, {**A, "id": 7}))
    assert (marked.content(), marked.topic()) == (made(chat(U, A)).content(), made(chat(U, A)).topic())
    one, other = made(P, "pairs"), made({**P, "rejected": "another"}, "pairs")
    assert one.topic() == other.topic() and one.content() != other.content()
    assert one.topic() != made({**P, "prompt": "q"}, "pairs").topic()
    plain, marked = (
        made({"prompt": [{**U, **mark}], "chosen": [{**A, **mark}], "rejected": [B]}, "pairs")
        for mark in ({}, {"id": 7})
    )
    assert plain.topic() == marked.topic() and plain.content() == marked.content()
    good, bad = (made({"prompt": "p", "completion": "c", "label": label}, "judged") for label in (True, False))
    assert good.topic() == bad.topic() and good.content() != bad.content()
    text = made({"text": " Once upon"})
    assert text.content() != made({"text": "Twice"}).content() and text.topic() == [" Once upon"]


def test_prompts_may_mix_their_forms() -> None:
    good, problems = samples([Row({"prompt": "p"}, Place("f", 1)), Row(chat(U), Place("f", 2))], "prompts")
    assert len(good) == 2 and problems == []


@pytest.mark.parametrize(
    ("kind", "first", "other", "forms"),
    [
        ("sft", chat(U, A), {"prompt": "p", "completion": "c"}, ("prompt/completion", "chat")),
        ("pairs", P, GOOD["pairs: openai"]["row"], ("preferred_output/non_preferred_output", "prompt/chosen/rejected")),
        (
            "judged",
            chat(U, A, kto_tag=True),
            {"prompt": "p", "completion": "c", "label": True},
            ("prompt/completion/label", "messages/kto_tag"),
        ),
    ],
)
def test_a_row_of_another_form_is_named(kind: Any, first: Any, other: Any, forms: tuple[str, str]) -> None:
    rows = [
        *(Row(first, Place("f.jsonl", line)) for line in (1, 2, 3)),
        Row(other, Place("f.jsonl", 4)),
        Row({}, Place("f.jsonl", 5)),
    ]
    good, problems = samples(rows, kind)
    assert [row.place.number for row in good] == [1, 2, 3] and [problem.kind for problem in problems] == [
        "form",
        "form",
    ]
    assert str(problems[0]) == (
        f"f.jsonl:4: row: is of the {forms[0]} form, but the first rows are of the {forms[1]} form: one form a file"
    )


def test_the_first_200_rows_decide_and_later_ones_are_still_checked() -> None:
    pair = {"prompt": "p", "completion": "c"}
    rows = [Row(pair if i <= 101 else chat(U, A), Place("f", i)) for i in range(1, 500)]
    good, problems = samples(rows, "sft")
    assert {conv.place.number for conv in good} == {*range(1, 102)}
    assert {problem.place.number for problem in problems} == {*range(102, 500)}


def test_unknown_rows_do_not_decide_the_form() -> None:
    rows = [Row({"x": 1}, Place("f", 1)), Row({"x": 1}, Place("f", 2)), Row(chat(U, A), Place("f", 3))]
    good, problems = samples(rows, "sft")
    assert [conv.place.number for conv in good] == [3]
    assert [problem.kind for problem in problems] == ["form", "form"]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([chat(U, A), {"text": "t"}], "sft"),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}, chat(U, A)], "pairs"),
        ([{"messages": [U, A], "kto_tag": True}], "judged"),
        ([{"messages": [U, A], "chosen": [U, A], "rejected": [U, A]}], "pairs"),
        ([{"x": 1}], "sft"),
        ([{"prompt": "p", "completion": "c", "label": False}], "judged"),
        ([{"prompt": "p", "completion": "c", "label": "positive"}], "sft"),
    ],
)
def test_the_kind_of_a_file_is_told(rows: list[dict[str, Any]], kind: str, write: Callable[..., Path]) -> None:
    assert kind_of(write(rows)) == kind


def test_an_implicit_prompt_is_the_one_that_trl_finds() -> None:
    from trl import extract_prompt

    for name, case in GOOD.items():
        if name.startswith("pairs: implicit") and "marks" not in name:
            theirs, ours = extract_prompt(case["row"]), made(case["row"], "pairs")
            bare = [{key: value for key, value in message.items() if key != "weight"} for message in ours.context]
            assert (bare, *ours.answers) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    alone = GOOD["pairs: strings alone"]["row"]
    theirs, ours = extract_prompt(alone), made(alone, "pairs")
    assert theirs["prompt"] == ours.context[0]["content"]
    assert theirs["chosen"].strip() == ours.answers[0][0]["content"]


def objects_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the objects of a JSON value stand in it."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    return [path] * isinstance(value, dict) + [p for key, inner in items for p in objects_in(inner, (*path, key))]


def at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


KNOWN = sorted({key for keys in ELSEWHERE.values() for key in keys} | {"system", "functions", "function_call", "name"})
NEW_KEYS = st.one_of(
    st.sampled_from([*KNOWN, "messages", "answer", "history", "type", "id", "from"]), st.text(max_size=5)
)
VALUES = st.sampled_from([1, 0.5, True, False, "x", ["x"], {"x": 1}, [{"x": 1}], [U], '{"x": 1}'])


@settings(max_examples=200)
@given(st.data())
def test_no_key_is_dropped_in_silence(data: st.DataObject) -> None:
    """Another key anywhere in a row of any form: the row is refused, or it becomes another sample, or the key is told
    of. Of a prompt the answer is set aside."""
    case = GOOD[data.draw(st.sampled_from([*GOOD]))]
    kind, row = case["kind"], copy.deepcopy(case["row"])
    place = data.draw(st.sampled_from(objects_in(row) if kind != "prompts" else [()]))
    key, value = data.draw(NEW_KEYS), data.draw(VALUES)
    if at(row, place).get(key) is not None or (kind == "prompts" and key in ASIDE):
        return
    before = replace(made(row, kind), row={})
    if place and f"not used: {place[0]!r}" in before.notes:
        return
    at(row, place)[key] = value
    try:
        after = replace(made(row, kind), row={})
    except BadRow:
        return
    assert after != before, f"{key} at {place} changes nothing"


@settings(max_examples=100)
@given(st.data())
def test_null_is_absent_at_every_level(data: st.DataObject) -> None:
    case = GOOD[data.draw(st.sampled_from([*GOOD]))]
    kind, row = case["kind"], copy.deepcopy(case["row"])
    without = replace(made(row, kind), row={})
    for place in objects_in(row):
        for key in data.draw(st.lists(st.one_of(NEW_KEYS, st.sampled_from([*KEYS, *KNOWN])), max_size=3)):
            at(row, place).setdefault(key, None)
    assert replace(made(row, kind), row={}) == without


CALL_OF_F = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
HELD = {  # what a row or turn holds beside a key of ELSEWHERE, where it is not refused alone
    "functions": {"tools": [{"name": "f"}]},
    "function_call": {"tool_calls": [CALL_OF_F]},
}
ADVICE = {  # what becomes of a key, where it is not to be taken out
    "system_prompt": "system",
    "refusal": "content",
    **dict.fromkeys(ELSEWHERE[CALL], "arguments"),
}


@pytest.mark.parametrize(("level", "key"), [(level, key) for level, keys in ELSEWHERE.items() for key in keys])
def test_a_key_that_means_more_elsewhere_is_refused_and_the_advice_works(level: str, key: str) -> None:
    kind = level if level in WANTED else "sft"
    talk = chat(U, {**A, "tool_calls": [{"name": "f"}]})
    row = talk if kind == "sft" else copy.deepcopy(next(c["row"] for c in GOOD.values() if c["kind"] == kind))
    place = {TURN: talk["messages"][1], CALL: talk["messages"][1]["tool_calls"][0]}.get(level, row)
    place |= {key: "x" if key not in ELSEWHERE[CALL] else {"x": 1}, **HELD.get(key, {})}
    with pytest.raises(BadRow, match=re.escape(f"{key}: {ELSEWHERE[level][key]}")):
        made(row, kind)
    value = place.pop(key)
    if key in ADVICE:
        place[ADVICE[key]] = value
        assert ADVICE[key] in ELSEWHERE[level][key]
    assert not (told := made(row, kind)).notes and (key not in ADVICE or value in parts_and_texts(told))


def parts_and_texts(told: Sample) -> list[Any]:
    """The contents and the arguments of all turns of a sample."""
    turns = [*told.context, *(turn for answer in told.answers for turn in answer)]
    return [turn["content"] for turn in turns] + [
        call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())
    ]


def test_many_faults_are_counted_and_the_first_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that does not grow with them; where most rows are bad, reading stops and says so."""
    wrong = [BadRow(Place("f", line), "line", "is no JSON", "json") for line in range(1, 3001)]
    good, problems = samples([*(Row(chat(U, A), Place("f", line)) for line in range(1, 3001)), *wrong], "sft")
    assert (len(good), problems.total, len(problems), problems.kinds) == (3000, 3000, 1000, {"json": 3000})
    text = problems.describe("6000", "mend them")
    assert text.startswith("3000 of 6000 rows cannot be used; mend them:\nf:1: ") and text.endswith("and 2980 more")
    monkeypatch.setattr(forms, "MAX_BAD_ROWS", 1000)
    read = iter(wrong)
    with pytest.raises(InputError, match="1001 of the first 1001 rows cannot be used; so many"):
        samples(read, "sft")  # type: ignore[arg-type]  # wrong on purpose
    assert len(list(read)) == 3000 - 1001


def test_notices_of_a_hundred_thousand_keys_take_no_time() -> None:
    start = time.process_time()
    notices = counted(Counter(f"not used: 'k{i}'" for i in range(100_000)), 100_000)
    assert len(notices) == 9 and time.process_time() - start < 5


def test_keys_of_many_turns_take_linear_time() -> None:
    turns = [{**(U if i % 2 else A), "name": f"n{i}", "mood": i} for i in range(20_001)]
    start = time.process_time()
    told = made(chat(U, *turns))
    written = "".join(f"Hello n{i}" for i in range(20_001))
    assert told.remarks({"name"}, written) == {"not used: 'messages[].mood'"}
    assert told.remarks({"name", "mood"}, written[:-100]) <= {"not used: 'messages[].name'"}
    assert time.process_time() - start < 10


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2),
        st.just(0.5),
        st.sampled_from(["", " ", "x", "Hi there", "user", "assistant", "gpt", "system", "\n\nHuman: a", "{"]),
        st.sampled_from([U, A, B, S]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "messages", "type", "text"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
ROWS = [case["row"] for case in GOOD.values()]
KEYS = sorted({key for row in ROWS for key in row})


@st.composite
def broken(draw: Any) -> dict[str, Any]:
    """A good row of some form of which up to three fields are replaced, added or lost; or any keys at all."""
    row = dict(draw(st.sampled_from([{}, *ROWS])))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        row[key] = draw(JSON)
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=1)):
        row.pop(key, None)
    return row


@settings(max_examples=600)
@given(broken())
def test_any_row_is_taken_or_refused_as_a_row(data: dict[str, Any]) -> None:
    """Nothing but BadRow comes out, and what is taken keeps the promises of the shape."""
    before = copy.deepcopy(data)
    kinds: tuple[Any, ...] = ("sft", "pairs", "judged", "prompts")
    for kind in kinds:
        try:
            row = sample(Row(data, Place("f", 1)), kind)
        except BadRow as bad:
            assert isinstance(bad, InputError) and str(bad).startswith("f:1: ") and bad.kind
            continue
        assert json.dumps([row.content(), row.topic()])
        assert bool(row.context) == (kind != "sft")
        assert len(row.answers) == (kind != "prompts") + (kind == "pairs") - (row.text is not None)
        assert all(m.get("weight") == 0 for m in row.context if m["role"] == "assistant")
        for answer in row.answers:
            assert answer[-1]["role"] == "assistant" and (kind == "sft" or answer[0]["role"] == "assistant")
            assert all(isinstance(message["content"], str) for message in row.context + answer)
    assert data == before


@pytest.mark.parametrize(
    ("role", "more"),
    [("assistant", {"function_call": {}}), ("assistant", {"function_call": ""}), ("user", {"tool_calls": []})],
)
def test_empty_calls_say_nothing(role: str, more: dict[str, Any]) -> None:
    """As writers fill them in that give every turn the same keys."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    filled = [turn | (more if turn["role"] == role else {}) for turn in turns]
    made = sample(Row({"messages": filled}, Place("f", 1)), "sft")
    assert [(turn["role"], turn["content"]) for turn in made.answers[0]] == [("user", "a"), ("assistant", "b")]
    assert not made.notes and not made.passed and not any(turn.get("function_call") for turn in made.answers[0])
