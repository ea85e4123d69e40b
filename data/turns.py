"""Where each answer of a conversation stands in the text that a template wrote, and which of its tokens are trained.

A conversation is rendered whole, and for every answer up to where it begins (the prompt that a model is given) and up
to where it ends. What the whole shares with these tells the answer's place, whatever the template is, as long as it
writes the same beginning each time. Some do not: those of reasoning models take the thoughts out of an answer once
another turn follows, and some end only the last turn. The answers that change so have no place; the last one has.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError, shown
from .messages import Messages

# Of messages that are rendered to find the answers of one conversation: as many as 600 turns take. Their number grows
# with the square of the turns, so that no faster machine would do.
MAX_RENDERED = 200_000
THOUGHT = re.compile(r"[<\[]/?(?:\w+:)?(?:think(?:ing)?|thought)[>\]]", re.IGNORECASE)  # begins or ends thoughts
LONGEST_MARK = 40

STRADDLE = "a token crosses the start of an answer; it is trained only if it starts inside"
INSERTED = "the template puts text before the answer that the generation prompt lacks; it is trained with the answer"
LACKS = "the generation prompt ends with text that the template writes before no answer: it is not trained on"
LEFT_OUT = "the template changes earlier answers once another turn follows: they are not trained, the last one is"
NO_END = "the template marks no end of turn; the end-of-text token was added after the last answer"
NEVER_ENDS = "an answer is followed by no end-of-turn token: the model is not taught to stop there"
UNKNOWN_STOP = "the template ends answers with a text that is no stop token: generation will run past it"


class Unrenderable(InputError):
    """A conversation that its template does not suit, or that breaks a rule: in which field, and what it counts as."""

    def __init__(self, reason: str, field: str = "messages", kind: str = "template") -> None:
        super().__init__(reason)
        self.field, self.kind = field, kind


class Talk(NamedTuple):
    """Messages to render: with `prompt` up to where the assistant speaks next. `turns`: whose place is wanted."""

    messages: Messages
    tools: Messages | None = None
    turns: Sequence[int] = ()
    prompt: bool = False
    variables: dict[str, Any] | None = None  # of the row's own, as `chat_template_kwargs` of transformers

    @property
    def cuts(self) -> list[tuple[int, bool]]:
        """The beginnings (messages, with generation prompt?) that tell the places; the whole alone if too many."""
        size = len(self.messages)
        after = [(i + 1, False) for i in self.turns if i + 1 < size]
        cuts = [(size, self.prompt), *((i, True) for i in self.turns), *after]
        return cuts if sum(upto for upto, _ in cuts[1:]) <= MAX_RENDERED else cuts[:1]


class Turn(NamedTuple):
    """Where a message of the assistant stands in the rendered text: characters [start, region)."""

    start: int
    content_end: int | None  # None where the template rewrites the content
    region: int
    whole: bool = True  # rendering up to this turn is a prefix of the whole text
    inserted: bool = False  # the template puts text before the content that the generation prompt lacks
    lacks: bool = False  # the generation prompt puts text before the content that the whole lacks


class Rendered(NamedTuple):
    """A text, and the places of the wanted turns, or why one cannot be told."""

    text: str
    turns: dict[int, Turn | Unrenderable]


Told = tuple[int, str]  # a text: how many characters it shares with the start of the whole, what follows these


def too_many(talk: Talk) -> Unrenderable:
    """Why no answer of a conversation is looked for."""
    return Unrenderable(
        f"has {len(talk.messages):,} messages with {len(talk.turns):,} answers to train: to find them all, the template"
        f" would have to write more than {MAX_RENDERED:,} messages; split it, or train the last answer (loss_on last)"
    )


def before_mark(whole: str, start: int, lacking: str) -> Told:
    """What the whole lacks of a prompt from the beginning of a mark of thoughts: an answer that begins with "<" too
    shares that character with the mark."""
    near = whole[:start][-LONGEST_MARK:]
    for mark in THOUGHT.finditer(near + lacking):
        if mark.start() < len(near) < mark.end():
            return start - len(near) + mark.start(), near[mark.start() :] + lacking
    return start, lacking


def place(talk: Talk, i: int, whole: str, prompt: Told, upto: Told) -> Turn | Unrenderable:
    """Where turn `i` stands in the whole text; Unrenderable when the template does not let that be told."""
    (start, lacking), (region, changed) = prompt, upto
    content, last = _content(talk, i), i + 1 == len(talk.messages)
    found = whole.find(content, start, region) if region >= start else -1
    if changed and any(name not in whole[start:region] for name in called(talk.messages[i])):
        found = -1
    fits = last and found >= 0 and not THOUGHT.sub("", lacking + whole[start:found]).strip()
    if (lacking and not fits) or (changed and found < 0):
        at, part = (start, lacking) if lacking else (region, changed)
        return Unrenderable(
            f"the template is not prefix-stable at message {i}: rendered alone, the conversation so far goes on with"
            f" {shown(part, 60)} where the whole has {shown(whole[at : at + 61], 60)} (character {at}), so the place of"
            " the answer cannot be told; name another template (template=...)"
        )
    inserted = found >= 0 and bool(whole[start:found].strip())
    return Turn(start, None if found < 0 else found + len(content), region, not changed, inserted, bool(lacking))


def with_thoughts(talk: Talk, whole: str, start: int, lacking: str) -> tuple[str, Turn] | None:
    """The text with the last answer's thoughts, where the generation prompt begins them and the template leaves them
    out: prompt, answer and end, as a model is to write it. None where that is not so."""
    content = _content(talk, len(talk.messages) - 1)
    begun, said = lacking.strip(), THOUGHT.split(content)[-1].strip()
    at = whole.find(said, start)
    if not begun or not said or not content.startswith(begun) or at < 0 or whole[start:at].strip():
        return None
    rest = content[len(begun) :]
    head = whole[:start] + lacking + (rest.lstrip() if lacking[-1].isspace() else rest)
    text = head + whole[at + len(said) :]
    return text, Turn(start + len(lacking), len(head), len(text))


def called(message: dict[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call.get("function", call)["name"]) for call in message.get("tool_calls") or ()]


def _content(talk: Talk, i: int) -> str:
    return str(talk.messages[i].get("content") or "").strip()


class Tokens(NamedTuple):
    """A text in tokens, and the characters [start, end) of each."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


def mask(tokens: Tokens, turns: Mapping[int, Turn], stops: Sequence[int]) -> tuple[list[bool], set[str]]:
    """Of each token whether it is trained, and notes. Raises Unrenderable where it cannot be told for the last turn."""
    trained, notes = [False] * len(tokens.ids), set[str]()
    for i, turn in turns.items():
        first = bisect_left(tokens.offsets, turn.start, key=lambda span: span[0])
        end, note = _turn_end(turn, tokens, first, stops)
        if note == LEFT_OUT and i == max(turns):
            raise Unrenderable(
                "the template changes what follows an answer and ends it with no stop token, so its end cannot be told;"
                " name another template (template=...)"
            )
        for k in range(first, bisect_left(tokens.offsets, end, key=lambda span: span[0])):
            trained[k] = True
        if first > 0 and tokens.offsets[first - 1][1] > turn.start and note != LEFT_OUT:
            notes.add(STRADDLE)
        notes |= {note} - {""}
        notes |= {name for name, so in ((INSERTED, turn.inserted), (LACKS, turn.lacks)) if so}
    return trained, notes


def _turn_end(turn: Turn, tokens: Tokens, first: int, stops: Sequence[int]) -> tuple[int, str]:
    """The character after the end-of-turn token of an answer, or where its text ends if it has none; and a note."""
    content_end = turn.start if turn.content_end is None else turn.content_end
    for k in range(first, len(tokens.ids)):
        start, end = tokens.offsets[k]
        if end > turn.region:
            break
        if start >= content_end and tokens.ids[k] in stops:
            return end, ""
    if not turn.whole:
        return turn.start, LEFT_OUT
    if len(tokens.text) <= content_end:  # cut there; an end-of-text token follows
        return len(tokens.text), ""
    answer = tokens.text[turn.start : turn.region].rstrip()
    marked = turn.content_end is None or turn.start + len(answer) > turn.content_end
    return turn.start + len(answer), UNKNOWN_STOP if marked else NEVER_ENDS
