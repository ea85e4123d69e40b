"""Chat and prompt/completion rows become conversations; every rule that a row can break is one clear problem."""

from typing import Any

import pytest

from fourbit.data.formats import Conversation, conversation, conversations, recognise
from fourbit.data.read import BadRow, Row

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Hello"}
USE = 'use {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'
CALL_FORM = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
ROLES = "must be one of system, developer, user, assistant, tool"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


# the row, and what its problem says after `rows.jsonl:7: `
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no keys": ({}, f"row: no form recognised, keys are none: {USE}"),
    "unknown keys": ({"a": 1, "b": 2}, f"row: no form recognised, keys are 'a', 'b': {USE}"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}]},
        f"row: this looks like the ShareGPT form (`conversations`), which is not supported yet: {USE}",
    ),
    "alpaca": (
        {"instruction": "Say hi", "input": "", "output": "hi"},
        f"row: this looks like the Alpaca form (`instruction`/`output`), which is not supported yet: {USE}",
    ),
    "preference": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        f"row: this looks like a preference pair (`chosen`/`rejected`), which `fourbit dpo` reads: here {USE}",
    ),
    "openai preference": (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        "row: this looks like OpenAI's preference form (`preferred_output`/`non_preferred_output`),"
        f" which `fourbit dpo` reads: here {USE}",
    ),
    "an answer and its label": (
        {"prompt": "p", "completion": "c", "label": False},
        "row: this looks like an answer with a judgement (`completion`/`label`), which `fourbit dpo` reads:"
        f" here {USE}",
    ),
    "a conversation and its tag": (
        chat(U, A, kto_tag=True),
        f"row: this looks like an answer with a judgement (`kto_tag`), which `fourbit dpo` reads: here {USE}",
    ),
    "question and answer": (
        {"question": "q", "answer": "a"},
        f"row: this looks like a question/answer form (`question`), which is not supported yet: {USE}",
    ),
    "text": ({"text": "t"}, f"row: this looks like plain text (`text`), which is not supported yet: {USE}"),
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
        conversation(Row(data, "rows.jsonl", 7))
    assert str(caught.value) == f"rows.jsonl:7: {says}"
    assert (caught.value.problem.file, caught.value.problem.line) == ("rows.jsonl", 7)


def test_there_are_enough_bad_rows() -> None:
    assert len(BAD) >= 70


def made(data: dict[str, Any]) -> Conversation:
    return conversation(Row(data, "rows.jsonl", 1))


def test_chat_passes_through() -> None:
    system = {"role": "system", "content": ""}
    assert made(chat(system, U, A)).messages == [system, U, A]
    assert made(chat({"role": "developer", "content": "Be brief."}, U, A)).messages[0]["role"] == "developer"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert made(chat({"role": "user", "content": parts}, A)).messages[0]["content"] == "Hello"


def test_strings_become_a_user_and_an_assistant_turn() -> None:
    assert made({"prompt": "p", "completion": "c"}).messages == [
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "c"},
    ]


def test_message_lists_are_one_conversation_whose_prompt_is_context() -> None:
    messages = made({"prompt": [U, A, U], "completion": [A]}).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


def test_tool_calls_and_tools_reach_the_template_with_arguments_as_objects() -> None:
    text_call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [text_call]}
    tool = {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"}
    conv = made(chat(U, answer, tool, A, tools=[{"type": "function"}]))
    assert conv.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conv.messages[2] == tool
    assert conv.tools == [{"type": "function"}]
    bare = made(chat(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}))
    assert bare.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert made(chat(U, {**A, "tool_calls": None})).messages[1] == A


def test_a_masked_turn_may_be_empty() -> None:
    masked = {"role": "assistant", "content": "", "weight": 0}
    assert made(chat(U, masked, U, A)).messages[1] == masked


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
        ({"instruction": "i"}, None),
    ],
)
def test_forms_are_recognised(data: dict[str, Any], form: str | None) -> None:
    assert recognise(Row(data, "f", 1)) == form


def test_a_row_of_another_form_is_named() -> None:
    rows = [Row(chat(U, A), "f.jsonl", i) for i in range(1, 4)]
    rows.append(Row({"prompt": "p", "completion": "c"}, "f.jsonl", 4))
    good, problems = conversations(rows)
    assert [conv.line for conv in good] == [1, 2, 3]
    assert [str(problem) for problem in problems] == [
        "f.jsonl:4: row: is of the prompt/completion form, but this file's first rows are of the chat form:"
        " one form a file"
    ]


def test_the_first_200_rows_decide_and_later_ones_are_still_checked() -> None:
    pair = {"prompt": "p", "completion": "c"}
    rows = [Row(pair if i <= 101 else chat(U, A), "f", i) for i in range(1, 500)]
    good, problems = conversations(rows)
    assert {conv.line for conv in good} == {*range(1, 102)}
    assert {problem.line for problem in problems} == {*range(102, 500)}


def test_unknown_rows_do_not_decide_the_form() -> None:
    rows = [Row({"x": 1}, "f", 1), Row({"x": 1}, "f", 2), Row(chat(U, A), "f", 3)]
    good, problems = conversations(rows)
    assert [conv.line for conv in good] == [3]
    assert [problem.kind for problem in problems] == ["form", "form"]
