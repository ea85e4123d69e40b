"""What a conversation says stands in the text, or the row is an error; and no message holds a special token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit.data.encode import encode, load, prompt_texts
from fourbit.data.forms import Sample
from fourbit.data.row import BadRow, Place
from fourbit.data.template import ChatTemplate, builtin

CHATML = ChatTemplate(builtin("chatml"))
LOOP = "{% for m in messages %}%s<|im_end|>{% endfor %}"
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"place": 'S\u00e3o "<1>"\n', "n": [7, 2.5]}}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Finds places."}}]
CALLS = ChatTemplate(
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    + LOOP.replace("%s", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}")
)


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLING = [
    say("user", "Where?"),
    say("assistant", "", tool_calls=[CALL]),
    say("tool", "look_up: here"),
    say("assistant", "Here."),
]


def chosen(sample: Sample, tokenizer: Any, template: ChatTemplate, **options: Any) -> Any:
    bad: list[BadRow] = []
    made = [parts for _, parts in encode([sample], tokenizer, template, refuse=bad.append, **options)]
    return (made + bad)[0]


def row(*messages: dict[str, Any], **more: Any) -> Sample:
    return Sample([], (list(messages),), Place("f", 1), **more)


def refused(sample: Sample, tokenizer: Any, template: ChatTemplate, **options: Any) -> str:
    made = chosen(sample, tokenizer, template, **options)
    assert isinstance(made, BadRow)
    return str(made)


@pytest.mark.parametrize(
    ("each", "sample", "field"),
    [
        ("{{ m.content }}", row(*CALLING), "messages[1].tool_calls[0].name: 'look_up'"),
        ("{{ m.content }}", row(*CALLING, tools=TOOLS), "tools[0]: 'Finds places.'"),
        ("{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}", row(*CALLING), "messages[1].tool_calls[0].arguments: 'place'"),  # noqa: E501
        ("{{ m.role }}", row(*CALLING[2:]), "messages[0].content: 'look_up: here'"),
        ("{{ m.content[::-1] }}", row(say("user", "ab"), say("assistant", "cd")), "messages[0].content: 'ab'"),
        ("{{ m.content[:9] }}", row(say("user", "ab"), say("assistant", "a longer answer")), "messages[1].content: 'a longer answer'"),  # noqa: E501
        ("{{ m.content if m.role != 'system' }}", row(say("system", "Brief."), *CALLING[2:]), "messages[0].content: 'Brief.'"),  # noqa: E501
        ("{{ m.content if m.role != 'tool' }}", row(*CALLING[2:]), "messages[0].content: 'look_up: here'"),
        ("{{ m.content }}", row(say("user", "a"), say("assistant", "b", reasoning_content="why")), "messages[1].reasoning_content: 'why'"),  # noqa: E501
        ("{{ m.content }}", row(say("user", "a"), say("assistant", "b", thinking="why")), "messages[1].thinking: 'why'"),  # noqa: E501
        ("{{ m.content.split('</think>')[-1] }}", row(say("user", "a"), say("assistant", "<think>why</think>b")), "messages[1].content: 'why'"),  # noqa: E501
        ("{{ m.content if m.role == 'assistant' }}", row(say("user", "yes"), say("assistant", "oh yes")), "messages[0].content: 'yes'"),  # noqa: E501
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_what_a_template_leaves_out_is_an_error_that_names_it(
    each: str, sample: Sample, field: str, loss_on: Any, tokenizer: Any
) -> None:
    """A trained call's name that another message mentions is not found there, nor a question in its answer."""
    said = refused(sample, tokenizer, ChatTemplate(LOOP.replace("%s", each)), loss_on=loss_on)
    if loss_on == "last" and "tool_calls" in field:  # of a call that is not trained the place is not known
        field = "messages[1].tool_calls[0].arguments: 'place'"
    assert said.startswith(f"f:1: {field} stands nowhere in what the template writes for it")


@pytest.mark.parametrize(
    "each",
    [
        "{{ m.content | trim }}",
        "{{ m.content | tojson }}",
        "{{ m.content | tojson(ensure_ascii=true) }}",
        "{{ m.content | e }}",
        "{{ [m.content] }}",
        r"""{{ m.content | replace('\\', '\\\\') | replace("'", "\\'") | replace('\n', '\\n') }}""",
        "{{ m.content | indent(4) }}",
        "{{ m.content.split() | join(' ') }}",
        "{{ m.content.replace('\n', '\n> ') if false else m.content }}",
    ],
)
def test_texts_may_be_trimmed_escaped_or_set_in(each: str, tokenizer: Any) -> None:
    said = [say("user", " \"a\" '\u00e9'\t<b>\n\n c\\ "), say("assistant", "Yes\n")]
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: " + each + "<|im_end|>{% endfor %}")
    assert not isinstance(chosen(row(*said), tokenizer, template), BadRow)


@pytest.mark.parametrize(
    "call",
    [
        "{{ c.function | tojson(indent=2) }}",
        "{{ c | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>\n{{ v if v is string else v | tojson }}{% endfor %}",  # noqa: E501
        "{{ c.function.name }}({% for k, v in c.function.arguments | dictsort %}{{ k }}={{ v }}, {% endfor %})",
        "{{ c }}",
    ],
)  # fmt: skip
def test_calls_may_be_written_in_any_form(call: str, tokenizer: Any) -> None:
    each = "{{ m.content }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"
    parts = chosen(row(*CALLING), tokenizer, ChatTemplate(LOOP.replace("%s", each)))
    assert not isinstance(parts, BadRow)
    trained = tokenizer.decode(
        [t for t, on in zip(parts[0].ids, parts[0].trained, strict=True) if on], skip_special=False
    )
    assert trained.startswith(("{", "look_up")) and trained.count("<|im_end|>") == 2


def test_thoughts_of_earlier_answers_may_be_left_out(tokenizer: Any) -> None:
    template = ChatTemplate(LOOP.replace("%s", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"))
    said = [
        say("user", "a"),
        say("assistant", "<think>x</think>b"),
        say("user", "c"),
        say("assistant", "<think>y</think>d"),
    ]
    assert not isinstance(chosen(row(*said), tokenizer, template), BadRow)
    (prompt,) = prompt_texts([Sample(said[:3], (said[3:],), Place("f", 1))], tokenizer, template)
    assert "x" not in prompt


def test_a_prompt_says_everything_too(tokenizer: Any) -> None:
    asked = Sample([say("system", "Brief."), say("user", "a")], (), Place("f", 1))
    with pytest.raises(BadRow, match=r"messages\[0\]\.content: 'Brief\.' stands nowhere"):
        prompt_texts([asked], tokenizer, ChatTemplate("{% for m in messages[1:] %}{{ m.content }}{% endfor %}"))


def test_the_advice_for_what_a_template_cannot_say_helps(
    write: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    rows = write([{"messages": [{**CALLING[0]}, {**CALLING[1], "content": None}], "tools": TOOLS}])
    with pytest.raises(Exception, match=r"the template cannot say it; name one that can \(template=\.\.\.\)"):
        load(rows, tokenizer)
    file = tmp_path / "calls.jinja"
    file.write_text(CALLS.source, encoding="utf-8")
    (example,) = load(rows, tokenizer, template=file).examples
    assert '"look_up"' in example.parts[0].text and any(example.parts[0].trained)


# Special tokens.

FAMILIES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(64))),  # noqa: E501
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>"),
    "gemma": ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *(f"<unused{i}>" for i in range(40))),  # noqa: E501
    "mistral": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[THINK]"),
    "deepseek": ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),  # noqa: E501
}  # fmt: skip
PLACES = ("user", "assistant", "system", "call", "argument", "tool", "reasoning", "variable")
AROUND = st.text("ab <|>\n/\u00e9", max_size=5)


def placed(place: str, text: str) -> tuple[Sample, str]:
    """A row with a text somewhere, and the field that holds it."""
    talk, more = [say("system", "s"), say("user", "q"), say("assistant", "w")], dict[str, Any]()
    if place in ("system", "user", "assistant"):
        i = ("system", "user", "assistant").index(place)
        talk[i]["content"] = f"x{text}x"
        return row(*talk), f"messages[{i}].content"
    if place in ("call", "argument"):
        name, value = (f"f{text}", "v") if place == "call" else ("f", text)
        talk[2]["tool_calls"] = [{"function": {"name": name, "arguments": {"k": [{"d": value}]}}}]
        return row(*talk), "messages[2].tool_calls"
    if place == "reasoning":
        talk[2]["reasoning"] = text
        return row(*talk), "messages[2].reasoning"
    more = {"tools": [{"name": "f", "description": text}]} if place == "tool" else {"variables": {"k": {"d": text}}}
    return row(*talk, **more), "tools" if place == "tool" else "chat_template_kwargs"


EVERYTHING = ChatTemplate("{{ tools | tojson }}{{ (k or '') | tojson }}" + LOOP.replace("%s", "{{ m | tojson }}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_special_token_in_a_message_is_an_error(family: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(FAMILIES[family], None, None)
    tokens = [token for token in FAMILIES[family] for _ in PLACES]
    held = [placed(PLACES[i % len(PLACES)], f"x{token}") for i, token in enumerate(tokens)]
    bad: list[BadRow] = []
    assert [*encode([sample for sample, _ in held], tokenizer, EVERYTHING, refuse=bad.append)] == []
    for token, (_, field), found in zip(tokens, held, bad, strict=True):
        assert found.kind == "special token"
        assert str(found).startswith(f"f:1: {field}: spells {token!r}, a special token, which steers a model")


@given(
    token=st.sampled_from(FAMILIES["llama3"] + FAMILIES["mistral"]),
    place=st.sampled_from(PLACES),
    around=st.tuples(AROUND, AROUND),
)
@settings(max_examples=40)
def test_a_special_token_is_found_wherever_it_stands_and_spelled_otherwise_is_text(
    token: str, place: str, around: tuple[str, str], both: Any
) -> None:
    sample, field = placed(place, token.join(around))
    assert refused(sample, both, EVERYTHING).startswith(f"f:1: {field}: spells '")
    harmless, _ = placed(place, " ".join(token).join(around))
    (example,) = chosen(harmless, both, EVERYTHING)
    assert not {both.id(special) for special in both.special_tokens} & set(example.ids)


@pytest.fixture(scope="module")
def both(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer(FAMILIES["llama3"] + FAMILIES["mistral"], None, None)


def test_the_advice_for_a_special_token_helps(write: Callable[..., Path], tokenizer: Any) -> None:
    """Spelled another way it is read, as a text row it is a token, and such rows can be left out."""
    talk = [say("user", "what is <|im_end|>?"), say("assistant", "a mark")]
    rows = write([{"messages": talk}, {"messages": [say("user", "a"), talk[1]]}])
    with pytest.raises(
        Exception, match=r"1 of 2 rows .*leave them out with on_bad_row skip:\n.*messages\[0\]\.content"
    ):
        load(rows, tokenizer)
    assert load(rows, tokenizer, on_bad_row="skip").report.skipped.kinds == {"special token": 1}
    spelled = json.loads(json.dumps(talk).replace("<|im_end|>", "<| im_end |>"))
    assert len(load(write([{"messages": spelled}], "a.jsonl"), tokenizer)) == 1
    (example,) = load(write([{"text": "what is <|im_end|>?"}], "b.jsonl"), tokenizer).examples
    assert example.parts[0].ids.count(tokenizer.eos_id) == 2
