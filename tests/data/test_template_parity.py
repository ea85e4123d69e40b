"""Every chat template that TRL ships (72 of 30 families): text and tokens equal transformers' `apply_chat_template`."""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fourbit.data.encode import encode
from fourbit.data.row import BadRow, Place
from fourbit.data.sample import Sample
from fourbit.data.template import ChatTemplate
from fourbit.data.turns import LEFT_OUT
from fourbit.errors import InputError

FOLDER = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SOME = [pytest.param(name, marks=pytest.mark.slow if i % 4 else ()) for i, name in enumerate(TEMPLATES)]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "image_token": "<image>"}
CALL = {"name": "weather", "arguments": {"city": "S\u00e3o <Paulo>", "days": 3, "now": True, "unit": ["c", "f"]}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Tells the "weather".',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": "integer", "description": "how many"},
                "unit": {"type": "array", "items": {"type": "string"}, "description": "of what"},
            },
            "required": ["city"],
        },
    },
}


def say(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLED = {"id": "abcdef123", "type": "function", "function": CALL}
CHAT = [say("user", " Hi\n"), say("assistant", "Hello! "), say("user", "Why?"), say("assistant", "So.\n")]
USED = [
    say("user", "Rain?"),
    say("assistant", "", tool_calls=[CALLED]),
    say("tool", '{"rain": 1}', name="weather", tool_call_id="abcdef123"),
    say("assistant", "Yes."),
]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a chat": (CHAT, {}),
    "asked": (CHAT[:1], {"add_generation_prompt": True}),
    "asked again": (CHAT[:3], {"add_generation_prompt": True, "enable_thinking": False, "thinking": True}),
    "a system text": (
        [say("system", "Be brief."), *CHAT],
        {"date_string": "1 Jan 2020", "documents": [{"title": "T", "text": "X"}]},
    ),
    "thoughts": (
        [
            CHAT[0],
            say("assistant", "<think>\nhm\n</think>\n\nHello!"),
            CHAT[2],
            say("assistant", "<think>\nwell\n</think>\n\nSo."),
        ],
        {},
    ),
    "reasoning": (
        [
            CHAT[0],
            say("assistant", "Hello!", reasoning_content="hm"),
            CHAT[2],
            say("assistant", "So.", reasoning="well"),
        ],
        {"enable_thinking": True},
    ),
    "a tool": (USED, {"tools": [TOOL]}),
    "a tool unused": ([say("system", "Be brief."), *CHAT], {"tools": [TOOL], "tools_in_user_message": False}),
    "a tool answered": (USED[:3], {"tools": [TOOL], "add_generation_prompt": True}),
    "a call without content": ([USED[0], say("assistant", tool_calls=[CALLED]), *USED[2:]], {"tools": [TOOL]}),
    "nulls": (
        [
            say("user", "Hi", name=None, tool_calls=None),
            say("assistant", "Yo", tool_calls=None, reasoning_content=None),
        ],
        {"tools": None},
    ),
}


@pytest.fixture(scope="module")
def sides(make_tokenizer: Callable[..., Any]) -> tuple[Any, Any]:
    """One tokenizer, ours and transformers'."""
    from transformers import PreTrainedTokenizerFast

    from fourbit.text.tokenizer import Tokenizer

    backend = make_tokenizer(("<|im_start|>", "<|im_end|>", *NAMED.values())).backend
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
    return Tokenizer(backend, named_tokens=NAMED), theirs


@pytest.mark.parametrize("name", SOME)
def test_text_and_tokens_equal_transformers(name: str, sides: tuple[Any, Any]) -> None:
    """Also where a template refuses: then both do."""
    ours, theirs = sides
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, ours.named_tokens)
    refused = []
    for case, (messages, options) in CASES.items():
        before = json.dumps([messages, options])
        variables = {key: value for key, value in options.items() if key not in ("tools", "add_generation_prompt")}
        given = {key: value for key, value in options.items() if key not in variables}
        try:
            expected = theirs.apply_chat_template(deepcopy(messages), chat_template=source, tokenize=False, **options)
        except Exception:
            refused.append(case)
            with pytest.raises(InputError, match="the template cannot render this"):
                template.render(messages, variables=variables, **given)
            continue
        text = template.render(messages, variables=variables, **given)
        assert text == expected, case
        ids = theirs.apply_chat_template(deepcopy(messages), chat_template=source, return_dict=False, **options)
        assert ours.encode(text) == ids, case
        assert json.dumps([messages, options]) == before
    assert len(refused) < len(CASES)  # some take only contents in parts


PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # these write no content that is a plain text
CLOSED = ("qwen3_5_nothink",)  # the generation prompt ends the thoughts that a row's answer begins


@pytest.mark.parametrize("name", SOME)
def test_rows_of_several_turns_train_their_last_answer_at_least(name: str, sides: tuple[Any, Any]) -> None:
    """With thoughts and without; what is trained follows the very prompt, or such thoughts as the template drops."""
    ours, _ = sides
    template = ChatTemplate((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), ours.named_tokens)
    for case in ("a chat", "thoughts"):
        messages = CASES[case][0]
        bad: list[BadRow] = []
        found = [*encode([Sample([], (messages,), Place("f", 1))], ours, template, refuse=bad.append)]
        if name.removesuffix("_training") in PARTS_ONLY or (
            name.removesuffix("_training") in CLOSED and case != "a chat"
        ):
            assert bad
            continue
        assert not bad, case
        ((_, made),) = found
        trained = ours.decode([token for token, on in zip(made[0].ids, made[0].trained, strict=True) if on], False)
        assert "So." in trained and ("Hello!" in trained) == (LEFT_OUT not in made[0].notes), case
        assert case == "a chat" or "well" in trained


def test_harmony_trains_every_message_of_an_answer(make_tokenizer: Callable[..., Any]) -> None:
    """As its `{% generation %}` marks, but for what the prompt says already: `<|end|>` ends a message, not the turn."""
    from transformers import PreTrainedTokenizerFast

    from fourbit.text.tokenizer import Tokenizer

    marks = [f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")]
    backend, named = make_tokenizer(marks).backend, {"eos_token": "<|return|>"}
    source = (FOLDER / "gptoss_training.jinja").read_text(encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    stops = [backend.token_to_id("<|end|>")]  # as an older folder may say
    ours = Tokenizer(backend, chat_template=source, named_tokens=named, stop_ids=stops)
    assert [ours.decode([stop], False) for stop in ours.stop_ids] == ["<|return|>", "<|call|>"]
    plain = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    assert backend.token_to_id("<|end|>") in Tokenizer(backend, chat_template=plain, stop_ids=stops).stop_ids
    thinks = say("assistant", "4.", thinking="It is 4. Say so.")
    calls = [say("assistant", "", tool_calls=[CALLED], **more) for more in ({}, {"thinking": "I ask."})]
    for messages in ([USED[0], turn] for turn in (thinks, *calls, say("assistant", "I ask.", tool_calls=[CALLED]))):
        how: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True, "tools": [TOOL]}
        made = theirs.apply_chat_template(deepcopy(messages), chat_template=source, **how)
        mask = [bool(on) for on in made["assistant_masks"]]
        said = mask.index(True) + len(theirs.encode("<|start|>assistant"))
        sample = Sample([], (messages,), Place("f", 1), tools=[TOOL])
        ((_, (found,)),) = encode([sample], ours, ChatTemplate(source, named))
        assert found.trained == [on and i >= said for i, on in enumerate(mask)]


def test_all_templates_are_there() -> None:
    assert len(TEMPLATES) >= 72
