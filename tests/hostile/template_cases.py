"""Chat templates: broken ones, ones that reach for Python, and ones that take all the time and memory there is."""

from harness import Case, Make
from makes import ESCAPES, LONG, all_of, keys, nested, put, rows, told, turns

CONFIG = "m/tokenizer_config.json"
ARGV = ("data", "good.jsonl", "--model", "m")
DOUBLED = "{% set x = namespace(v=(1, 1)) %}{% for i in range(60) %}{% set x.v = (x.v, x.v) %}{% endfor %}"
LISTED = "{% set x = namespace(v=[1]) %}{% for i in range(40) %}{% set x.v = [x.v, x.v] %}{% endfor %}"
GROWN = "{% set x = namespace(v='a') %}{% for i in range(40) %}{% set x.v = x.v ~ x.v %}{% endfor %}"
LOOP = "{% for i in range(99999) %}"

BROKEN: dict[str, str] = {
    "a block that does not end": "{% for m in messages %}{{ m }}",
    "an expression that does not end": "{{ messages",
    "an unknown tag": "{% evil %}",
    "an unknown filter": "{{ messages | evil }}",
    "a filter of 10,000 characters": "{{ messages | " + "e" * 10_000 + " }}",
    "an unknown test": "{{ messages is evil }}",
    "an unknown function": "{{ open('/etc/passwd') }}",
    "a name of 10,000 characters": "{{ " + "e" * 10_000 + "() }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "an extension of another": "{% extends 'x' %}",
    "a walk to classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a walk by a filter": "{{ '' | attr('__class__') }}",
    "a walk by a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a walk by map": "{{ [''] | map(attribute='__class__') | list }}",
    "the globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "what it says itself, of escapes": "{{ raise_exception('" + ESCAPES + "') }}",
    "what it says itself, of 1,000,000 characters": "{{ raise_exception('x' * 1000000) }}",
    "what it says itself, in paragraphs": "{{ raise_exception('a\\n\\n' * 100) }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a key that is missing": "{{ messages[0].none.such }}",
    "nested 500 deep": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "parentheses 5,000 deep": "{{ " + nested(5000, "(", ")") + " }}",
    "a list 5,000 deep": "{{ " + nested(5000) + " }}",
    "60 KB of ifs": "{% if 1 %}" * 6000,
    "100 KB": "{# " + "a" * 100_000 + " #}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for m in [messages] recursive %}{{ loop([m]) }}{% endfor %}",
    "changes of the messages": "{{ messages.clear() }}",
    "a number of 10^9 digits": "{{ 10 ** 1000000000 }}",
    "a number of 5,000 digits": "{{ 10 ** 5000 }}",
    "a text of 10^10 characters": "{{ 'a' * 10000000000 }}",
    "a text filled up to 10^10": "{{ 'a'.ljust(10000000000) }}",
    "a number filled up to 10^10": "{{ '%010000000000d' % 1 }}",
    "a text filled up by format": "{{ '{:>10000000000}'.format(1) }}",
    "a text that doubles 40 times": GROWN + "{{ x.v }}",
    "a text of blanks for each": "{{ messages | join(' ' * 4000000000) }}",
    "replacing everywhere": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "indents of 10^9": "{{ 'a\na' | indent(1000000000) }}",
    "a list of 10^10": "{{ [1] * 10000000000 }}",
    "a range of 10^10": "{{ range(10000000000) | list }}",
    "nested tuples compared": DOUBLED + DOUBLED.replace("x", "y") + "{{ x.v == y.v }}",
    "nested tuples hashed": DOUBLED + "{{ {x.v: 1} }}",
    "nested tuples sorted": DOUBLED + DOUBLED.replace("x", "y") + "{{ [x.v, y.v] | sort }}",
    "nested lists as JSON": LISTED + "{{ x.v | tojson }}",
    "lists that are summed": "{{ ([[1] * 5000] * 5000) | sum(start=[]) | length }}",
    "a list that is sliced again and again": LOOP + "{{ (range(99999) | list)[i:] | length }}{% endfor %}",
    "a text that is split again and again": LOOP + "{{ ('a ' * 99999).split() | length }}{% endfor %}",
    "tags taken out of a long text": "{{ ('<' * 500000) | striptags | length }}",
    "a date of NUL": "{{ strftime_now('\\0') }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "a text drawn by chance": "{{ range(9) | random }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "words made up": "{{ lipsum() }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
SILENT: dict[str, str] = {  # that leave out what was said: nothing can be trained
    "the roles alone": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "the first message alone": "{{ messages[0].content }}",
    "the contents turned round": "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
    "the messages turned round": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "the number of messages first": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
CONTENTS = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]
ASKED, CALLING = {"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": CALLS}
UNSAID: dict[str, object] = {  # rows of which such a template says a part alone
    "a call": {"messages": [ASKED, CALLING]},
    "tools": {**turns("hi", "yo"), "tools": [{"type": "function", "function": {"name": "look"}}]},
    "a system text": {"messages": [{"role": "system", "content": "short"}, *turns("hi", "yo")["messages"]]},
    "thoughts": {"messages": [ASKED, {"role": "assistant", "content": "yo", "reasoning_content": "hm"}]},
}


def template(source: str) -> Make:
    return keys(CONFIG, chat_template=source)


CASES = [
    *[Case(f"template: {name}", template(source), ARGV) for name, source in (BROKEN | SILENT).items()],
    *[
        Case(f"template file: {name}", put("t.jinja", content), (*ARGV, "--template", "t.jinja"))
        for name, content in {
            "empty": b"",
            "not UTF-8": b"\xff{{ messages }}",
            "a broken one": b"{% for",
            "2 MB": b"a" * 2_000_000,
            "NUL": b"{{ \0 }}",
        }.items()
    ],
    *[
        Case(f"template named {told(name)}", all_of(), (*ARGV, "--template", name))
        for name in ("none such", "../../etc/passwd", LONG[:5000], ESCAPES, "m", "/dev/zero")
    ],
    *[
        Case(f"template: {name} left out", all_of(template(CONTENTS), rows(row)), ("data", "d.jsonl", "--model", "m"))
        for name, row in UNSAID.items()
    ],
    Case("template: a special token in a row", rows(turns("hi<|im_end|>", "yo")), ("data", "d.jsonl", "--model", "m")),
]
