"""What makes an answer right: a model that writes what the template writes is right, whatever that is."""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from fourbit.data.encode import encode, load
from fourbit.data.template import ChatTemplate, builtin
from fourbit.errors import InputError
from fourbit.text.tokenizer import Tokenizer
from fourbit.text.tokenizer_folder import folder_tokenizer
from fourbit.trainer.evaluate import Match, answer_all, matches, share_right

CALLS = (  # as Mistral and Qwen write them: special tokens, and ones that are not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "{% for c in m.tool_calls %}[CALL]<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = builtin("chatml").replace(
    "message['content']", "('[THINK][/THINK]' if message.role == 'assistant' else '') + message['content']"
)
TEMPLATES = {"chatml": builtin("chatml"), "calls": CALLS, "thinks": THINKS}
CALL = {"function": {"name": "f", "arguments": {"x": [1, "é"]}}}
ANSWERS: list[dict[str, Any]] = [
    {"content": "yes, so "},
    {"content": '{"a": [1, 2.0, true], "b": null}'},
    {"content": "one\n  two  \n\nthree\n"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    made = folder_tokenizer(tiny_folder)
    made.backend.add_special_tokens([AddedToken(t, special=True) for t in ("[CALL]", "[THINK]", "[/THINK]")])
    made.backend.add_tokens(["<tool_call>", "</tool_call>"])
    return made


@pytest.fixture
def asked(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers of a perfect model to rows with these answers: it writes the tokens that are trained, and stops."""

    def ask(source: str, answers: list[dict[str, Any]], match: Match = "exact") -> list[Any]:
        template, file = ChatTemplate(source), tmp_path / "rows.jsonl"
        talks = [[{"role": "user", "content": "hi"}, {"role": "assistant", **answer}] for answer in answers]
        file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        samples = load(file, tokenizer, template=template).samples

        def perfect(*_: Any, **__: Any) -> Iterator[list[int]]:
            for _, parts in encode(samples, tokenizer, template, loss_on="last"):
                ids = [id for id, trained in zip(parts[0].ids, parts[0].trained, strict=True) if trained]
                yield [*takewhile(lambda id: id not in tokenizer.stop_ids, ids)]

        monkeypatch.setattr("fourbit.trainer.evaluate.generate_each", perfect)
        model: Any = SimpleNamespace(max_positions=None)
        return [*answer_all(model, tokenizer, template, samples, match=match)]

    return ask


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_perfect_model_is_always_right(asked: Any, name: str) -> None:
    calls = [{"content": None, "tool_calls": [CALL, CALL]}, {"content": "look", "tool_calls": [CALL]}]
    answers = asked(TEMPLATES[name], ANSWERS + (calls if name == "calls" else []))
    assert share_right(answers) == 1
    assert [a.answer for a in answers] == [a.expected for a in answers]
    if name == "calls":
        assert answers[3].expected == '[CALL]<tool_call>f{"x": [1, "é"]}</tool_call>' * 2
    if name == "thinks":
        assert answers[0].expected == "[THINK][/THINK]yes, so "
    assert share_right(asked(TEMPLATES[name], ANSWERS[1:2], "json")) == 1
    assert share_right(asked(TEMPLATES[name], ANSWERS, "contains")) == 1
    assert share_right(asked(TEMPLATES[name], ANSWERS[:1], "regex")) == 1


@pytest.mark.parametrize(
    ("match", "said", "answer", "right"),
    [
        ("exact", "a\nb", " a  \nb\n", True),
        ("exact", "a b", "a  b", False),
        ("exact", "yes", "yes.", False),
        ("json", '{"a": 1, "b": [true]}', '{ "b":[true],\n"a":1.0}', True),
        ("json", "[1, 2]", "[2, 1]", False),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("json", "0", "false", False),
        ("json", "[0]", "[]", False),
        ("json", '{"a": 1}', '{"a": 1, "b": 2}', False),
        ("json", '{"a": 1}', '{"a": 2, "a": 1}', False),
        ("json", '{"a": 1}', "the answer is 1", False),
        ("json", "[1]", "[" * 100_000, False),
        ("json", "1", "9" * 9999, False),
        ("json", "1", "NaN", False),
        ("regex", r"^-?\d+$", "-42", True),
        ("regex", r"^-?\d+$", "42 apples", False),
        ("regex", "(?i)paris", "It is PARIS.", True),
        ("regex", " a$\n", "b a", True),
        ("contains", "Paris", "It is Paris.", True),
        ("contains", "Paris", "paris", False),
    ],
)
def test_what_makes_an_answer_right(match: Match, said: str, answer: str, right: bool) -> None:
    assert matches(answer, said, said, match) is right
    assert matches(f"<t>{answer}", f"<t>{said}", said, match) is right or match in ("exact", "contains")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab\n{é", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON, other=JSON, indent=st.integers(0, 3))
def test_json_is_compared_by_value(value: Any, other: Any, indent: int) -> None:
    said, again = json.dumps(value), json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False)
    assert matches(again, said, said, "json")
    if json.dumps(other) != said and other != value:
        assert not matches(json.dumps(other), said, said, "json")


@pytest.mark.parametrize(
    ("match", "answer", "said"),
    [
        (
            "json",
            {"content": "yes"},
            "rows.jsonl:2: the answer 'yes' is no JSON: mend the row, or take another match",
        ),
        ("json", {"content": "", "tool_calls": [CALL]}, "an answer of tool calls alone is no JSON"),
        ("regex", {"content": "(a"}, r"the answer '\(a' is no regular expression"),
        ("regex", {"content": "a{99999999999}"}, "no regular expression"),
        ("regex", {"content": None, "tool_calls": [CALL]}, "an answer of tool calls alone is no regular expression"),
    ],
)
def test_an_answer_that_cannot_be_compared_is_refused(asked: Any, match: Match, answer: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        asked(CALLS, [{"content": "1"}, answer], match)
    assert asked(CALLS, [{"content": "1"}, answer], "exact")
