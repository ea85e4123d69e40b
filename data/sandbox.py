"""Jinja's immutable sandbox, made tight enough to run a chat template that came with somebody's model.

The stock sandbox keeps a template from reaching Python, but not from looping for hours or building a string of many
gigabytes. Here every loop turn and call is counted, text cannot grow past a cap, `*` takes numbers only, and only the
filters and string methods that chat templates use exist. As a program of its own (see `template.py`) this file renders
one template under limits of the operating system. Imports jinja2, so it is itself imported only where a template is used;
imports nothing of ours, so that the child can run it alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LOOP_NESTING = 3
MAX_TURNS = 200_000  # loop turns and calls of one rendering
MAX_TEXT = 8 * 1024 * 1024  # characters of any string a template builds
MAX_NUMBER_BITS = 63
MAX_SECONDS = 5.0
CHILD_MEMORY = 512 * 1024 * 1024
CHILD_SECONDS = 5

FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items join last length list lower map max min reject"
    " rejectattr replace reverse safe select selectattr sort string sum title trim unique upper"
).split()
TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace"
    " istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip"
    " split splitlines startswith strip swapcase title upper".split()
)
ARITHMETIC = frozenset(["+", "-", "*", "/", "//", "%", "**"])
FORBIDDEN_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Refused(Exception):
    """A template that breaks a limit or a rule, or says itself that it cannot render these messages."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: a mark some templates put around answers; it prints what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class CountedList(list[Any]):
    """What a `for` runs over: iterating it spends the rendering's turns."""

    sandbox: "Sandbox"

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.sandbox.spend()
            yield item


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment one template lives in. Not for two threads at once: the counters belong to the rendering under way."""

    intercepted_binops = ARITHMETIC

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
            finalize=self._printed,
        )
        self.filters = {name: self.filters[name] for name in FILTERS}
        self.filters |= {"tojson": self._tojson, "indent": self._indent, "counted": _counting(self)}
        self.filters |= {"concat": self._concat, "join": self._join, "replace": self._replace, "string": self._text}
        names = {name: self.globals[name] for name in ("dict", "namespace")}
        self.globals = {**names, "range": self._range, "raise_exception": raise_exception}
        self.start()

    def start(self) -> None:
        """Begin a rendering: full counters."""
        self.turns = MAX_TURNS
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, turns: int = 1) -> None:
        """Count loop turns or calls; raises Refused when the rendering has had its share, or its time."""
        self.turns -= turns
        if self.turns < 0:
            raise Refused(f"it takes more than {MAX_TURNS} loop turns and calls")
        if time.monotonic() > self.deadline:
            raise Refused(f"it renders for longer than {MAX_SECONDS:.0f} seconds")

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes: counted, and refused beforehand where a string method would grow the text too far."""
        self.spend()
        if isinstance(owner := getattr(__obj, "__self__", None), str):
            name = __obj.__name__
            if name == "join" and args:
                return self._join(args[0], owner)
            if name == "replace" and len(args) >= 2:
                return self._replace(owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's own rule, and for strings only the methods named here (`center`, `format`, ... can make huge ones)."""
        if isinstance(obj, str) and attr not in TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers; `+` also joins texts and lists."""
        if operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                check_length(len(left) + len(right))
            return super().call_binop(context, operator, left, right)
        if not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            self._refuse_undefined(left, right)
            raise Refused(f"`{operator}` is allowed between numbers only, not {kind(left)} and {kind(right)}")
        if operator == "*" and _bits(left) + _bits(right) > MAX_NUMBER_BITS:
            raise Refused("`*` gives too large a number")
        if operator == "**" and _bits(left) * abs(right) > MAX_NUMBER_BITS:
            raise Refused("`**` gives too large a number")
        return super().call_binop(context, operator, left, right)

    def _refuse_undefined(self, *operands: Any) -> None:
        """An undefined operand gives jinja's own error, which names the variable."""
        for operand in operands:
            if isinstance(operand, jinja2.Undefined):
                operand + 0

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if numbers and len(numbers) > MAX_TURNS:
            raise Refused(f"range() of {len(numbers)} numbers; at most {MAX_TURNS} are allowed")
        return numbers

    def _text(self, value: Any) -> str:
        """`str(value)` for a value whose text is not too long (a list that holds itself many times over would be)."""
        if not isinstance(value, str):
            self._weigh(value)
        return str(value)

    def _printed(self, value: Any) -> Any:
        self._weigh(value)
        return value

    def _weigh(self, value: Any) -> None:
        """Bound the size of a value's text by walking it; the walk itself is counted."""
        total, stack = 0, [value]
        while stack:
            node = stack.pop()
            if isinstance(node, str):
                total += len(node)
                check_length(total)
            elif isinstance(node, (list, tuple, dict)):
                self.spend()
                stack.extend(node)
                stack.extend(node.values() if isinstance(node, dict) else ())

    def _concat(self, values: list[Any]) -> str:
        texts = [self._text(value) for value in values]
        check_length(sum(map(len, texts)))
        return "".join(texts)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        texts = [self._text(value) for value in values]
        check_length(sum(map(len, texts)) + len(d) * len(texts))
        return str(d).join(texts)

    def _replace(self, s: Any, old: str, new: str, count: int = -1) -> str:
        text = self._text(s)
        grown = text.count(old) * max(0, len(new) - len(old))
        check_length(len(text) + grown)
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        space = width if isinstance(width, str) else " " * small(width)
        lines = str(s).splitlines(keepends=True)
        check_length(len(s) + len(space) * len(lines))
        keep = [(first or i > 0) and (blank or bool(line.strip())) for i, line in enumerate(lines)]
        return "".join(space + line if kept else line for kept, line in zip(keep, lines, strict=True))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without the HTML escapes of jinja's own filter, which no model was trained on."""
        self._weigh(value)
        space = None if indent is None else small(indent)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=space, separators=separators, sort_keys=sort_keys)


def _counting(sandbox: Sandbox) -> Callable[[Context, Iterable[Any]], CountedList]:
    """The filter that `for` loops run through; it takes the context only so that jinja does not fold it when compiling."""

    @jinja2.pass_context
    def counted(_context: Context, items: Iterable[Any]) -> CountedList:
        result = CountedList(islice(items, MAX_TURNS))
        result.sandbox = sandbox
        return result

    return counted


def raise_exception(message: object) -> None:
    """What templates call when a conversation does not suit them."""
    raise Refused(f"it says: {message}")


def check_length(length: int) -> None:
    """Raise Refused for text a template may not build."""
    if length > MAX_TEXT:
        raise Refused(f"it builds a text of more than {MAX_TEXT} characters")


def small(width: int) -> int:
    """An indentation a person would ask for."""
    if not 0 <= int(width) <= 64:
        raise Refused(f"an indentation of {width}; 0 to 64 are allowed")
    return int(width)


def kind(value: Any) -> str:
    """A value's type as a template's author would call it."""
    return {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}.get(
        type(value), type(value).__name__
    )


def _bits(number: float) -> int:
    return int(number).bit_length() if isinstance(number, int) else 1


def compile_template(source: str) -> tuple[Sandbox, jinja2.Template]:
    """Parse, check and compile. Raises Refused for a broken or forbidden template."""
    sandbox = Sandbox()
    try:
        tree = sandbox.parse(source)
        _check_tree(tree, 0)
        _guard(tree)
        return sandbox, sandbox.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise Refused(f"line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError):
        raise Refused("it is nested too deeply") from None


def _check_tree(node: nodes.Node, loops: int) -> None:
    """Rules that can be read off the source: no other files, no private names, few nested loops, no repeated strings."""
    if isinstance(node, FORBIDDEN_NODES):
        raise Refused(f"line {node.lineno}: it may not load other templates")
    if isinstance(node, nodes.For):
        loops += 1
        if loops > MAX_LOOP_NESTING:
            raise Refused(f"line {node.lineno}: loops are nested deeper than {MAX_LOOP_NESTING}")
        if node.recursive:
            raise Refused(f"line {node.lineno}: recursive loops are not allowed")
    if isinstance(node, (nodes.Mul, nodes.Pow)) and any(map(_is_text, (node.left, node.right))):
        raise Refused(f"line {node.lineno}: `{node.operator}` is allowed between numbers only")
    _check_name(node)
    for child in node.iter_child_nodes():
        _check_tree(child, loops)


def _check_name(node: nodes.Node) -> None:
    name = None
    if isinstance(node, nodes.Getattr):
        name = node.attr
    elif isinstance(node, nodes.Name):
        name = node.name
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        name = node.value
    if name and name.startswith("__"):
        raise Refused(f"line {node.lineno}: the private name {name[:40]!r} may not be used")


def _is_text(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Const):
        return isinstance(node.value, str)
    return isinstance(node, (nodes.TemplateData, nodes.Concat, nodes.List, nodes.Tuple))


def _guard(tree: nodes.Template) -> None:
    """Route what jinja leaves unguarded, the sequence of a `for` and the `~` operator, through counting filters."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "counted")
    _replace_concat(tree)
    tree.set_environment(tree.environment)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _replace_concat(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(node, field, _concat_filter(value))
        elif isinstance(value, list):
            value[:] = [_concat_filter(item) if isinstance(item, nodes.Concat) else item for item in value]
    for child in node.iter_child_nodes():
        _replace_concat(child)


def _concat_filter(node: nodes.Concat) -> nodes.Filter:
    return _filtered(nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "concat")


def render(sandbox: Sandbox, template: jinja2.Template, variables: dict[str, Any], date: str | None) -> str:
    """One rendering. Raises Refused for anything that goes wrong in it: the template is foreign code."""
    sandbox.start()
    sandbox.globals["strftime_now"] = clock(date)
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables, strftime_now=clock(date)):
            length += len(piece)
            check_length(length)
            pieces.append(piece)
    except Refused:
        raise
    except (Exception, RecursionError, MemoryError) as error:
        raise Refused(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
    return "".join(pieces)


def clock(date: str | None) -> Callable[[str], str]:
    """`strftime_now(format)`: the present, or always the given ISO date."""
    return lambda layout: (datetime.now() if date is None else datetime.fromisoformat(date)).strftime(layout)


def _limit() -> None:
    """Memory and processor time of this process, where the operating system can limit them."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CHILD_SECONDS, CHILD_SECONDS))


def main() -> None:
    """The child: one job on standard input, one JSON answer on standard output."""
    _limit()
    job = json.load(sys.stdin)
    try:
        sandbox, template = compile_template(job["source"])
    except Refused as error:
        json.dump({"broken": str(error)}, sys.stdout)
        return
    try:
        answer = {"text": render(sandbox, template, job["variables"], job["date"])}
    except Refused as error:
        answer = {"refused": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
