"""`fourbit chat`: a conversation in the terminal, the answer shown as it is written."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError, visible
from ..models.generate import generate
from ..models.protocol import CausalLM
from ..models.tokenizer import Tokenizer
from ..settings import setting
from .load import load_adapted
from .options import AdaptedModelOptions, SamplingOptions
from .parse import Sources
from .show import note


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions, AdaptedModelOptions):
    """Talk to a model. /reset forgets the conversation, /quit or Ctrl-D ends it,
    Ctrl-C stops an answer.

      fourbit chat --model M --adapter runs/first
    """

    title: ClassVar[str] = "conversation"
    system: str | None = setting(None, "a system message to begin with")


def run(options: Options, sources: Sources) -> int:
    """Load, and answer line after line."""
    model, tokenizer, template = load_adapted(options)
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    note("/reset forgets the conversation, /quit ends it")
    while (line := _ask()) not in (None, "/quit", "/exit", "/q"):
        if line == "/reset":
            messages = list(start)
            note("forgotten")
        elif line.startswith("/") and line[1:].isalpha():
            note(f"unknown command {line}; there are /reset and /quit")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                prompt = tokenizer.encode(template.render(asked, add_generation_prompt=True))
                answer = _answer(model, tokenizer, prompt, options)
            except InputError as error:  # the template refuses such a conversation
                note(str(error))
            else:
                messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _ask() -> str | None:
    """A line of the user's, or None at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history in input())
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _answer(model: CausalLM, tokenizer: Tokenizer, prompt: list[int], options: Options) -> str:
    """Write the answer to stdout token by token; Ctrl-C ends it early, and what was written counts."""
    stream = Stream(tokenizer.decode, lambda text: print(visible(text), end="", flush=True))
    how = {"stop_ids": tokenizer.stop_ids, "seed": options.seed, **options.sampling()}
    try:
        generate(model, [prompt], on_token=stream.add, **how)
    except KeyboardInterrupt:
        note(" (stopped)")
    stream.show()
    print(flush=True)
    return stream.text


class Stream:
    """Turns tokens into text as they come; a character that needs several tokens is held back until it is whole."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], None]) -> None:
        self.decode, self.write = decode, write
        self.ids: list[int] = []
        self.text = ""  # what was written

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.show(half=False)

    def show(self, half: bool = True) -> None:
        """Write what is new; with `half` also what is no whole character yet."""
        text = self.decode(self.ids)
        if half or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text[len(self.text) :])
            self.text = text
