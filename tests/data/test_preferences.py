"""Preference rows of every form become a prompt and its answers; every rule that a row can break is one problem."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit.data.forms import FORMS, Sample, recognise, sample, samples
from fourbit.data.row import BadRow, Row
from fourbit.errors import InputError

S = {"role": "system", "content": "Be brief."}
U = {"role": "user", "content": "What colour is the sky?"}
A = {"role": "assistant", "content": "Blue."}
B = {"role": "assistant", "content": "Green."}
U2 = {"role": "user", "content": "Sure?"}
CONTEXT = {**A, "weight": 0}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def turns(human: str, *answers: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, *({"from": "gpt", "value": answer} for answer in answers)]


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answered(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


Expected = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]
# what a row is, and the prompt, chosen and rejected it must become
GOOD: dict[str, tuple[dict[str, Any], Expected]] = {
    "trl strings": ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, ([said("Sky?")], [A], [B])),
    "trl messages": ({"prompt": [S, U], "chosen": [A], "rejected": [B]}, ([S, U], [A], [B])),
    "a prompt's answers are context": (
        {"prompt": [U, A, U2], "chosen": [A], "rejected": [B]},
        ([U, CONTEXT, U2], [A], [B]),
    ),
    "several turns of an answer": ({"prompt": [U], "chosen": [A, U2, A], "rejected": [B]}, ([U], [A, U2, A], [B])),
    "implicit prompt": ({"chosen": [S, U, A], "rejected": [S, U, B]}, ([S, U], [A], [B])),
    "implicit prompt with context": (
        {"chosen": [U, A, U2, A], "rejected": [U, A, U2, B]},
        ([U, CONTEXT, U2], [A], [B]),
    ),
    "implicit prompt, marks beside the content": (
        {"chosen": [{**U, "id": 1}, A], "rejected": [{**U, "id": 2}, B]},
        ([{**U, "id": 1}], [A], [B]),
    ),
    "one conversation goes on where the other ends": (
        {"chosen": [U, A], "rejected": [U, A, U2, B]},
        ([U], [A], [A, U2, B]),
    ),
    "the question stands beside whole conversations": (
        {"prompt": U["content"], "chosen": [S, U, A], "rejected": [S, U, B]},
        ([S, U], [A], [B]),
    ),
    "a string and lists of answers": ({"prompt": "Sky?", "chosen": [A], "rejected": [B]}, ([said("Sky?")], [A], [B])),
    "the prompt stands in front of each answer too": (
        {"prompt": [S, U], "chosen": [S, U, A], "rejected": [S, U, B]},
        ([S, U], [A], [B]),
    ),
    "a null prompt is none": ({"prompt": None, "chosen": [U, A], "rejected": [U, B]}, ([U], [A], [B])),
    "messages and strings": ({"prompt": [U], "chosen": "Blue.", "rejected": "Green."}, ([U], [A], [B])),
    "strings alone": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ([said("The sky is")], [answered("blue.")], [answered("green.")]),
    ),
    "strings alone, never cut in a word": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ([said("The sky is")], [answered("blue.")], [answered("black.")]),
    ),
    "strings alone, one the beginning of the other": (
        {"chosen": "The sky is", "rejected": "The sky is green."},
        ([said("The sky")], [answered("is")], [answered("is green.")]),
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Sky?\n\nAssistant: It is blue.\nYes.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Sky?\n\nAssistant: It is green.",
        },
        (
            [said("Hi"), {**answered("Hello!"), "weight": 0}, said("Sky?")],
            [answered("It is blue.\nYes.")],
            [answered("It is green.")],
        ),
    ),
    "a system text and a question": (
        {"system": "Be brief.", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        ([S, said("Sky?")], [A], [B]),
    ),
    "an empty system text": (
        {"system": "", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        ([said("Sky?")], [A], [B]),
    ),
    "openai": (
        {"input": {"messages": [S, U]}, "preferred_output": [A], "non_preferred_output": [B]},
        ([S, U], [A], [B]),
    ),
    "sharegpt": (
        {
            "conversations": turns("Sky?"),
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
        ([said("Sky?")], [A], [B]),
    ),
    "sharegpt, all its roles": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                *turns("Hi", "Hello"),
                {"from": "tool", "value": "{}"},
                {"from": "observation", "value": "{}"},
                {"from": "Human", "value": "Sky?"},
            ],
            "chosen": {"from": "assistant", "value": "Blue."},
            "rejected": {"role": "assistant", "content": "Green."},
        },
        (
            [
                S,
                said("Hi"),
                {**answered("Hello"), "weight": 0},
                {"role": "tool", "content": "{}"},
                {"role": "tool", "content": "{}"},
                said("Sky?"),
            ],
            [A],
            [B],
        ),
    ),
    "sharegpt with a system text, answers in lists": (
        {"system": "Be brief.", "conversations": turns("Sky?"), "chosen": [A], "rejected": [B]},
        ([S, said("Sky?")], [A], [B]),
    ),
    "alpaca": (
        {"instruction": "Sky?", "input": "Noon.", "chosen": "Blue.", "rejected": "Green."},
        ([said("Sky?\nNoon.")], [A], [B]),
    ),
    "alpaca with history": (
        {
            "instruction": "Sky?",
            "input": "",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
            "chosen": "Blue.",
            "rejected": "Green.",
        },
        ([S, said("Hi"), {**answered("Hello"), "weight": 0}, said("Sky?")], [A], [B]),
    ),
}


def made(data: dict[str, Any]) -> Sample:
    return sample(Row(data, "rows.jsonl", 7), "pairs")


@pytest.mark.parametrize("case", GOOD)
def test_every_form_becomes_a_prompt_and_two_answers(case: str) -> None:
    data, expected = GOOD[case]
    before = copy.deepcopy(data)
    got = made(data)
    assert (got.context, *got.answers) == expected
    assert data == before, "the row itself was changed"
    assert (got.file, got.line) == ("rows.jsonl", 7)
    assert bool(got.notes) == case.startswith("strings alone")
    assert got.names == ("chosen", "rejected")


def test_tools_reach_both_answers() -> None:
    trl = made({"prompt": [U], "chosen": [A], "rejected": [B], "tools": TOOLS})
    openai = made(
        {"input": {"messages": [U], "tools": TOOLS}, "preferred_output": [A], "non_preferred_output": [B], "id": 5}
    )
    sharegpt = made({"conversations": turns("Sky?"), "chosen": A, "rejected": B, "tools": TOOLS})
    for row in (trl, openai, sharegpt):
        assert row.tools == TOOLS


GOOD_JUDGED: dict[str, tuple[dict[str, Any], bool, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "trl strings": ({"prompt": "Sky?", "completion": "Blue.", "label": True}, True, [said("Sky?")], [A]),
    "trl messages": ({"prompt": [U, A, U2], "completion": [B], "label": False}, False, [U, CONTEXT, U2], [B]),
    "alpaca": ({"instruction": "Sky?", "input": "", "output": "Green.", "kto_tag": False}, False, [said("Sky?")], [B]),
    "sharegpt": (
        {"conversations": turns("Hi", "Hello") + turns("Sky?", "Blue."), "kto_tag": True},
        True,
        [said("Hi"), {**answered("Hello"), "weight": 0}, said("Sky?")],
        [A],
    ),
    "messages": ({"messages": [S, U, B], "kto_tag": False}, False, [S, U], [B]),
}


@pytest.mark.parametrize("case", GOOD_JUDGED)
def test_every_unpaired_form_becomes_a_prompt_and_a_judged_answer(case: str) -> None:
    data, label, prompt, completion = GOOD_JUDGED[case]
    got = sample(Row(data, "f", 1), "judged")
    assert (got.label, got.context, got.answers, got.names) == (label, prompt, (completion,), ("completion",))


P = {"prompt": "p", "chosen": "c", "rejected": "r"}
USE = '{"prompt": ..., "chosen": ..., "rejected": ...}'
# the row, its problem after `rows.jsonl:7: `, and the kind it is counted as
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "sft": (
        {"messages": [U, A]},
        "row: is not a preference pair, keys are 'messages'; it looks like a row to learn from, which"
        f" `fourbit sft` reads: use {USE}",
        "form",
    ),
    "judged": (
        {"prompt": "p", "completion": "c", "label": True},
        "row: is not a preference pair, keys are 'prompt', 'completion', 'label'; it looks like an answer with a"
        f" judgement, which losses for unpaired answers take: use {USE}",
        "form",
    ),
    "nothing": ({}, f"row: is not a preference pair, keys are none: use {USE}", "form"),
    "rejected missing": (
        {"prompt": "p", "chosen": "c"},
        "rejected: is missing: the row needs both `chosen` and `rejected`",
        "row",
    ),
    "a string and a list": (
        {**P, "rejected": [B]},
        "chosen, rejected: must both be strings or both be lists of messages, not a string and a list",
        "row",
    ),
    "null": (
        {**P, "chosen": None},
        "chosen, rejected: must both be strings or both be lists of messages, not null and a string",
        "row",
    ),
    "chosen empty": ({**P, "chosen": ""}, "chosen: is empty", "empty"),
    "rejected blank": ({**P, "rejected": " \n"}, "rejected: holds only white space", "empty"),
    "prompt empty": ({**P, "prompt": ""}, "prompt: is empty", "empty"),
    "prompt list empty": ({"prompt": [], "chosen": [A], "rejected": [B]}, "prompt: is an empty list", "empty"),
    "chosen list empty": ({"prompt": [U], "chosen": [], "rejected": [B]}, "chosen: is an empty list", "empty"),
    "answer message empty": (
        {"prompt": [U], "chosen": [A], "rejected": [answered("")]},
        "rejected[0].content: is empty",
        "empty",
    ),
    "prompt a number": ({**P, "prompt": 5}, "prompt: must be a string, not a number", "row"),
    "identical strings": (
        {**P, "rejected": "c"},
        "chosen, rejected: are the same: a pair needs two different answers",
        "identical",
    ),
    "identical lists": (
        {"prompt": [U], "chosen": [A], "rejected": [{**A, "id": 9}]},
        "chosen, rejected: are the same: a pair needs two different answers",
        "identical",
    ),
    "identical conversations": (
        {"chosen": [U, A], "rejected": [U, A]},
        "chosen, rejected: are the same: a pair needs two different answers",
        "identical",
    ),
    "identical strings without a prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is blue."},
        "chosen, rejected: are the same: a pair needs two different answers",
        "identical",
    ),
    "identical outputs": (
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [A]},
        "preferred_output, non_preferred_output: are the same: a pair needs two different answers",
        "identical",
    ),
    "prompts differ": (
        {"chosen": [U, A], "rejected": [U2, B]},
        "chosen[0]: is the first message in which the two differ, and by 'user': their prompts are not the same",
        "prompt",
    ),
    "later prompts differ": (
        {"chosen": [U, A, U, A], "rejected": [U, A, U2, B]},
        "chosen[2]: is the first message in which the two differ, and by 'user': their prompts are not the same",
        "prompt",
    ),
    "one prompt is longer": (
        {"chosen": [U, A], "rejected": [U, U2, B]},
        "rejected[1]: is the first message in which the two differ, and by 'user': their prompts are not the same",
        "prompt",
    ),
    "systems differ": (
        {"chosen": [S, U, A], "rejected": [U, A]},
        "chosen[0]: is the first message in which the two differ, and by 'system': their prompts are not the same",
        "prompt",
    ),
    "no prompt in either": (
        {"chosen": [A], "rejected": [B]},
        "prompt: is empty: an answer needs something before it",
        "row",
    ),
    "strings that share no word": (
        {"chosen": "Blue.", "rejected": "Black."},
        "prompt: is missing, and chosen and rejected share no first words that could be it: add the prompt to the row",
        "prompt",
    ),
    "another question beside the conversations": (
        {"prompt": "Sea?", "chosen": [U, A], "rejected": [U, B]},
        "prompt: is none of the messages that chosen and rejected begin with: leave it out, or mend the row",
        "prompt",
    ),
    "answers begin with another prompt": (
        {"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]},
        "chosen: must be by the assistant, but its first message has the role 'user'",
        "row",
    ),
    "the prompt alone in front": (
        {"prompt": [U], "chosen": [U, A], "rejected": [U]},
        "rejected: holds the prompt alone, and no answer",
        "empty",
    ),
    "an answer ends with a question": (
        {"prompt": [U], "chosen": [A], "rejected": [B, U2]},
        "rejected: must be by the assistant, but its last message has the role 'user'",
        "row",
    ),
    "all weights 0": (
        {"prompt": [U], "chosen": [{**A, "weight": 0}], "rejected": [B]},
        "chosen: every assistant turn has weight 0: nothing to train",
        "nothing to train",
    ),
    "bad message": (
        {"prompt": [U], "chosen": [{"role": "gpt", "content": "x"}], "rejected": [B]},
        "chosen[0].role: is 'gpt': did you mean 'assistant'?",
        "row",
    ),
    "transcript that ends with a question": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"},
        "rejected: must be by the assistant, but its last message has the role 'user'",
        "row",
    ),
    "tools a string": ({**P, "tools": "x"}, "tools: must be a list of objects, not a string", "row"),
    "system a number": ({**P, "system": 1}, "system: must be a string, not a number", "row"),
    "openai, weights 0": (
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [{**B, "weight": 0}]},
        "non_preferred_output: every assistant turn has weight 0: nothing to train",
        "nothing to train",
    ),
    "openai without input": (
        {"preferred_output": [A], "non_preferred_output": [B]},
        "input: must be an object with `messages`, not null",
        "row",
    ),
    "openai without messages": (
        {"input": {}, "preferred_output": [A], "non_preferred_output": [B]},
        "input.messages: must be a list of messages, not null",
        "row",
    ),
    "openai, one output": (
        {"input": {"messages": [U]}, "preferred_output": [A]},
        "non_preferred_output: is missing: the row needs both `preferred_output` and `non_preferred_output`",
        "row",
    ),
    "openai, output by a user": (
        {"input": {"messages": [U]}, "preferred_output": [U], "non_preferred_output": [B]},
        "preferred_output[0].role: must be 'assistant', not 'user'",
        "row",
    ),
    "sharegpt, unknown role": (
        {"conversations": [{"from": "narrator", "value": "x"}], "chosen": A, "rejected": B},
        "conversations[0].from: is 'narrator': must be one of system, developer, user, assistant, tool",
        "row",
    ),
    "sharegpt, value missing": (
        {"conversations": [{"from": "human"}], "chosen": A, "rejected": B},
        "conversations[0].value: is missing",
        "row",
    ),
    "sharegpt, an answer as a string": (
        {"conversations": turns("Sky?"), "chosen": "Blue.", "rejected": "Green."},
        "chosen[0]: must be an object with `role` and `content`, not a string",
        "row",
    ),
    "sharegpt, answer by a human": (
        {"conversations": turns("Sky?"), "chosen": {"from": "human", "value": "x"}, "rejected": B},
        "chosen: must be by the assistant, but its first message has the role 'user'",
        "row",
    ),
    "alpaca, instruction empty": (
        {"instruction": "", "input": "", "chosen": "c", "rejected": "r"},
        "instruction: is empty",
        "empty",
    ),
    "alpaca, input a list": (
        {"instruction": "i", "input": ["x"], "chosen": "c", "rejected": "r"},
        "input: must be a string, not a list",
        "row",
    ),
    "alpaca, an answer as a list": (
        {"instruction": "i", "chosen": [A], "rejected": [B]},
        "chosen: must be a string, not a list",
        "row",
    ),
    "alpaca, history of three": (
        {"instruction": "i", "history": [["a", "b", "c"]], "chosen": "c", "rejected": "r"},
        "history[0]: must be [question, answer]",
        "row",
    ),
}
BAD_JUDGED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a pair": (
        P,
        "row: is not an answer with a judgement, keys are 'prompt', 'chosen', 'rejected'; it looks like a preference"
        ' pair, which `fourbit dpo` reads: use {"prompt": ..., "completion": ..., "label": true or false}',
        "form",
    ),
    "label a number": (
        {"prompt": "p", "completion": "c", "label": 1},
        "label: must be true (a good answer) or false, not a number",
        "row",
    ),
    "tag a string": (
        {"messages": [U, A], "kto_tag": "true"},
        "kto_tag: must be true (a good answer) or false, not a string",
        "row",
    ),
    "completion empty": ({"prompt": "p", "completion": "", "label": True}, "completion: is empty", "empty"),
    "prompt missing": (
        {"completion": "c", "label": True},
        "prompt: is missing: a prompt/completion row needs both",
        "row",
    ),
    "one message": (
        {"conversations": turns("x", "y")[1:], "kto_tag": True},
        "prompt: is empty: an answer needs something before it",
        "row",
    ),
    "no answer": (
        {"conversations": turns("x") * 2, "kto_tag": True},
        "last message: must be by the assistant, but its first message has the role 'user'",
        "row",
    ),
    "output missing": ({"instruction": "i", "kto_tag": True}, "output: must be a string, not null", "row"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_one_clear_problem(case: str) -> None:
    data, says, kind = BAD[case]
    with pytest.raises(BadRow) as caught:
        made(data)
    assert str(caught.value) == f"rows.jsonl:7: {says}"
    assert caught.value.problem.kind == kind


@pytest.mark.parametrize("case", BAD_JUDGED)
def test_a_bad_judged_row_is_one_clear_problem(case: str) -> None:
    data, says, kind = BAD_JUDGED[case]
    with pytest.raises(BadRow) as caught:
        sample(Row(data, "rows.jsonl", 7), "judged")
    assert str(caught.value) == f"rows.jsonl:7: {says}"
    assert caught.value.problem.kind == kind


def form_of(data: dict[str, Any], kind: Any) -> str | None:
    found = recognise(data, kind)
    return None if found is None else found.name


def test_forms_are_recognised() -> None:
    for kind, rows in (("pairs", GOOD), ("judged", GOOD_JUDGED)):
        assert {form_of(row[0], kind) for row in rows.values()} == {f.name for f in FORMS if f.kind == kind}
    assert form_of({"prompt": "p"}, "pairs") is None
    assert form_of({"prompt": "p", "kto_tag": True}, "judged") is None
    # a set that holds the chosen conversation once more, as `messages`
    assert form_of({"messages": [U, A], "chosen": [U, A], "rejected": [U, B]}, "pairs") is not None


def test_a_row_of_another_form_is_named() -> None:
    openai = GOOD["openai"][0]
    rows = [*(Row(P, "f.jsonl", line) for line in (1, 2, 3)), Row(openai, "f.jsonl", 4), Row({}, "f.jsonl", 5)]
    good, problems = samples(rows, "pairs")
    assert [row.line for row in good] == [1, 2, 3]
    assert [problem.kind for problem in problems] == ["form", "form"]
    assert str(problems[0]) == (
        "f.jsonl:4: row: is of the preferred_output/non_preferred_output form, but this file's first rows are of the"
        " prompt/chosen/rejected form: one form a file"
    )
    tagged, label = {"messages": [U, A], "kto_tag": True}, {"prompt": "p", "completion": "c", "label": True}
    kept, refused = samples([Row(tagged, "g", 1), Row(tagged, "g", 2), Row(label, "g", 3)], "judged")
    assert len(kept) == 2 and "of the prompt/completion/label form" in str(refused[0])


def test_an_implicit_prompt_is_the_one_that_trl_finds() -> None:
    from trl import extract_prompt

    for case, (data, _) in GOOD.items():
        if case.startswith("implicit") and "marks" not in case:
            theirs, ours = extract_prompt(data), made(data)
            bare = [{key: value for key, value in message.items() if key != "weight"} for message in ours.context]
            assert (bare, *ours.answers) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    theirs = extract_prompt(GOOD["strings alone"][0])
    ours = made(GOOD["strings alone"][0])
    assert theirs["prompt"] == ours.context[0]["content"]
    assert theirs["chosen"].strip() == ours.answers[0][0]["content"]


def test_marks_that_no_model_sees_make_no_other_prompt() -> None:
    plain, marked = (
        made({"prompt": [{**U, **mark}], "chosen": [{**A, **mark}], "rejected": [B]}) for mark in ({}, {"id": 7})
    )
    assert plain.topic() == marked.topic() and plain.content() == marked.content()
    assert made({"prompt": [U2], "chosen": [A], "rejected": [B]}).topic() != plain.topic()


def test_rows_are_grouped_by_prompt_and_told_apart_by_all() -> None:
    one, other = made(P), made({**P, "rejected": "another"})
    assert one.topic() == other.topic() and one.content() != other.content()
    assert one.topic() != made({**P, "prompt": "q"}).topic()
    good, bad = (
        sample(Row({"prompt": "p", "completion": "c", "label": label}, "f", 1), "judged") for label in (True, False)
    )
    assert good.topic() == bad.topic() and good.content() != bad.content()


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
KEYS = sorted({key for data, *_ in (*GOOD.values(), *GOOD_JUDGED.values()) for key in data} | {"tools"})


@st.composite
def broken(draw: Any) -> dict[str, Any]:
    """A good row of some form of which up to three fields are replaced, added or lost; or any keys at all."""
    rows = [data for data, *_ in (*GOOD.values(), *GOOD_JUDGED.values())]
    row = dict(draw(st.sampled_from([{}, *rows])))
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
            row = sample(Row(data, "f", 1), kind)
        except BadRow as bad:
            assert isinstance(bad, InputError) and str(bad).startswith("f:1: ") and bad.problem.kind
            continue
        assert json.dumps([row.content(), row.topic()])
        assert bool(row.context) == (kind != "sft")
        assert len(row.answers) == (kind != "prompts") + (kind == "pairs") - (row.text is not None)
        assert all(m.get("weight") == 0 for m in row.context if m["role"] == "assistant")
        for answer in row.answers:
            assert answer[-1]["role"] == "assistant" and (kind == "sft" or answer[0]["role"] == "assistant")
            assert all(isinstance(message["content"], str) for message in row.context + answer)
    assert data == before
