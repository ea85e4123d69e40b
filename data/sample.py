"""The one shape that a row of every form becomes."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import shown
from .keys import Passed
from .messages import Messages, core, trains
from .row import UNUSED, Place
from .said import lacks

Kind = Literal["sft", "pairs", "judged", "prompts"]


@dataclass(frozen=True)
class Sample:
    """A row, understood. Answers begin and end with assistant turns; each stands after the whole context.
    The context's assistant turns are not learned. Of a row to learn from as a whole (chat), the context is empty and
    the answer is all of it: there `weight` 0 keeps a turn out of the loss."""

    context: Messages
    answers: tuple[Messages, ...]  # one; of a pair the chosen and the rejected one; of a prompt none
    place: Place
    tools: Messages | None = None
    variables: dict[str, Any] | None = None  # that the template is given beside them
    label: bool | None = None  # of a judged answer: whether it is a good one
    text: str | None = None  # of plain text: all there is; "" of ready tokens
    tokens: tuple[list[int], list[bool]] | None = None  # ready ones, and for each whether it is trained
    row: dict[str, Any] = field(default_factory=dict)  # of a prompt: the row itself, to be written with its answer
    notes: tuple[str, ...] = ()
    passed: tuple[Passed, ...] = ()

    def remarks(self, words: Collection[str], written: str = "") -> set[str]:
        """What is to be said of this row, for a template whose source has these words and which wrote this text."""
        passed = (p for p in self.passed if p.key not in words or (written and lacks(written, p.texts)))
        return {*self.notes, *(UNUSED + shown(p.place) for p in passed)}

    @property
    def source(self) -> str:
        """Where the row stands, in words."""
        return str(self.place)

    @property
    def names(self) -> tuple[str, ...]:
        """Of each conversation the name of its answer, "" where no other could be meant."""
        if len(self.answers) > 1:
            return ("chosen", "rejected")
        return ("",) if self.label is None else ("completion",)

    def content(self) -> list[Any]:
        """What makes two rows the same row, as JSON."""
        learned = [[(core(message), trains(message)) for message in answer] for answer in self.answers]
        asked = list(map(core, self.context))
        return [asked, learned, self.label, self.text, self.tools, self.variables, self.tokens]

    def topic(self) -> list[Any]:
        """What rows have in common that must stay on one side of a split, as JSON: the prompt, or all there is."""
        if self.text is not None:
            return [self.text, *(self.tokens or ())]
        asked = list(map(core, self.context or self.answers[0]))
        return [asked, self.tools, *([self.variables] if self.variables else [])]
