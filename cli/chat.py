"""`fourbit chat`: a conversation in the terminal, the answer shown as it is written."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..data.said import spelled, unsaid
from ..data.turns import Talk
from ..errors import InputError, shown, visible
from ..models.generate import generate
from ..models.protocol import CausalLM
from ..settings import setting
from ..text.tokenizer import Tokenizer
from .load import answering, load_adapted
from .options import AnsweringOptions, SamplingOptions
from .parse import Sources
from .show import note

LOST = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions, AnsweringOptions):
    """Talk to a model. /reset forgets the conversation, /quit or Ctrl-D ends it,
    Ctrl-C stops an answer.

      fourbit chat --model M --adapter runs/first
    """

    title: ClassVar[str] = "conversation"
    system: str | None = setting(None, "a system message to begin with")


def run(options: Options, sources: Sources) -> int:
    """Load, and answer line after line."""
    if sys.stdin is None:
        raise InputError("chat reads what you say from standard input, which is closed: start it with one, even empty")
    model, tokenizer, template = load_adapted(options)
    start = [_said("system", options.system, tokenizer)] if options.system else []
    messages = list(start)
    note("/reset forgets the conversation, /quit ends it")
    with answering(model, options.keep_dense):
        while (line := _ask()) not in (None, "/quit", "/exit", "/q"):
            if line == "/reset":
                messages = list(start)
                note("forgotten")
            elif line.startswith("/") and line[1:].isalpha():
                note(f"unknown command {line}; there are /reset and /quit")
            elif line:
                try:
                    asked = [*messages, _said("user", line, tokenizer)]
                    text = template.render(asked, add_generation_prompt=True)
                    if it := unsaid(Talk([m for m in asked if m["role"] != "assistant"]), text, {}):
                        raise InputError(f"{template.name} leaves out {shown(it[1])}: name another one with --template")
                    answer = _answer(model, tokenizer, tokenizer.encode(text), options)
                except InputError as error:  # of such a line, a template, a conversation that is too long
                    note(str(error))
                else:
                    messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _ask() -> str | None:
    """A line of the user's, or None at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history in input())
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        note("")
        return None
    if LOST in line:
        note(f"note: what is no {sys.stdin.encoding} text reads as {LOST} (PYTHONUTF8=1 reads and writes UTF-8)")
    return line


def _said(role: str, text: str, tokenizer: Tokenizer) -> dict[str, str]:
    """A message. InputError for one that spells a special token; in the model's own answers they are its own."""
    message = {"role": role, "content": text}
    if found := spelled(Talk([message]), tokenizer.special_tokens):
        raise InputError(f"{shown(found[1])} is a special token, which would steer the model instead of being read")
    return message


def _answer(model: CausalLM, tokenizer: Tokenizer, prompt: list[int], options: Options) -> str:
    """Write the answer to stdout token by token; Ctrl-C ends it early, and what was written counts.
    Raises InputError where the conversation leaves no room for one."""
    most = model.max_positions
    full = f"the conversation fills the model's {most or 0:,} positions; /reset forgets it"
    if most is not None and len(prompt) >= most:
        raise InputError(full)
    decode = partial(tokenizer.decode, skip_special=False)  # what the model writes, it reads again
    stream = Stream(decode, lambda text: print(visible(text), end="", flush=True))
    how = {"stop_ids": tokenizer.stop_ids, "seed": options.seed, "max_length": most, **options.sampling()}
    how["keep_dense"] = options.keep_dense
    try:
        generate(model, [prompt], on_token=stream.add, **how)
    except KeyboardInterrupt:
        note(" (stopped)")
    stream.show()
    print(flush=True)
    if len(prompt) + len(stream.ids) == most:
        note(full)
    return stream.text


class Stream:
    """Turns tokens into text as they come; a character that needs several tokens is held back until it is whole."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], None]) -> None:
        self.decode, self.write = decode, write
        self.ids: list[int] = []
        self.text = ""  # what was written
        self.before, self.shown = 0, 0  # ids: those that are decoded once more beside the new ones, those written

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.show(half=False)

    def show(self, half: bool = True) -> None:
        """Write what is new; with `half` also what is no whole character yet.
        New ids are decoded beside those written last, as a first word may lose its blank; all ids again each time would
        take as long as the answer squared."""
        text = self.decode(self.ids[self.before :])
        if half or not text.endswith(LOST):
            new = text[len(self.decode(self.ids[self.before : self.shown])) :]
            self.write(new)
            self.text += new
            self.before, self.shown = self.shown, len(self.ids)
