"""The child process in which chat templates run: Jinja's own immutable sandbox, under limits of the operating system.

A template is a program that comes with a model. It runs here, where it can reach nothing and take nothing down:
`template` starts this file as a program of its own, which imports jinja2 and nothing of ours and ends when its input
does. A JSON line in asks for many conversations with one template; a JSON line out answers each as soon as it is
rendered, so that where a limit ends this process its parent knows which conversation it was.
"""

import json
import resource
import signal
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 4 * 1024 * 1024  # characters of a rendering
PER_MESSAGE = 0.0001  # seconds that each message rendered adds to the limit: ten times what the slowest templates take
FOREIGN = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Refused(Exception):
    """A template that is broken, or that breaks a rule, or says itself that it cannot render these messages."""


class TooMuch(BaseException):
    """A rendering that used up its time or memory. Nothing in jinja catches it."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: a mark some templates put around answers; it prints what it holds.

    A variable that is set inside is not known outside, as in transformers."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements inside, as a block of their own."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_printed"), [], [], inside).set_lineno(line)

    @staticmethod
    def _printed(caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """Set up as transformers does it, but for what draws by chance: a row's text would be another one each time."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        del self.filters["random"], self.globals["lipsum"]

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once what jinja would let through as an undefined value."""
        raise Refused(f"`{attribute}` of {type(obj).__name__} may not be used")


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    """JSON without the HTML escapes of jinja's own filter, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise Refused(f"it says: {message}")


def limited(work: Callable[[], Any], seconds: float) -> Any:
    """The result of `work`. Raises TooMuch where it takes more processor time, or memory; what a signal cannot
    interrupt, the system ends with this process two seconds later."""

    def end(*_: object) -> NoReturn:
        raise TooMuch(f"it renders for longer than {seconds:g} s")

    signal.signal(signal.SIGPROF, end)
    _limit(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 2)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return work()
    except MemoryError:
        raise TooMuch(f"it needs more than {int(sys.argv[3]) // 2**20} MiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(what: int, limit: int, *, hard: bool = False) -> None:
    """Set a limit of this process, as far as one that stands already lets it; `hard`: for good."""
    most = resource.getrlimit(what)[1]
    # Below a limit that stands, so that what ends this process for its time is SIGXCPU, never SIGKILL.
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most if hard else max(most - 1, 0))
    resource.setrlimit(what, (limit, limit if hard else most))


def compile_template(source: str) -> jinja2.Template:
    """Raises Refused for a template that is broken or loads others."""
    sandbox = Sandbox()
    try:
        for node in sandbox.parse(source).find_all(FOREIGN):
            raise Refused(f"line {node.lineno}: it may not load other templates")
        return sandbox.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise Refused(f"line {error.lineno}: {error.message}") from None
    except (RecursionError, SyntaxError):
        raise Refused("it is nested too deeply") from None
    except (Refused, MemoryError):
        raise
    except Exception as error:  # a parser that a mere source string makes fail: foreign input, not our bug
        raise Refused(f"{type(error).__name__}: {error}") from None


def render(template: jinja2.Template, variables: dict[str, Any], now: datetime) -> str:
    """One rendering. Raises Refused for anything that goes wrong in it: the template is foreign code."""
    pieces, length = [], 0
    try:
        for piece in template.generate(**variables, strftime_now=lambda layout: now.strftime(layout)):
            length += len(piece)
            if length > MAX_TEXT:
                raise Refused(f"it builds a text of more than {MAX_TEXT} characters")
            pieces.append(piece)
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
    return "".join(pieces)


def answers(job: dict[str, Any], seconds: float, known: dict[str, jinja2.Template]) -> Iterable[dict[str, Any]]:
    """One answer a conversation: its texts, the later ones told by what they share with the first; or what is wrong
    with the template, which is the last answer then. seconds: that a conversation may take, and compiling."""
    try:
        if job["source"] not in known:
            known.clear()
            known[job["source"]] = limited(lambda: compile_template(job["source"]), seconds)
        for talk in job["talks"]:
            texts = partial(conversation, known[job["source"]], job, talk)
            yield {"texts": limited(texts, seconds + PER_MESSAGE * sum(upto for upto, _ in talk["cuts"]))}
    except (Refused, TooMuch) as error:
        yield {"broken": str(error), "always": job["source"] not in known}


def conversation(template: jinja2.Template, job: dict[str, Any], talk: dict[str, Any]) -> list[Any]:
    """The texts of one conversation; a refusal in the place of one that the template refuses."""
    texts: list[Any] = []
    variables = {"documents": None, **job["tokens"], **talk["variables"], "tools": talk["tools"]}
    now = datetime.now() if job["date"] is None else datetime.fromisoformat(job["date"])  # one for all its renderings
    for upto, prompt in talk["cuts"]:
        variables |= {"messages": talk["messages"][:upto], "add_generation_prompt": prompt}
        try:
            made = render(template, variables, now)
            texts.append(told_by(texts[0], made) if texts and isinstance(texts[0], str) else made)
        except Refused as error:
            texts.append({"refused": str(error)})
    return texts


def told_by(whole: str, text: str) -> list[Any]:
    """`text` as [how many characters it shares with the start of `whole`, what follows these]."""
    if whole.startswith(text):
        return [len(text), ""]
    shared = bisect_left(range(len(text)), True, key=lambda at: not whole.startswith(text[: at + 1]))
    return [shared, text[shared:]]


def main() -> None:
    """Answer until the input ends. The first line out says that this process works."""
    for what, limit in ((resource.RLIMIT_AS, int(sys.argv[3])), (resource.RLIMIT_CORE, 0)):
        _limit(what, limit, hard=True)
    known: dict[str, jinja2.Template] = {}
    print("{}", flush=True)
    for line in sys.stdin:
        for answer in answers(json.loads(line), float(sys.argv[2]), known):
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
