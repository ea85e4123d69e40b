"""Conversations to tokens, and which of them are trained.

The mask comes from rendered prefixes, by character position and never by token id: what a template adds between "the
assistant speaks now" and the end of its turn is the answer. So the end-of-turn token is trained even where the padding
token has the same id, and templates need no `{% generation %}` marks. The text is tokenised once, as a whole, so that
training sees the tokens that inference sees.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from .formats import Conversation
from .messages import trains
from .protocol import TokenizerLike
from .read import BadRow, excerpt
from .template import ChatTemplate, Unrenderable

LossOn = Literal["assistant", "all", "last"]
STRADDLE = "a token crosses the start of an answer; it is trained only if it starts inside"
INSERTED = "the template puts text before the answer that the generation prompt lacks; it is trained with the answer"
NO_END = "the template marks no end of turn; the end-of-text token was added after the last answer"
NEVER_ENDS = "an answer is followed by no end-of-turn token: the model is not taught to stop there"
UNKNOWN_STOP = (
    "the template ends answers with a text that is none of the tokenizer's stop tokens: generation will run past it"
)
SPECIAL_IN_TEXT = "a message's own text holds a special token (it is encoded as that token)"


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, for each whether the loss counts it, the text they stand for, and `file:line`."""

    ids: list[int]
    trained: list[bool]
    text: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple["Encoded", ...]:
        """The token sequences of this example: itself."""
        return (self,)

    def content(self) -> list[list[int]]:
        """All that training sees, as JSON."""
        return [self.ids, [int(trained) for trained in self.trained]]


@dataclass(frozen=True)
class _Tokens:
    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]  # characters of `text`


@dataclass(frozen=True)
class _Turn:
    """An assistant turn in the rendered text: characters [start, region)."""

    start: int
    content_end: int | None  # None where the template rewrites the content
    region: int
    whole: bool  # rendering up to this turn is a prefix of the whole text
    inserted: bool


def encode_conversation(
    conv: Conversation, tokenizer: TokenizerLike, template: ChatTemplate, *, loss_on: LossOn = "assistant"
) -> Encoded:
    """Tokens and loss mask of one conversation.

    `loss_on`: "assistant" trains every assistant turn whose weight is not 0, "last" only the one that ends the
    conversation, "all" every token but the first, whatever the weights. Raises BadRow when the template refuses the row
    or is not prefix-stable on it, when the tokenizer refuses the text, when it begins with two BOS tokens, and when
    nothing would be trained.
    """
    whole = _render(conv, template, len(conv.messages))
    turns = _turns(conv, template, whole, loss_on)
    text, notes = whole, {INSERTED for turn in turns.values() if turn.inserted}
    append = _append_at(conv, turns, whole)
    if append is not None and tokenizer.eos_id is not None:
        text = whole[:append]
        notes.add(NO_END)
    tokens = _tokens(conv, tokenizer, text)
    ids, trained = tokens.ids, [loss_on == "all" and i > 0 for i in range(len(tokens.ids))]
    if loss_on != "all":
        for turn in turns.values():
            notes |= _mark(conv, turn, tokens, tokenizer.stop_ids, trained)
    if NO_END in notes:
        ids, trained = [*ids, int(tokenizer.eos_id or 0)], [*trained, True]
    if _holds_special(conv, tokenizer):
        notes.add(SPECIAL_IN_TEXT)
    _check(conv, ids, trained, tokenizer)
    return Encoded(ids, trained, text, f"{conv.file}:{conv.line}", tuple(sorted(notes)))


def _tokens(conv: Conversation, tokenizer: TokenizerLike, text: str) -> _Tokens:
    try:
        return _Tokens(text, *tokenizer.encode_with_offsets(text))
    except InputError as error:
        raise BadRow(conv.problem("messages", str(error), "text")) from None


def encode_prompt(conv: Conversation, tokenizer: TokenizerLike, template: ChatTemplate) -> tuple[list[int], str]:
    """The tokens a model is given so that it answers, and the answer that the conversation ends with ("" if none)."""
    answered = conv.messages[-1]["role"] == "assistant"
    upto = len(conv.messages) - answered
    prompt = _render(conv, template, upto, add_generation_prompt=True)
    return tokenizer.encode(prompt), str(conv.messages[upto]["content"]) if answered else ""


def _turns(conv: Conversation, template: ChatTemplate, whole: str, loss_on: LossOn) -> dict[int, _Turn]:
    """The trained turns by their index; for "all" the last turn where it can be told, for how it ends."""
    chosen = [i for i, message in enumerate(conv.messages) if trains(message)]
    if loss_on == "assistant":
        return {i: _turn(conv, template, whole, i) for i in chosen}
    last = len(conv.messages) - 1
    if loss_on == "last":
        return {last: _turn(conv, template, whole, last)} if last in chosen else {}
    if loss_on != "all":
        raise ValueError(f'loss_on must be "assistant", "all" or "last", not {loss_on!r}')
    with suppress(BadRow):
        return {last: _turn(conv, template, whole, last)}
    return {}


def _render(conv: Conversation, template: ChatTemplate, upto: int, *, add_generation_prompt: bool = False) -> str:
    try:
        return template.render(conv.messages[:upto], add_generation_prompt=add_generation_prompt, tools=conv.tools)
    except Unrenderable as error:
        raise BadRow(conv.problem("messages", str(error), "template")) from None


def _turn(conv: Conversation, template: ChatTemplate, whole: str, i: int) -> _Turn:
    """Where turn `i` stands in the whole text; BadRow when the template does not let that be told."""
    prompt = _render(conv, template, i, add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise _unstable(conv, i, prompt, whole)
    upto = whole if i + 1 == len(conv.messages) else _render(conv, template, i + 1)
    region = _shared(upto, whole)
    content = str(conv.messages[i]["content"]).strip()
    found = whole.find(content, len(prompt), region) if region >= len(prompt) else -1
    if region < len(upto) and found < 0:
        raise _unstable(conv, i, upto, whole)
    inserted = found >= 0 and bool(whole[len(prompt) : found].strip())
    return _Turn(len(prompt), None if found < 0 else found + len(content), region, region == len(upto), inserted)


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common from their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unstable(conv: Conversation, i: int, part: str, whole: str) -> BadRow:
    at = _shared(part, whole)
    reason = (
        f"the template is not prefix-stable at message {i}: rendered alone, the conversation so far goes on with"
        f" {excerpt(part[at:])} where the whole has {excerpt(whole[at:])} (character {at}), so the place of the"
        " answer cannot be told; try loss_on last, or another template"
    )
    return BadRow(conv.problem("messages", reason, "template"))


def _append_at(conv: Conversation, turns: dict[int, _Turn], whole: str) -> int | None:
    """Where to cut the text and add an end-of-text token: after a last answer that the template leaves unended."""
    turn = turns.get(len(conv.messages) - 1)
    if turn is None or turn.content_end is None or whole[turn.content_end : turn.region].strip():
        return None
    return turn.content_end


def _mark(conv: Conversation, turn: _Turn, tokens: _Tokens, stops: Sequence[int], trained: list[bool]) -> set[str]:
    """Set `trained` for the tokens that start inside one answer, its end-of-turn token included; returns notes."""
    first = bisect_left(tokens.offsets, turn.start, key=lambda span: span[0])
    end, notes = _turn_end(conv, turn, tokens, first, stops)
    for k in range(first, len(tokens.ids)):
        if tokens.offsets[k][0] >= end:
            break
        trained[k] = True
    if first > 0 and tokens.offsets[first - 1][1] > turn.start:
        notes.add(STRADDLE)
    return notes


def _turn_end(
    conv: Conversation, turn: _Turn, tokens: _Tokens, first: int, stops: Sequence[int]
) -> tuple[int, set[str]]:
    """The character after the end-of-turn token of an answer, or where its text ends if it has none."""
    content_end = turn.start if turn.content_end is None else turn.content_end
    for token, (start, end) in zip(tokens.ids[first:], tokens.offsets[first:], strict=True):
        if end > turn.region:
            break
        if start >= content_end and token in stops:
            return end, set()
    if not turn.whole:
        reason = "the template changes what follows an answer and ends it with no stop token"
        raise BadRow(conv.problem("messages", reason, "template"))
    if len(tokens.text) <= content_end:  # cut there; an end-of-text token follows
        return len(tokens.text), set()
    answer = tokens.text[turn.start : turn.region].rstrip()
    marked = turn.content_end is None or turn.start + len(answer) > turn.content_end
    return turn.start + len(answer), {UNKNOWN_STOP if marked else NEVER_ENDS}


def _holds_special(conv: Conversation, tokenizer: TokenizerLike) -> bool:
    special = {tokenizer.decode([token], skip_special=False) for token in tokenizer.stop_ids}
    special |= {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    return any(token in str(message["content"]) for message in conv.messages for token in special if token)


def _check(conv: Conversation, ids: list[int], trained: list[bool], tokenizer: TokenizerLike) -> None:
    bos = tokenizer.bos_id
    if bos is not None and ids[:2] == [bos, bos]:
        reason = f"begins with two BOS tokens ({tokenizer.bos_token!r}): the template writes one, so the row must not"
        raise BadRow(conv.problem("text", reason, "template"))
    if not any(trained[1:]):
        raise BadRow(conv.problem("messages", "nothing to train: no token of an answer is left", "nothing to train"))
