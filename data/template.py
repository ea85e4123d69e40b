"""Chat templates: messages in, the exact text a model sees out, and where in it the answers stand.

A template is a program that comes with a model, so it is treated as one: all rendering happens in one child process
with limits on memory and time (see `render_child.py`), started on first need and used by every template from then on.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from datetime import date as Date
from pathlib import Path
from typing import Any, Self

from ..child import Child, child_command, child_environment
from ..errors import EnvironmentProblem, InputError
from ..files import read_text
from ..text.tokenizer import NOTHING, writes_bos
from ..text.tokenizer_folder import as_tokenizer
from .protocol import AnyTokenizer, TokenizerLike
from .said import REASONING
from .turns import Rendered, Talk, Turn, Unrenderable, before_mark, place, too_many, with_thoughts

MAX_SOURCE_BYTES = 64 * 1024
RENDER_SECONDS = 1.0  # processor time of one conversation, and a little more for each of its messages
CHILD_MEMORY = 512 * 1024 * 1024
JOB_CHARACTERS = 1 << 20  # of the conversations that are sent at a time
SHOWN_ERROR = 500
TOOK = f"it takes more than {RENDER_SECONDS:g} s or {CHILD_MEMORY // 2**20} MiB"
CHILD_NAME = "the child process that renders chat templates"

FILE = "chat_template.jinja"  # in the folder of a model or an adapter, as transformers has it: its template
BUILTINS = ("chatml", "llama3", "plain", "zephyr")  # files in the folder templates


class Unusable(InputError):
    """A template that renders nothing, whatever it is given."""


class ChatTemplate:
    """A chat template in Jinja, as Hugging Face writes them.

    `tokens` are the variables that name special tokens (`bos_token` and so on); one that a model lacks is left out.
    `date` (ISO, such as "2025-01-31") fixes what `strftime_now` gives; None is the present. `notice` is a sentence for
    the user about where the template came from, or "". Rendering raises InputError for a template that is broken or
    breaks a limit, and its subclass Unrenderable for messages that it does not suit; both name `name`."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        *,
        name: str = "chat template",
        date: str | None = None,
    ) -> None:
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_SOURCE_BYTES:
            raise InputError(f"{name}: the chat template has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed.")
        if date is not None:
            Date.fromisoformat(date)
        self.source, self.tokens = source, dict(tokens or {})
        self.name, self.date, self.notice = name, date, ""

    @property
    def undated(self) -> bool:
        """Whether it writes the date of the day on which it renders."""
        return self.date is None and "strftime_now" in self.source

    def dated(self, date: str | None = None) -> Self:
        """This template, which if `undated` writes one date (default: today's) whenever it renders."""
        made = copy(self)
        made.date = date or Date.today().isoformat() if self.undated else self.date
        return made

    def portable(self) -> str:
        """The source as a file of its own, which a reader gives the tokenizer's own tokens: a built-in may use none."""
        names = ("bos_token", "eos_token")
        return "".join(NOTHING.format(n) for n in names if self.tokens.get(n) == "" and n in self.source) + self.source

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text for `messages`; with `add_generation_prompt` it ends where the assistant's answer begins.
        variables: more for the template to use, as transformers' `apply_chat_template` takes them by name."""
        shown = None if tools is None else list(map(dict, tools))
        more = None if variables is None else dict(variables)
        talk = Talk(list(map(dict, messages)), shown, prompt=add_generation_prompt, variables=more)
        (made,) = self.render_all([talk])
        if isinstance(made, Unrenderable):
            raise made
        return made.text

    def render_all(self, talks: Iterable[Talk]) -> Iterator[Rendered | Unrenderable]:
        """Every conversation's text with the places of its wanted turns, or why there is none, as it is asked for."""
        shared = json.dumps({"source": self.source, "date": self.date, "tokens": self.tokens})
        for some in _at_a_time(talks):
            for (talk, _), answer in zip(some, CHILD.ask(shared, [job for _, job in some]), strict=False):
                if broken := answer.get("broken", "")[:SHOWN_ERROR]:  # the last answer
                    kind = Unusable if answer.get("always") else InputError
                    raise kind(f"{self.name}: the chat template cannot be used: {broken.rstrip('.')}.")
                yield self._read(talk, answer)

    def _read(self, talk: Talk, answer: dict[str, Any]) -> Rendered | Unrenderable:
        """One conversation's texts, as the child tells them, into the places of its turns."""
        (whole, *rest), turns = answer["texts"], dict[int, Turn | Unrenderable]()
        if not isinstance(whole, str):
            return self._refused(whole)
        told = dict(zip(talk.cuts[1:], rest, strict=True))
        told |= {cut: before_mark(whole, *text) for cut, text in told.items() if cut[1] and isinstance(text, list)}
        if not told:
            return Rendered(whole, dict.fromkeys(talk.turns, too_many(talk)))
        for i in talk.turns:
            prompt, upto = told[i, True], told.get((i + 1, False), [len(whole), ""])
            refused = next((one for one in (prompt, upto) if isinstance(one, dict)), None)
            turns[i] = self._refused(refused) if refused else place(talk, i, whole, prompt, upto)
        last = len(talk.messages) - 1
        prompt = told.get((last, True))
        if isinstance(prompt, tuple) and (made := with_thoughts(talk, whole, *prompt)):
            whole, turns[last] = made
        return Rendered(whole, turns)

    def _refused(self, told: dict[str, str]) -> Unrenderable:
        return Unrenderable(f"{self.name}: the template cannot render this: {told['refused'][:SHOWN_ERROR]}")


def _shown(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers shows it to templates: null is absent, and reasoning has the names they know it by."""
    shown = {key: value for key, value in message.items() if key != "weight" and value is not None}
    reasoning = next((shown[key] for key in REASONING if key in shown), None)
    return shown if reasoning is None else {"thinking": reasoning, **shown, "reasoning_content": reasoning}


def _at_a_time(talks: Iterable[Talk]) -> Iterator[list[tuple[Talk, str]]]:
    """Conversations with what the child is sent of each, as many as are sent at a time."""
    some, size = list[tuple[Talk, str]](), 0
    for talk in talks:
        job = {"messages": list(map(_shown, talk.messages)), "tools": talk.tools, "cuts": talk.cuts}
        some.append((talk, json.dumps(job | {"variables": talk.variables or {}})))
        size += len(some[-1][1])
        if size >= JOB_CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


TemplateChoice = str | os.PathLike[str] | ChatTemplate | None


class _Child:
    """The process that renders: started on first need, and one request at a time."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as a forked process must: the process is its parent's, and nobody else holds the lock here."""
        self.lock = threading.RLock()
        self.child: Child | None = None

    def ask(self, shared: str, jobs: Sequence[str]) -> list[dict[str, Any]]:
        """The answer to each job, up to the first that says that the template is broken. EnvironmentProblem where
        something else ends the process."""
        request = f'{shared[:-1]}, "talks": [{", ".join(jobs)}]}}\n'.encode()
        with self.lock:
            try:
                child, found = self._running(), list[dict[str, Any]]()
                while len(found) < len(jobs) and not (found and "broken" in found[-1]):
                    found.append(self._answer(child, b"" if found else request))
                return found
            except BaseException:  # an interrupt, say: its answers would be taken for the next ones
                self.stop()
                raise

    def stop(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.stop()

    def _answer(self, child: Child, request: bytes) -> dict[str, Any]:
        with contextlib.suppress(EOFError):
            return dict(json.loads(child.ask(request)))
        self.stop()
        if child.process.returncode in (-signal.SIGKILL, -signal.SIGTERM):
            raise EnvironmentProblem(f"{CHILD_NAME} was killed; perhaps the machine is out of memory.")
        return {"broken": TOOK}

    def _running(self) -> Child:
        if self.child is None or self.child.process.poll() is not None:
            self.stop()
            program, limits = Path(__file__).with_name("render_child.py"), (str(RENDER_SECONDS), str(CHILD_MEMORY))
            command = child_command(program, ["jinja2", "markupsafe"], *limits)
            try:
                child = self.child = Child(command, stderr=subprocess.PIPE, env=child_environment())
            except OSError as error:
                raise EnvironmentProblem(f"{CHILD_NAME} does not start: {error}") from None
            try:
                child.ask(b"")
            except EOFError:
                last = child.process.communicate()[1].decode(errors="replace").strip().rpartition("\n")[2]
                raise EnvironmentProblem(f"{CHILD_NAME} does not run here: {last}") from None
        return self.child


CHILD = _Child()
os.register_at_fork(after_in_child=CHILD.forget)


def template_for(tokenizer: AnyTokenizer, override: TemplateChoice = None) -> ChatTemplate:
    """The template to use: `override` (a built-in's name, a file, a template), else the tokenizer's, else a built-in.

    A tokenizer without a template gets chatml if its vocabulary has chatml's two tokens, else zephyr, whose marks are
    plain text and whose turns end in the end-of-text token: no token is ever added. `.notice` says so. InputError for a
    name that is neither a built-in nor a file."""
    if isinstance(override, ChatTemplate):
        return override
    tokenizer = as_tokenizer(tokenizer)
    if override is not None and (name := os.fspath(override)) in BUILTINS:
        return _builtin(tokenizer, name)
    if override is not None:
        if not Path(name).is_file():
            what = f"neither a built-in ({', '.join(BUILTINS)}) nor a file"
            raise InputError(f"template {name!r}: {what}: name one of those or a .jinja file.")
        return ChatTemplate(read_text(Path(name), MAX_SOURCE_BYTES), tokenizer.named_tokens, name=name)
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer.chat_template, tokenizer.named_tokens, name="the model's own template")
    known = all(len(tokenizer.encode(mark)) == 1 for mark in ("<|im_start|>", "<|im_end|>"))
    template = _builtin(tokenizer, "chatml" if known else "zephyr")
    plain = "its marks are plain text and turns end in the end-of-text token"
    why = "its two tokens are in the vocabulary" if known else plain
    template.notice = f"the model has no chat template: using {template.name} ({why}; no new tokens are added)"
    return template


def _builtin(tokenizer: TokenizerLike, name: str) -> ChatTemplate:
    bos = (tokenizer.bos_token or "") if name == "llama3" or expects_bos(tokenizer) else ""
    tokens = {**tokenizer.named_tokens, "bos_token": bos, "eos_token": tokenizer.eos_token or ""}
    return ChatTemplate(builtin(name), tokens, name=name)


def builtin(name: str) -> str:
    """The source of one of BUILTINS."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def expects_bos(tokenizer: TokenizerLike) -> bool:
    """Whether texts begin with BOS for this model: its own template says, else its files (`adds_bos`, which another
    library's tokenizer may lack), else a BOS that is not also EOS is one."""
    if tokenizer.chat_template:
        return writes_bos(tokenizer.chat_template)
    said: bool | None = getattr(tokenizer, "adds_bos", None)
    return tokenizer.bos_token is not None and (tokenizer.bos_id != tokenizer.eos_id if said is None else said)
