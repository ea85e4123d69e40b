"""Templates that try to reach Python, and templates that try to take everything: each ends in a clear error, soon."""

import resource
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit.data import sandbox
from fourbit.data.template import ChatTemplate, Unrenderable
from fourbit.errors import InputError

TALK = [{"role": "user", "content": "Hi"}]

ESCAPES = {  # known ways from a template to the interpreter, the file system or the process
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subscript": "{{ ''['__class__'] }}",
    "split name": "{{ ''['__cla' + 'ss__'] }}",
    "joined name": "{{ ''[['__cla', 'ss__'] | join] }}",
    "reversed name": "{{ ''['__ssalc__'[::-1]] }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list }}",
    "map dotted attribute": "{{ [[]] | map(attribute='__class__.__base__') | list }}",
    "map attr": "{{ [''] | map('attr', '__class__') | list }}",
    "selectattr": "{{ [''] | selectattr('__class__') | list }}",
    "sort attribute": "{{ ['', 'a'] | sort(attribute='__class__') }}",
    "join attribute": "{{ [''] | join('', attribute='__class__') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "namespace": "{{ namespace.__init__.__globals__['os'] }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__ }}",
    "self template reference": "{{ self._TemplateReference__context.environment }}",
    "loop": "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "macro internals": "{% macro m() %}{% endmacro %}{{ m._func }}",
    "range": "{{ range.__globals__ }}",
    "raise_exception globals": "{{ raise_exception.__globals__.sys.modules }}",
    "raise_exception code": "{{ raise_exception['__code__'] }}",
    "clock closure": "{{ strftime_now.__closure__ }}",
    "clock globals": "{{ strftime_now['__glo' ~ 'bals__'] }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "stored format": "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "format through map": "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "percent format": "{{ '%s' % messages }}",
    "format filter": "{{ '%s' | format('x') }}",
    "mro of a number": "{{ (1).__class__.__base__ }}",
    "generator frame": "{% set g = (messages | map(attribute='role')) %}{{ g.gi_frame }}",
    "undefined": "{{ nothing.__class__.__init__.__globals__ }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "mutate messages": "{{ messages.clear() }}",
    "mutate a message": "{{ messages[0].update({'role': 'x'}) }}",
    "dict class": "{{ dict.__base__ }}",
    "dict mro": "{{ dict.mro() }}",
    "translate": "{{ 'a'.translate({97: 'b'}) }}",
    "encode": "{{ 'a'.encode('utf-8') }}",
}

TURNS = "it takes more than 1000000 loop turns and calls"
TEXT = "it builds a text of more than 4194304 characters"
DEEP = "it is nested too deeply"
BOMBS = {  # templates that would take hours or all memory, and which guard each meets
    "string times number": ("`*` is allowed between numbers only", "{{ 'a' * 1000000000 }}"),
    "times through a name": (
        "`*` is allowed between numbers only, not str and int",
        "{% set n = 1000000000 %}{% set s = messages[0].content %}{{ s * n }}",
    ),
    "list times number": (
        "`*` is allowed between numbers only, not list and int",
        "{% set s = messages %}{{ s * 1000000000 }}",
    ),
    "loops in loops": (
        TURNS,
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
    ),
    "four loops": (
        "loops are nested deeper than 3",
        "{% for a in [1] %}{% for b in [1] %}{% for c in [1] %}{% for d in [1] %}"
        "{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    ),
    "range": ("range() of more than 1000000 numbers", "{% for i in range(10 ** 15) %}{% endfor %}"),
    "range as list": ("`**` gives too large a number", "{{ range(2 ** 62) | list | length }}"),
    "doubling": (
        TEXT,
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ),
    "doubling by ~": (
        TEXT,
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    ),
    "doubling a list": (
        TEXT,
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ),
    "a list of itself": (
        TURNS,
        "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    ),
    "a list of itself as json": (
        TURNS,
        "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
        "{% endfor %}{{ n.s | tojson }}",
    ),
    "a list of itself as string": (
        TURNS,
        "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
        "{% endfor %}{{ (n.s | string) | length }}",
    ),
    "replace": (
        TEXT,
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(30) %}"
        "{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
    ),
    "replace filter": (
        TEXT,
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(30) %}"
        "{% set n.s = n.s | replace('a', n.s) %}{% endfor %}",
    ),
    "join": (
        TEXT,
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(30) %}"
        "{% set n.s = n.s.join([n.s, n.s, n.s]) %}{% endfor %}",
    ),
    "power": ("`**` gives too large a number", "{{ 9 ** 9 ** 9 ** 9 }}"),
    "numbers that grow": (
        "`*` gives too large a number",
        "{% set n = namespace(s=10) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    ),
    "percent width": ("`%` is allowed between numbers only, not str and int", "{{ '%999999999d' % 1 }}"),
    "format width": ("`format` of str may not be used", "{{ '{:>999999999}'.format('a') }}"),
    "center": ("`center` of str may not be used", "{{ 'a'.center(1000000000) }}"),
    "ljust": ("`ljust` of str may not be used", "{{ 'a'.ljust(1000000000) }}"),
    "zfill": ("`zfill` of str may not be used", "{{ 'a'.zfill(1000000000) }}"),
    "expandtabs": ("`expandtabs` of str may not be used", "{{ '\t'.expandtabs(1000000000) }}"),
    "center filter": ("No filter named 'center'", "{{ 'a' | center(1000000000) }}"),
    "indent": ("an indentation of 1000000000; 0 to 64 are allowed", "{{ 'a\nb' | indent(1000000000) }}"),
    "json indent": ("an indentation of 1000000000; 0 to 64 are allowed", "{{ [1] | tojson(indent=1000000000) }}"),
    "round": ("No filter named 'round'", "{{ 1.5 | round(1000000000, 'ceil') }}"),
    "lipsum": ("'lipsum' is undefined", "{{ lipsum(n=1000000) }}"),
    "recursive macro": ("RecursionError", "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}"),
    "branching macro": (
        "it renders for longer than 2 seconds|it takes more than",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ),
    "output": (TEXT, "{% for i in range(900000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}"),
    "nested brackets": (DEEP, "{{ " + "[" * 30_000 + "]" * 30_000 + " }}"),
    "nested parentheses": (DEEP, "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}"),
    "nested ifs": (DEEP, "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000),
    "long sum": (DEEP, "{{ 1" + "+1" * 30_000 + " }}"),
    "long not": (DEEP, "{{ " + "not " * 15_000 + "1 }}"),
    "memory": (
        "it needs more memory than there is",
        "{% set n = namespace(s=[]) %}{% for i in range(200) %}{% set n.s = [n.s, range(999999) | list] %}{% endfor %}",
    ),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_no_template_reaches_python(case: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate(ESCAPES[case]).render(TALK)
    assert "\n" not in str(caught.value) and "<class" not in str(caught.value)
    assert TALK == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("case", ESCAPES)
def test_no_template_reaches_python_even_without_the_source_check(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are refused when read off the source; the sandbox must hold without that."""
    monkeypatch.setattr(sandbox, "_check_tree", lambda tree, loops: None)
    with pytest.raises(sandbox.Refused):
        sandbox.render(*sandbox.compile_template(ESCAPES[case]), {"messages": TALK}, None)


@pytest.mark.parametrize("case", BOMBS)
def test_no_template_takes_everything(case: str) -> None:
    """Under 6 seconds of processor time, children included, however slow the machine is just now."""
    says, source = BOMBS[case]
    before = processor_seconds()
    with pytest.raises(InputError) as caught:
        ChatTemplate(source, name="model's").render(TALK)
    assert processor_seconds() - before < 6
    assert str(caught.value).startswith("model's: the ") and any(text in str(caught.value) for text in says.split("|"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def test_a_child_that_is_killed_by_its_limits_says_so() -> None:
    """What the counters cannot see, the operating system's limits do."""
    before = processor_seconds()
    with pytest.raises(InputError, match="rendering one conversation took more than 5 seconds or 512 MiB"):
        ChatTemplate("{{ (range(999999) | list" + " | unique | list" * 60 + ") | length }}").render(TALK)
    assert processor_seconds() - before < 6


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "{% for a in messages[0].content %}{% for b in range(900000) %}{% endfor %}{% endfor %}",
            "1000000 loop turns",
        ),
        (
            "{% set n = namespace(s=messages[0].content) %}"
            "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "4194304 characters",
        ),
        ("{% set s = messages[0].content %}{% if s %}{{ s * 9 }}{% endif %}", "`*` is allowed between numbers only"),
    ],
)
def test_a_bomb_that_only_some_rows_set_off_is_stopped_in_this_process(source: str, says: str) -> None:
    """A template may behave on the row it is tried with and explode on another."""
    template = ChatTemplate(source)
    assert template.render([{"role": "user", "content": ""}]) == ""
    start = time.process_time()
    with pytest.raises(Unrenderable, match=says):
        template.render([{"role": "user", "content": "aaaaaaaa"}])
    assert time.process_time() - start < 3


def test_a_template_that_takes_too_much_three_times_is_given_up() -> None:
    loops = "{% for a in messages[0].content %}{% for b in range(900000) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{# given up #}" + loops)
    template.render([{"role": "user", "content": ""}])
    bad: list[dict[str, Any]] = [{"role": "user", "content": "aa"}]
    for _ in range(3):
        with pytest.raises(Unrenderable):
            template.render(bad)
    with pytest.raises(InputError, match="cannot be used: it takes more than 1000000 loop turns") as caught:
        template.render(bad)
    assert not isinstance(caught.value, Unrenderable)


PIECES = st.sampled_from(
    [
        *(
            "{{",
            "}}",
            "{%",
            "%}",
            "{#",
            "#}",
            "for ",
            "endfor",
            " in ",
            " if ",
            "endif",
            "set ",
            " = ",
            "messages",
            "m",
        ),
        *(".role", "[0]", "[", "]", "(", ")", "{", "}", "'", '"', "|", "join", "tojson", "~", "+", "*", "**", "//"),
        *("9", "9" * 5000, "loop.last", "macro ", "endmacro", "call ", "raw", "endraw", "generation", "endgeneration"),
        *("not ", "is ", "none", "recursive", "namespace(", "\\n", "\\u", "\0", "\ud800", "\U0001f600", "-", ":", ","),
        *("else", "break", "continue", "filter upper", "with ", "block x", "import ", "autoescape ", "do ", "self"),
        *("super()", "varargs", "caller()", "{{ ", " }}", "{% for m in messages %}", "{% endfor %}", "{% if "),
    ]
)
TAGS = st.sampled_from(["{{ %s }}", "{%% set x = %s %%}{{ x }}", "{%% if %s %%}{%% endif %%}", "%s"])


@given(pieces=st.lists(PIECES, max_size=20), tag=TAGS)
@settings(max_examples=300)
def test_no_source_makes_anything_but_a_refusal(pieces: list[str], tag: str) -> None:
    try:
        box, template = sandbox.compile_template(tag % "".join(pieces))
        sandbox.render(box, template, {"messages": TALK, "bos_token": "<s>"}, None)
    except sandbox.Refused as error:
        assert str(error)


def test_the_clock_stops_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.0)
    box, template = sandbox.compile_template("{% for i in range(9) %}{{ i }}{% endfor %}")
    with pytest.raises(sandbox.TooMuch, match="renders for longer than 0 seconds"):
        sandbox.render(box, template, {}, None)


def test_real_templates_stay_far_from_the_limits() -> None:
    """500 turns of talk are nowhere near a million loop turns."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 50} for i in range(500)]
    box, template = sandbox.compile_template("{% for m in messages %}{{ m.role ~ m.content.strip() }}{% endfor %}")
    sandbox.render(box, template, {"messages": talk}, None)
    assert box.turns > 0.99 * sandbox.MAX_TURNS
