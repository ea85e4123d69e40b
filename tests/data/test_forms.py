"""Rows to learn from and prompts, of every form, become samples; every rule that a row can break is one problem."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourbit.data.forms import Sample, kind_of, recognise, sample, samples
from fourbit.data.read import counted
from fourbit.data.row import BadRow, Row

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Hello"}
NOT = "is not a row to learn from, keys are"
USE = 'use {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'
PAIR = "it looks like a preference pair, which `fourbit dpo` reads"
JUDGED = "it looks like an answer with a judgement, which losses for unpaired answers take"
CALL_FORM = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
ROLES = "must be one of system, developer, user, assistant, tool"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


# the row, and what its problem says after `rows.jsonl:7: `
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no keys": ({}, f"row: {NOT} none: {USE}"),
    "unknown keys": ({"a": 1, "b": 2}, f"row: {NOT} 'a', 'b': {USE}"),
    "preference": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        f"row: {NOT} 'prompt', 'chosen', 'rejected'; {PAIR}: {USE}",
    ),
    "openai preference": (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        f"row: {NOT} 'input', 'preferred_output', 'non_preferred_output'; {PAIR}: {USE}",
    ),
    "an answer and its label": (
        {"prompt": "p", "completion": "c", "label": False},
        f"row: {NOT} 'prompt', 'completion', 'label'; {JUDGED}: {USE}",
    ),
    "a conversation and its tag": (chat(U, A, kto_tag=True), f"row: {NOT} 'messages', 'kto_tag'; {JUDGED}: {USE}"),
    "sharegpt preference": (
        {"conversations": [], "chosen": {}, "rejected": {}},
        f"row: {NOT} 'conversations', 'chosen', 'rejected'; {PAIR}: {USE}",
    ),
    "question and answer": ({"question": "q", "answer": "a"}, f"row: {NOT} 'question', 'answer': {USE}"),
    "text and a prompt": ({"prompt": "p", "text": "t"}, f"row: {NOT} 'prompt', 'text': {USE}"),
    "text and a question": ({"question": "q", "text": "t"}, f"row: {NOT} 'question', 'text': {USE}"),
    "text null": ({"text": None}, "text: must be a string, not null"),
    "text blank": ({"text": " \n"}, "text: holds only white space"),
    "sharegpt, unknown role": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "conversations[0].from: is 'narrator': must be one of system, developer, user, assistant, tool",
    ),
    "sharegpt, two contents": (
        {"conversations": [{"from": "human", "value": "x", "content": "y"}, {"from": "gpt", "value": "z"}]},
        "conversations[0]: has both `value` and `content`: keep one of them",
    ),
    "sharegpt, no answer": (
        {"conversations": [{"from": "human", "value": "x"}]},
        "last message: has the role 'user': a conversation must end with an assistant turn, the answer to learn",
    ),
    "alpaca without output": ({"instruction": "i"}, "output: must be a string, not null"),
    "alpaca, instruction empty": ({"instruction": "", "output": "o"}, "instruction: is empty"),
    "alpaca, history of three": (
        {"instruction": "i", "output": "o", "history": [["a", "b", "c"]]},
        "history[0]: must be [question, answer]",
    ),
    "two forms at once": (
        chat(U, A, completion="x"),
        "row: has both `messages` and `completion`: keep one of the two forms",
    ),
    "messages null": ({"messages": None}, "messages: must be a list of messages, not null"),
    "messages a string": ({"messages": "Hi"}, "messages: must be a list of messages, not a string"),
    "messages an object": ({"messages": U}, "messages: must be a list of messages, not an object"),
    "messages empty": (chat(), "messages: is an empty list"),
    "message a string": (chat("Hi", A), "messages[0]: must be an object with `role` and `content`, not a string"),
    "message null": (chat(U, None), "messages[1]: must be an object with `role` and `content`, not null"),
    "message a list": (chat([U], A), "messages[0]: must be an object with `role` and `content`, not a list"),
    "role missing": (chat({"content": "Hi"}, A), "messages[0].role: is missing"),
    "role null": (chat({"role": None, "content": "Hi"}, A), "messages[0].role: must be a string, not null"),
    "role a number": (chat({"role": 1, "content": "Hi"}, A), "messages[0].role: must be a string, not a number"),
    "role human": (chat({"role": "human", "content": "Hi"}, A), "messages[0].role: is 'human': did you mean 'user'?"),
    "role gpt": (chat(U, {"role": "gpt", "content": "x"}), "messages[1].role: is 'gpt': did you mean 'assistant'?"),
    "role model": (
        chat(U, {"role": "model", "content": "x"}),
        "messages[1].role: is 'model': did you mean 'assistant'?",
    ),
    "role in capitals": (
        chat({"role": "User", "content": "Hi"}, A),
        "messages[0].role: is 'User': did you mean 'user'?",
    ),
    "role with a space": (
        chat({"role": "user ", "content": "Hi"}, A),
        "messages[0].role: is 'user ': did you mean 'user'?",
    ),
    "role function": (
        chat(U, {"role": "function", "content": "x"}, A),
        "messages[1].role: is 'function': did you mean 'tool'?",
    ),
    "role unknown": (chat({"role": "narrator", "content": "Hi"}, A), f"messages[0].role: is 'narrator': {ROLES}"),
    "role empty": (chat({"role": "", "content": "Hi"}, A), f"messages[0].role: is '': {ROLES}"),
    "from and value": (
        chat({"from": "human", "value": "Hi"}, A),
        'messages[0]: has `from` where `role` is needed: a message is {"role": ..., "content": ...}',
    ),
    "value for content": (
        chat({"role": "user", "value": "Hi"}, A),
        'messages[0]: has `value` where `content` is needed: a message is {"role": ..., "content": ...}',
    ),
    "content missing": (chat({"role": "user"}, A), "messages[0].content: is missing"),
    "content null": (
        chat({"role": "user", "content": None}, A),
        "messages[0].content: must be a string or a list of text parts, not null",
    ),
    "content a number": (
        chat(U, {"role": "assistant", "content": 5}),
        "messages[1].content: must be a string or a list of text parts, not a number",
    ),
    "content a boolean": (
        chat(U, {"role": "assistant", "content": True}),
        "messages[1].content: must be a string or a list of text parts, not a boolean",
    ),
    "content an object": (
        chat({"role": "user", "content": {"text": "Hi"}}, A),
        "messages[0].content: must be a string or a list of text parts, not an object",
    ),
    "part a string": (
        chat({"role": "user", "content": ["Hi"]}, A),
        'messages[0].content[0]: must be an object {"type": "text", "text": ...}, not a string',
    ),
    "part an image": (
        chat({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, A),
        "messages[0].content[1].type: is 'image_url': only text parts can be trained on",
    ),
    "part without type": (
        chat({"role": "user", "content": [{"text": "x"}]}, A),
        "messages[0].content[0].type: is 'None': only text parts can be trained on",
    ),
    "part text null": (
        chat({"role": "user", "content": [{"type": "text", "text": None}]}, A),
        "messages[0].content[0].text: must be a string, not null",
    ),
    "no parts": (chat({"role": "user", "content": []}, A), "messages[0].content: is empty"),
    "user empty": (chat({"role": "user", "content": ""}, A), "messages[0].content: is empty"),
    "assistant empty": (chat(U, {"role": "assistant", "content": ""}), "messages[1].content: is empty"),
    "assistant blank": (
        chat(U, {"role": "assistant", "content": " \n"}),
        "messages[1].content: holds only white space",
    ),
    "assistant null": (
        chat(U, {"role": "assistant", "content": None}),
        "messages[1].content: must be a string or a list of text parts, not null",
    ),
    "weight 2": (chat(U, {**A, "weight": 2}), "messages[1].weight: must be 0 or 1, not 2"),
    "weight half": (chat(U, {**A, "weight": 0.5}), "messages[1].weight: must be 0 or 1, not 0.5"),
    "weight true": (chat(U, {**A, "weight": True}), "messages[1].weight: must be 0 or 1, not True"),
    "weight null": (chat(U, {**A, "weight": None}), "messages[1].weight: must be 0 or 1, not None"),
    "weight a string": (chat(U, {**A, "weight": "0"}), "messages[1].weight: must be 0 or 1, not '0'"),
    "weight on user": (
        chat({**U, "weight": 1}, A),
        "messages[0].weight: belongs on assistant turns only, this one is 'user'",
    ),
    "last turn user": (
        chat(U, A, U),
        "last message: has the role 'user': a conversation must end with an assistant turn, the answer to learn",
    ),
    "last turn tool": (
        chat(U, {**A, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}),
        "last message: has the role 'tool': a conversation must end with an assistant turn, the answer to learn",
    ),
    "only a user": (
        chat(U),
        "last message: has the role 'user': a conversation must end with an assistant turn, the answer to learn",
    ),
    "only an assistant": (chat(A), "first message: is an assistant turn: an answer needs something before it"),
    "all weights 0": (chat(U, {**A, "weight": 0}), "messages: every assistant turn has weight 0: nothing to train"),
    "tool calls on user": (
        chat({**U, "tool_calls": [CALL]}, A),
        "messages[0].tool_calls: belongs on assistant turns only, this one is 'user'",
    ),
    "tool calls an object": (
        chat(U, {**A, "tool_calls": CALL}),
        "messages[1].tool_calls: must be a list, not an object",
    ),
    "tool call a string": (
        chat(U, {**A, "tool_calls": ["f()"]}),
        f"messages[1].tool_calls[0]: must be an object {CALL_FORM}",
    ),
    "tool call without name": (
        chat(U, {**A, "tool_calls": [{"function": {"arguments": "{}"}}]}),
        f"messages[1].tool_calls[0]: must be an object {CALL_FORM}",
    ),
    "tool arguments no JSON": (
        chat(U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        "messages[1].tool_calls[0].arguments: is not valid JSON",
    ),
    "tool arguments a list": (
        chat(U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        "messages[1].tool_calls[0].arguments: must be a JSON object, not a list",
    ),
    "tools a string": (chat(U, A, tools="[]"), "tools: must be a list of objects, not a string"),
    "tools of strings": (chat(U, A, tools=["f"]), "tools: must be a list of objects, not a list"),
    "prompt alone": ({"prompt": "p"}, "completion: is missing: a prompt/completion row needs both"),
    "completion alone": ({"completion": "c"}, "prompt: is missing: a prompt/completion row needs both"),
    "prompt empty": ({"prompt": "", "completion": "c"}, "prompt: is empty"),
    "completion empty": ({"prompt": "p", "completion": ""}, "completion: is empty"),
    "completion blank": ({"prompt": "p", "completion": "\t"}, "completion: holds only white space"),
    "prompt null": (
        {"prompt": None, "completion": "c"},
        "prompt, completion: must both be strings or both be lists of messages, not null and a string",
    ),
    "prompt a list, completion a string": (
        {"prompt": [U], "completion": "c"},
        "prompt, completion: must both be strings or both be lists of messages, not a list and a string",
    ),
    "completion an object": (
        {"prompt": [U], "completion": A},
        "prompt, completion: must both be strings or both be lists of messages, not a list and an object",
    ),
    "prompt list empty": ({"prompt": [], "completion": [A]}, "prompt: is an empty list"),
    "completion list empty": ({"prompt": [U], "completion": []}, "completion: is an empty list"),
    "completion by a user": ({"prompt": [U], "completion": [U]}, "completion[0].role: must be 'assistant', not 'user'"),
    "completion ends with a user": (
        {"prompt": [U], "completion": [A, U]},
        "last message: has the role 'user': a conversation must end with an assistant turn, the answer to learn",
    ),
    "bad message in a prompt": (
        {"prompt": [{"role": "bot", "content": "x"}], "completion": [A]},
        "prompt[0].role: is 'bot': did you mean 'assistant'?",
    ),
    "bad message in a completion": (
        {"prompt": [U], "completion": [{"role": "assistant", "content": ""}]},
        "completion[0].content: is empty",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_clear_problem(case: str) -> None:
    data, says = BAD[case]
    with pytest.raises(BadRow) as caught:
        sample(Row(data, "rows.jsonl", 7), "sft")
    assert str(caught.value) == f"rows.jsonl:7: {says}"
    assert (caught.value.problem.file, caught.value.problem.line) == ("rows.jsonl", 7)


def test_there_are_enough_bad_rows() -> None:
    assert len(BAD) >= 70


def made(data: dict[str, Any]) -> Sample:
    return sample(Row(data, "rows.jsonl", 1), "sft")


def messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole conversation that a row becomes."""
    found = made(data)
    assert found.context == [] and found.text is None and found.label is None
    return found.answers[0]


def test_chat_passes_through() -> None:
    system = {"role": "system", "content": ""}
    assert messages(chat(system, U, A)) == [system, U, A]
    assert messages(chat({"role": "developer", "content": "Be brief."}, U, A))[0]["role"] == "developer"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert messages(chat({"role": "user", "content": parts}, A))[0]["content"] == "Hello"


def test_strings_become_a_user_and_an_assistant_turn() -> None:
    assert messages({"prompt": "p", "completion": "c"}) == [
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "c"},
    ]


def test_message_lists_are_one_conversation_whose_prompt_is_context() -> None:
    found = messages({"prompt": [U, A, U], "completion": [A]})
    assert [message["role"] for message in found] == ["user", "assistant", "user", "assistant"]
    assert [message.get("weight") for message in found] == [None, 0, None, None]


def test_tool_calls_and_tools_reach_the_template_with_arguments_as_objects() -> None:
    text_call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [text_call]}
    tool = {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"}
    conv = made(chat(U, answer, tool, A, tools=[{"type": "function"}]))
    assert conv.answers[0][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conv.answers[0][2] == tool
    assert conv.tools == [{"type": "function"}]
    bare = made(chat(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}))
    assert bare.answers[0][1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert messages(chat(U, {**A, "tool_calls": None}))[1] == A


def test_a_masked_turn_may_be_empty() -> None:
    masked = {"role": "assistant", "content": "", "weight": 0}
    assert messages(chat(U, masked, U, A))[1] == masked


def test_input_is_left_as_it_was() -> None:
    data = chat(U, {"role": "assistant", "content": [{"type": "text", "text": "x"}]})
    before = repr(data)
    made(data)
    assert repr(data) == before


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (chat(U, A), "chat"),
        (chat(U, A, prompt="as in some public sets", prompt_id=3), "chat"),
        ({"prompt": "p", "completion": "c"}, "prompt/completion"),
        ({"prompt": "p"}, "prompt/completion"),
        ({"prompt": "p", "completion": "c", "label": "a topic"}, "prompt/completion"),
        ({"prompt": "p", "chosen": "c"}, None),
        ({"conversations": []}, "conversations"),
        ({"conversations": [], "chosen": {}}, None),
        ({"instruction": "i", "text": "the whole, as the first Alpaca set has it"}, "instruction/output"),
        ({"instruction": "i", "kto_tag": True}, None),
        ({"text": "t", "id": 3}, "text"),
        ({"text": "t", "input": "i"}, None),
    ],
)
def test_forms_are_recognised(data: dict[str, Any], form: str | None) -> None:
    found = recognise(data, "sft")
    assert (found and found.name) == form


SAID = {"role": "user", "content": "Sky?\nNoon."}
HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0}]
OTHERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {  # a row of another tool's form, what it becomes
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be brief."},
        [{"role": "system", "content": "Be brief."}, U, A],
    ),
    "sharegpt, our words": ({"conversations": [U, A]}, [U, A]),
    "alpaca": ({"instruction": "Sky?", "input": "Noon.", "output": "Hello"}, [SAID, A]),
    "alpaca, no input": ({"instruction": "Hi", "input": "", "output": "Hello"}, [U, A]),
    "alpaca, all of it": (
        {"instruction": "Sky?", "input": "Noon.", "output": "Hello", "system": "S", "history": [["Hi", "Hello"]]},
        [{"role": "system", "content": "S"}, *HISTORY, SAID, A],
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_tools_rows_become_the_same_conversation(case: str) -> None:
    data, expected = OTHERS[case]
    assert messages(data) == expected and made(data).notes == ()


def test_tools_reach_a_sharegpt_row() -> None:
    assert made({"conversations": [U, A], "tools": [{"name": "f"}]}).tools == [{"name": "f"}]


def test_plain_text_is_a_sample_of_its_own() -> None:
    found = made({"text": " Once upon"})
    assert (found.text, found.answers, found.context) == (" Once upon", (), [])
    assert found.content() != made({"text": "Twice"}).content() and found.topic() == [" Once upon"]


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


def test_a_marked_message_is_the_same_topic() -> None:
    marked = made(chat(U, {**A, "id": 7}))
    assert (marked.content(), marked.topic()) == (made(chat(U, A)).content(), made(chat(U, A)).topic())


CONTEXT = {**A, "weight": 0}
PROMPTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "string": ({"prompt": "Hi", "completion": "not shown"}, [U]),
    "list": ({"prompt": [U, A, U]}, [U, CONTEXT, U]),
    "chat": (chat(U, A, U), [U, CONTEXT, U]),
    "chat with its answer": (chat(U, A, U, {"role": "assistant", "content": ""}), [U, CONTEXT, U]),
    "sharegpt with its answer": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "?"}]},
        [U],
    ),
    "sharegpt with an answer by the assistant": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "assistant", "value": "?"}]},
        [U],
    ),
    "alpaca": ({"instruction": "Sky?", "input": "Noon.", "output": "not shown", "answer": "old"}, [SAID]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_every_prompt_is_what_stands_before_the_answer(case: str) -> None:
    data, context = PROMPTS[case]
    found = sample(Row(data, "f", 1), "prompts")
    assert (found.context, found.answers, found.row, found.notes) == (context, (), data, ())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (chat(A), "prompt: is empty: an answer needs something before it"),
        ({"messages": "Hi"}, "messages: must be a list of messages, not a string"),
        ({"prompt": None}, "prompt: must be a string, not null"),
        ({"text": "t"}, "row: is not a prompt to answer, keys are 'text'; it looks like a row to learn"),
    ],
)
def test_a_bad_prompt_is_one_clear_problem(data: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRow) as caught:
        sample(Row(data, "f", 1), "prompts")
    assert str(caught.value).startswith(f"f:1: {says}")


def test_prompts_may_mix_their_forms() -> None:
    good, problems = samples([Row({"prompt": "p"}, "f", 1), Row(chat(U), "f", 2)], "prompts")
    assert len(good) == 2 and problems == []


def test_a_row_of_another_form_is_named() -> None:
    rows = [Row(chat(U, A), "f.jsonl", i) for i in range(1, 4)]
    rows.append(Row({"prompt": "p", "completion": "c"}, "f.jsonl", 4))
    good, problems = samples(rows, "sft")
    assert [conv.line for conv in good] == [1, 2, 3]
    assert [str(problem) for problem in problems] == [
        "f.jsonl:4: row: is of the prompt/completion form, but this file's first rows are of the chat form:"
        " one form a file"
    ]


def test_the_first_200_rows_decide_and_later_ones_are_still_checked() -> None:
    pair = {"prompt": "p", "completion": "c"}
    rows = [Row(pair if i <= 101 else chat(U, A), "f", i) for i in range(1, 500)]
    good, problems = samples(rows, "sft")
    assert {conv.line for conv in good} == {*range(1, 102)}
    assert {problem.line for problem in problems} == {*range(102, 500)}


def test_unknown_rows_do_not_decide_the_form() -> None:
    rows = [Row({"x": 1}, "f", 1), Row({"x": 1}, "f", 2), Row(chat(U, A), "f", 3)]
    good, problems = samples(rows, "sft")
    assert [conv.line for conv in good] == [3]
    assert [problem.kind for problem in problems] == ["form", "form"]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([chat(U, A), {"text": "t"}], "sft"),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}, chat(U, A)], "pairs"),
        ([{"messages": [U, A], "kto_tag": True}], "judged"),
        ([{"messages": [U, A], "chosen": [U, A], "rejected": [U, A]}], "pairs"),
        ([{"x": 1}], "sft"),
    ],
)
def test_the_kind_of_a_file_is_told(rows: list[dict[str, Any]], kind: str, write: Callable[..., Path]) -> None:
    assert kind_of(write(rows)) == kind
