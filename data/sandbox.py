"""Jinja's immutable sandbox, made tight enough to run a chat template that came with somebody's model.

The stock sandbox keeps a template from reaching Python, but not from looping for hours or building a string of many
gigabytes. Here loop turns and calls are counted, a clock runs, text cannot grow past a cap, `*` takes numbers only, and
only the filters and string methods that chat templates use exist. Run as a program (see `template.py`), this file
renders one template under limits of the operating system. It imports jinja2, so it is itself imported only where a
template is rendered, and nothing of ours, so that the child process can run it alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LOOP_NESTING = 3
MAX_TURNS = 1_000_000  # loop turns and calls of one rendering
MAX_TEXT = 4 * 1024 * 1024  # characters of any string a template builds
MAX_NUMBER_BITS = 63
MAX_INDENT = 64
MAX_SECONDS = 2.0
CHILD_MEMORY = 512 * 1024 * 1024
CHILD_SECONDS = 5

# What is missing here can make much out of little: center, format, wordwrap, round, batch, ... and `attr`, which once
# led out of the sandbox.
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items"),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select"),
    *("selectattr", "sort", "sum", "title", "trim", "unique", "upper"),
)
TEXT_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
    *("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
FORBIDDEN_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Refused(Exception):
    """A template that breaks a limit or a rule, or says itself that it cannot render these messages."""


class TooMuch(Refused):
    """A rendering that used up its loop turns or its time."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: a mark some templates put around answers; it prints what it holds."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads a plain set)

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
    """The environment one template lives in. Not for two threads at once: the counters are the current rendering's."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._printed)
        self.filters = {name: self.filters[name] for name in FILTERS}
        self.filters |= {"tojson": self._tojson, "indent": self._indent, "join": self._join, "replace": self._replace}
        self.filters |= {"string": self._text, "concat": self._concat, "counted": _counting(self)}
        self.globals = {name: self.globals[name] for name in ("dict", "namespace")}
        self.globals |= {"range": _range, "raise_exception": raise_exception}
        self.start()

    def start(self) -> None:
        """Begin a rendering: full counters."""
        self.turns = MAX_TURNS
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        """Count a loop turn or a call; raises TooMuch when the rendering has had its share, or its time."""
        self.turns -= 1
        if self.turns < 0:
            raise TooMuch(f"it takes more than {MAX_TURNS} loop turns and calls")
        if time.monotonic() > self.deadline:
            raise TooMuch(f"it renders for longer than {MAX_SECONDS:.0f} seconds")

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes: counted; the string methods that can make long texts are ours."""
        self.spend()
        if isinstance(owner := getattr(__obj, "__self__", None), str):
            if __obj.__name__ == "join":
                return self._join(list(*args), owner)
            if __obj.__name__ == "replace":
                own = {
                    name: value for name, value in kwargs.items() if not name.startswith("_")
                }  # jinja adds _loop_vars
                return self._replace(owner, *args, **own)
        return super().call(__context, __obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's own rule, and of a string's methods only those named above."""
        if isinstance(obj, str) and attr not in TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format`, not even jinja's safe one: a width in it makes any text huge."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once what jinja would let through as an undefined value."""
        raise Refused(f"`{attribute}` of {type(obj).__name__} may not be used")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers; `+` also joins texts and lists."""
        if operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                check_length(len(left) + len(right))
        elif not any(isinstance(operand, jinja2.Undefined) for operand in (left, right)):  # jinja's own error names it
            _check_numbers(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _text(self, value: Any) -> str:
        """`str(value)` for a value whose text is not too long (that of a list holding one list many times would be)."""
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
        return self._join(values)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(filters.make_attrgetter(self, attribute), values)
        texts = [self._text(value) for value in values]
        check_length(sum(map(len, texts)) + len(d) * len(texts))
        return str(d).join(texts)

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text(s), self._text(old), self._text(new)
        check_length(len(text) + text.count(old) * max(0, len(new) - len(old)))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, step = self._text(s), width if isinstance(width, str) else " " * _small(width)
        check_length(len(text) + len(step) * (text.count("\n") + 1))
        return filters.do_indent(text, step, first, blank)

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
        step = None if indent is None else _small(indent)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=step, separators=separators, sort_keys=sort_keys)


def _counting(sandbox: Sandbox) -> Callable[[Context, Iterable[Any]], CountedList]:
    """The filter that `for` loops run through; it takes the context only so that jinja does not fold it away."""

    @jinja2.pass_context
    def counted(_context: Context, items: Iterable[Any]) -> CountedList:
        result = CountedList(islice(items, MAX_TURNS + 1))
        result.sandbox = sandbox
        return result

    return counted


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if numbers[MAX_TURNS:]:
        raise Refused(f"range() of more than {MAX_TURNS} numbers")
    return numbers


def raise_exception(message: object) -> None:
    """What templates call when a conversation does not suit them."""
    raise Refused(f"it says: {message}")


def check_length(length: int) -> None:
    """Raise Refused for text a template may not build."""
    if length > MAX_TEXT:
        raise Refused(f"it builds a text of more than {MAX_TEXT} characters")


def _check_numbers(operator: str, left: Any, right: Any) -> None:
    for operand in (left, right):
        if not isinstance(operand, (int, float)):
            raise Refused(
                f"`{operator}` is allowed between numbers only, not {type(left).__name__} and {type(right).__name__}"
            )
    bits = [int(operand).bit_length() for operand in (left, right) if isinstance(operand, int)]
    if (operator == "*" and sum(bits) > MAX_NUMBER_BITS) or (
        operator == "**" and int(left).bit_length() * abs(right) > MAX_NUMBER_BITS
    ):
        raise Refused(f"`{operator}` gives too large a number")


def _small(width: int) -> int:
    """An indentation that a person would ask for."""
    if not 0 <= int(width) <= MAX_INDENT:
        raise Refused(f"an indentation of {width}; 0 to {MAX_INDENT} are allowed")
    return int(width)


def compile_template(source: str) -> tuple[Sandbox, jinja2.Template]:
    """Parse, check and compile. Raises Refused for a broken or forbidden template."""
    sandbox = Sandbox()
    try:
        tree = sandbox.parse(source)
        _check_tree(tree, 0)
        return sandbox, sandbox.from_string(_guarded(tree, sandbox))
    except jinja2.TemplateSyntaxError as error:
        raise Refused(f"line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError):
        raise Refused("it is nested too deeply") from None
    except Refused:
        raise
    except Exception as error:  # a parser that a mere source string makes fail: foreign input, not our bug
        raise Refused(f"{type(error).__name__}: {error}") from None


def _check_tree(node: nodes.Node, loops: int) -> None:
    """Rules readable off the source: no other files, no private names, few nested loops, no repeated strings."""
    if isinstance(node, FORBIDDEN_NODES):
        raise Refused(f"line {node.lineno}: it may not load other templates")
    if isinstance(node, nodes.For):
        loops += 1
        if loops > MAX_LOOP_NESTING:
            raise Refused(f"line {node.lineno}: loops are nested deeper than {MAX_LOOP_NESTING}")
        if node.recursive:
            raise Refused(f"line {node.lineno}: recursive loops are not allowed")
    if isinstance(node, (nodes.Mul, nodes.Pow)) and (_is_text(node.left) or _is_text(node.right)):
        raise Refused(f"line {node.lineno}: `{node.operator}` is allowed between numbers only")
    if (name := _name(node)).startswith("__"):
        raise Refused(f"line {node.lineno}: the private name {name[:40]!r} may not be used")
    for child in node.iter_child_nodes():
        _check_tree(child, loops)


def _name(node: nodes.Node) -> str:
    """The attribute or variable that a node reads, as far as the source says."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return ""


def _is_text(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Const):
        return isinstance(node.value, str)
    return isinstance(node, (nodes.TemplateData, nodes.Concat, nodes.List, nodes.Tuple))


def _guarded(tree: nodes.Template, sandbox: Sandbox) -> nodes.Template:
    """Route what jinja leaves unguarded, the sequence of a `for` and the `~` operator, through filters that count."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filtered(cast(nodes.Expr, loop.iter), "counted")
    _replace_concat(tree)
    tree.set_environment(sandbox)
    return tree


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _replace_concat(node: nodes.Node) -> None:
    for field, value in list(node.iter_fields()):
        if isinstance(value, nodes.Concat):
            setattr(node, field, _concat_filter(value))
        elif isinstance(value, list):
            value[:] = [_concat_filter(item) if isinstance(item, nodes.Concat) else item for item in value]
    for child in node.iter_child_nodes():
        _replace_concat(child)


def _concat_filter(node: nodes.Concat) -> nodes.Filter:
    return _filtered(nodes.List(node.nodes, lineno=node.lineno), "concat")


def render(sandbox: Sandbox, template: jinja2.Template, variables: dict[str, Any], date: str | None) -> str:
    """One rendering. Raises Refused for anything that goes wrong in it: the template is foreign code."""
    sandbox.start()
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables, strftime_now=clock(date)):
            length += len(piece)
            check_length(length)
            pieces.append(piece)
    except Refused:
        raise
    except MemoryError:
        raise TooMuch("it needs more memory than there is") from None
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
    return "".join(pieces)


def clock(date: str | None) -> Callable[[str], str]:
    """`strftime_now(format)`: the present, or always the given ISO date."""
    return lambda layout: (datetime.now() if date is None else datetime.fromisoformat(date)).strftime(layout)


def _limit() -> None:
    """Memory and processor time of this process, where the operating system can limit them; and no core file."""
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_AS: CHILD_MEMORY, resource.RLIMIT_CPU: CHILD_SECONDS, resource.RLIMIT_CORE: 0}
    for what, limit in limits.items():
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def main() -> None:
    """The child: one job on standard input; the answer on standard output says what is broken, if anything.

    A row that the template merely does not suit is no fault here: the parent renders it again and reports that row.
    """
    _limit()
    job = json.load(sys.stdin)
    broken = ""
    try:
        sandbox, template = compile_template(job["source"])
        with suppress_row_faults():
            render(sandbox, template, job["variables"], job["date"])
    except Refused as error:
        broken = str(error)
    json.dump({"broken": broken}, sys.stdout)


@contextmanager
def suppress_row_faults() -> Iterator[None]:
    """Let only TooMuch through."""
    try:
        yield
    except TooMuch:
        raise
    except Refused:
        pass


if __name__ == "__main__":
    main()
