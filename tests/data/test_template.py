"""Templates render as Hugging Face's do, and the right one is chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourbit.data.template import (
    BUILTINS,
    ChatTemplate,
    Rendered,
    Talk,
    Turn,
    Unrenderable,
    builtin,
    expects_bos,
    template_for,
)
from fourbit.errors import InputError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello! "}]


def shown(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate(source, TOKENS, **options).render(TALK if messages is None else messages)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", "<s>|</s>|False"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }};\n  {% endif %}\n{% endfor %}", "user;\nassistant;\n"),
        ("{{ messages[1].content | trim }}|{{ messages[1]['content'].strip() }}", "Hello!|Hello!"),
        ('{{ {"b": "<\u00e9>", "a": [1, true, none]} | tojson }}', '{"b": "<\u00e9>", "a": [1, true, null]}'),
        ('{{ {"b": 1, "a": [2]} | tojson(indent=2, sort_keys=true) }}', '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'),
        ('{{ {"a": "\u00e9"} | tojson(ensure_ascii=true, separators=(",", ":")) }}', '{"a":"\\u00e9"}'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index }}{% endfor %}", "1"),
        ("{% for m in messages %}{{ loop.index0 * 2 + loop.length ** 2 - 1 % 2 }},{% endfor %}", "3,5,"),
        (
            "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.revindex }} {% endfor %}",
            "TrueFalse2 FalseTrue1 ",
        ),
        ("{% for m in messages[::-1] %}{{ loop.previtem.role if loop.previtem }}>{{ m.role }} {% endfor %}", None),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f(1) ~ none }}", "[a][1]None"),
        ("{{ 'a' ~ 1 ~ [2] ~ undefined_name }}!", "a1[2]!"),
        ("{{ 'a-b-c'.split('-') | join('+') }}{{ '/'.join(['x', 'y']) }}{{ [1, 2] | join }}", "a+b+cx/y12"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first }}", " Hello! "),
        ("{{ 'aXbX'.replace('X', '--') }}{{ 'aXbX' | replace('X', '', 1) }}", "a--b--abX"),
        ("{% for m in messages %}{{ m.role.replace('s', 'z', 1) }}{{ '-'.join(['a', m.role]) }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content.split('l')[0].strip().upper() }}{% endfor %}", "HIHE"),
        ("{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(1, true) }}", "a\n  b\n\n  c| a\n b"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "x1y2"),
        ("{% for k, v in {'x': 1} | items %}{{ k }}{{ v }}{% endfor %}{{ {'b': 1, 'a': 2} | dictsort }}", None),
        (
            "{% for i in range(3) %}{{ i }}{% else %}none{% endfor %}{% for i in [] %}{% else %}none{% endfor %}",
            "012none",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{{ loop.length }}{% endfor %}", "Hi1"),
        (
            "{% for a in [1] %}{% for b in [2] %}{% for c in [3] %}{{ a ~ b ~ c }}{% endfor %}{% endfor %}{% endfor %}",
            "123",
        ),
        ("{{ (messages | length // 2) ~ 7 % 4 ~ 2 * 3.5 ~ -1 * 2 }}", "137.0-2"),
        ("{{ '%' if 5 % 2 == 1 else '' }}{{ 'x' in 'xyz' }}{{ 'ab'[0] }}{{ 'ab'[-1:] | upper }}", "%TrueaB"),
        (
            "{{ tools is none }}{{ tools is defined }}{{ nothing is defined }}{{ messages is iterable }}",
            "TrueTrueFalseTrue",
        ),
        ("{{ messages[0] is mapping }}{{ messages[0].content is string }}{{ 'x' | string + 'y' }}", "TrueTruexy"),
        ("{{ 'a' | safe + '<' }}{{ '<' | e }}", None),
        ("{{ strftime_now('%d %b %Y') }}", "31 Jan 2025"),
        ("{% for m in messages %}{{ m.get('content', '') ~ m.get('name', '-') }}{% endfor %}", "Hi- Hello! -"),
        ("{% for i in range(messages | length - 1, -1, -1) %}{{ messages[i].role }}{% endfor %}", "assistantuser"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() if k != 'a' %}{{ k }}{{ loop.last }}{% endfor %}", "bTrue"),
        ("{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1] == messages[0] }}", "True"),
        (
            "{% set n = namespace(l=[]) %}{% for m in messages %}{% set n.l = n.l + [m.role] %}{% endfor %}{{ n.l }}",
            None,
        ),
        (
            "{% macro t(x) %}{% for p in x.split('l') %}{{ p }}.{% endfor %}{% endmacro %}{{ t('hello') | trim }}",
            "he..o.",
        ),
        (
            "{% macro t(x, up=false) %}{{ x | upper if up else x }}{% endmacro %}"
            "{% for m in messages %}{{ t(m.role, up=loop.first) }}{% endfor %}",
            "USERassistant",
        ),
        (
            "{% macro tree(x) %}{% if x is mapping %}{% for k, v in x | dictsort %}{{ k }}({{ tree(v) }}){% endfor %}"
            "{% else %}{{ x }}{% endif %}{% endmacro %}{{ tree({'b': {'c': 1}, 'a': 2}) }}",
            "a(2)b(c(1))",
        ),
        (
            "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}{{ messages[0].content }}{% endcall %}",
            "<Hi>",
        ),
        ("{% filter upper %}{{ messages[0].content }}{% endfilter %}{% set x %}a{{ 1 }}{% endset %}{{ x }}", "HIa1"),
        (
            "{{ (none | default('', true)).replace('a', 'b').strip() }}{{ ['a', 'b'] | map('upper') | list }}",
            "['A', 'B']",
        ),
        (
            "{% set first = messages[0] %}{% for m in messages[1:] %}{{ first.role ~ m.role }}{% endfor %}",
            "userassistant",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.cycle('a', 'b') }}{% endfor %}",
            "b",
        ),
        ("{% for m in messages %}{% if loop.changed(m.role) %}{{ m.role[:1] }}{% endif %}{% endfor %}", "ua"),
        ("{{ messages[0].content.title() ~ 'a,b'.partition(',')[2] ~ 'xay'.rsplit('a', 1)[0] }}", "Hibx"),
        ("{{ '%s' if false else 'ok' }}{% raw %}{{ raw }}{% endraw %}{# note #}{{- ' x' -}} y", "ok{{ raw }} xy"),
    ],
)
def test_templates_render_as_they_do_elsewhere(source: str, text: str | None) -> None:
    """`text` None: compare with jinja alone only. Else also with what was written down."""
    ours = shown(source, date="2025-01-31")
    assert ours == plain_jinja(source)
    assert text is None or ours == text


def plain_jinja(source: str) -> str:
    """The same template in jinja's own sandbox, set up as Hugging Face documents it."""
    import json
    from datetime import datetime

    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from fourbit.data.render_child import Generation

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **options: json.dumps(
        x, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["strftime_now"] = datetime(2025, 1, 31).strftime
    variables = {
        "messages": TALK,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_generation_prompt": False,
        "tools": None,
    }
    return environment.from_string(source).render(**variables)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "it says: Roles must alternate"),
        ("{{ nothing.role }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ 'a' + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{{ 'a' + none }}", 'TypeError: can only concatenate str (not "NoneType") to str'),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ nothing * 2 }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "`append` of list may not be used"),
    ],
)
def test_messages_that_do_not_suit_are_refused_with_the_templates_words(source: str, says: str) -> None:
    with pytest.raises(Unrenderable) as caught:
        shown(source, name="model's")
    assert str(caught.value).startswith(f"model's: the template cannot render this: {says}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a\n{% if %}", "line 2: Expected an expression, got 'end of statement block'"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ messages | nofilter }}", "line 1: No filter named 'nofilter'"),
        ("{% nosuchtag %}", "line 1: Encountered unknown tag 'nosuchtag'"),
        ("{% include 'other' %}", "line 1: it may not load other templates"),
        ("{% extends 'other' %}", "line 1: it may not load other templates"),
        ("{% from 'other' import x %}", "line 1: it may not load other templates"),
    ],
)
def test_a_broken_template_is_no_rows_fault(source: str, says: str) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(InputError) as caught:
            shown(source, name="model's")
        assert not isinstance(caught.value, Unrenderable)
        assert str(caught.value).startswith(f"model's: the chat template cannot be used: {says}")


def test_a_template_that_refuses_one_row_renders_the_next() -> None:
    template = ChatTemplate("{% if messages | length != 2 %}{{ raise_exception('two!') }}{% endif %}ok")
    with pytest.raises(Unrenderable, match="it says: two!"):
        template.render(TALK[:1])
    assert template.render(TALK) == "ok"


def test_weights_are_not_shown_to_templates_and_messages_stay_as_they_are() -> None:
    messages = [{"role": "assistant", "content": "x", "weight": 0}]
    assert shown("{{ messages[0] | tojson }}", messages) == '{"role": "assistant", "content": "x"}'
    assert messages == [{"role": "assistant", "content": "x", "weight": 0}]


def test_generation_prompt_and_tools_reach_the_template() -> None:
    template = ChatTemplate("{{ add_generation_prompt }}{{ tools | tojson }}")
    assert template.render([], add_generation_prompt=True, tools=[{"name": "f"}]) == 'True[{"name": "f"}]'


def test_the_present_is_the_default_date() -> None:
    from datetime import datetime

    before = datetime.now().strftime("%Y-%m-%d")
    assert shown("{{ strftime_now('%Y-%m-%d') }}") in (before, datetime.now().strftime("%Y-%m-%d"))
    with pytest.raises(ValueError):
        ChatTemplate("", date="31/01/2025")


def test_a_conversation_has_one_present() -> None:
    template = ChatTemplate("{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    (made,) = template.render_all([Talk(TALK, turns=[1])])
    assert isinstance(made, Rendered) and isinstance(made.turns[1], Turn)


def test_the_order_of_choice(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    own = make_tokenizer(chat_template="own {{ eos_token }}")
    assert template_for(own).render([]) == "own <|im_end|>"
    assert template_for(own, "chatml").source == builtin("chatml")
    file = tmp_path / "mine.jinja"
    file.write_text("\ufefffile {{ eos_token }}", encoding="utf-8")
    assert template_for(own, file).render([]) == "file <|im_end|>"
    assert template_for(own, str(file)).name == str(file)
    given = ChatTemplate("given")
    assert template_for(own, given) is given
    assert all(template_for(own, name).notice == "" for name in (None, "chatml", file))


def test_a_model_without_a_template_gets_one_that_adds_no_tokens(make_tokenizer: Callable[..., Any]) -> None:
    chatml = template_for(make_tokenizer())
    assert (chatml.name, chatml.source) == ("chatml", builtin("chatml"))
    assert "no chat template: using chatml" in chatml.notice and "no new tokens are added" in chatml.notice
    base = make_tokenizer(("<s>", "</s>"), "<s>", "</s>")
    zephyr = template_for(base)
    assert zephyr.name == "zephyr" and "using zephyr" in zephyr.notice
    assert zephyr.render(TALK) == "<s><|user|>\nHi</s>\n<|assistant|>\n Hello! </s>\n"


def test_built_ins_write_bos_where_the_model_expects_one(make_tokenizer: Callable[..., Any]) -> None:
    text = {"both": (("<e>",), "<e>", "<e>", None), "own": (("<s>", "</s>"), "<s>", "</s>", "{{ bos_token }}")}
    text["unused"] = (("<s>", "</s>"), "<s>", "</s>", "no mention")
    for name, expected in [("both", ""), ("own", "<s>"), ("unused", "")]:
        specials, bos, eos, chat_template = text[name]
        tokenizer = make_tokenizer(specials, bos, eos, (), chat_template)
        assert template_for(tokenizer, "plain").render(TALK[:1]) == f"{expected}Hi"


def test_a_saved_built_in_says_which_tokens_it_writes_as_nothing(make_tokenizer: Callable[..., Any]) -> None:
    """Read back as a model's own it writes the same, and texts begin as they did."""
    for bos, eos in (("<s>", "<s>"), (None, None), ("<s>", None), ("<s>", "</s>")):
        tokenizer = make_tokenizer(("<s>", "</s>"), bos, eos)
        template = template_for(tokenizer, "zephyr")
        again = make_tokenizer(("<s>", "</s>"), bos, eos, chat_template=template.portable())
        assert template_for(again).render(TALK) == template.render(TALK)
        assert expects_bos(again) == expects_bos(tokenizer)


def test_texts_begin_with_bos_as_the_models_files_say(make_tokenizer: Callable[..., Any]) -> None:
    for said, bos, eos, expected in (
        (False, "<s>", "</s>", False),
        (True, "<s>", "<s>", True),
        (True, None, "</s>", False),
        (None, "<s>", "</s>", True),
    ):
        tokenizer = make_tokenizer(("<s>", "</s>"), bos, eos)
        tokenizer.adds_bos = said
        assert expects_bos(tokenizer) is expected
        assert template_for(tokenizer, "plain").render(TALK[:1]) == "<s>" * expected + "Hi"


def test_the_built_ins() -> None:
    texts = {
        "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello! <|im_end|>\n",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
        "zephyr": "<s><|user|>\nHi</s>\n<|assistant|>\n Hello! </s>\n",
        "plain": "<s>Hi Hello! </s>",
    }
    assert {name: shown(source) for name, source in ((name, builtin(name)) for name in BUILTINS)} == texts
    for name, source in ((name, builtin(name)) for name in BUILTINS):
        template = ChatTemplate(source, TOKENS)
        prompt = template.render(TALK[:1], add_generation_prompt=True)
        assert texts[name].startswith(prompt) and len(prompt) > 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "nosuch",
            None,
            "template 'nosuch': neither a built-in (chatml, llama3, plain, zephyr) nor a file: name one of",
        ),
        ("big.jinja", b"x" * 65_537, "must be at most 65,536 bytes, got 65,537."),
        ("latin.jinja", b"\xe9", "must be UTF-8 text: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_bad_choices(name: str, content: bytes | None, says: str, tokenizer: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
        name = str(tmp_path / name)
    with pytest.raises(InputError) as caught:
        template_for(tokenizer, name)
    assert says in str(caught.value)


def test_a_source_of_exactly_the_limit_is_taken() -> None:
    assert shown("{#" + "x" * (65_536 - 6) + "#}ok") == "ok"
    with pytest.raises(InputError, match="has 65537 bytes; at most 65536"):
        ChatTemplate("\u00e9" * 32_768 + "x")
