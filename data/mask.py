"""Which tokens of a conversation are trained: those of its answers, each with the token that ends its turn."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .truncate import UNKNOWN_STOP
from .turns import Turn, Unrenderable

STRADDLE = "a token crosses the start of an answer; it is trained only if it starts inside"
INSERTED = "the template puts text before the answer that the generation prompt lacks; it is trained with the answer"
LACKS = "the generation prompt ends with text that the template writes before no answer: it is not trained on"
LEFT_OUT = "the template changes earlier answers once another turn follows: they are not trained, the last one is"
NO_END = "the template marks no end of turn; the end-of-text token was added after the last answer"
NEVER_ENDS = "an answer is followed by no end-of-turn token: the model is not taught to stop there"


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
                " name another template (--template)"
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
