"""Answers cut to a length: what is too long for training is left out, or loses its tail and keeps its end of turn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from .batch import Encoded
from .row import BadRow, bad
from .sample import Sample
from .turns import UNKNOWN_STOP

Truncation = Literal["drop", "answer"]
LOST = "lost to truncation"


class Dropped(BadRow):
    """A row that is in order but was asked to be left out (too long): counted, and no error."""


def fit(
    sample: Sample, parts: Sequence[Encoded], max_length: int, truncation: Truncation, stops: Sequence[int]
) -> tuple[Encoded, ...]:
    """The token sequences of a sample, none longer than `max_length`.
    A tail goes where no trained token stands in it. Where one does, a row to learn from is bad (an answer cut short
    teaches a model not to stop), and so is a prompt; of preferences the row is left out, or with `truncation="answer"`
    the answer loses its tail and keeps its end of turn. Raises BadRow, and Dropped for what is left out."""
    named = zip(sample.names, parts, strict=True)
    fitted = tuple(_fit(sample, name, part, max_length, truncation, stops) for name, part in named)
    if len(fitted) > 1 and fitted[0].ids == fitted[1].ids:
        reason = f"cut to max_length {max_length}, chosen and rejected are the same"
        raise Dropped(sample.place, "length", reason, LOST)
    return fitted


def _fit(
    sample: Sample, name: str, part: Encoded, max_length: int, truncation: Truncation, stops: Sequence[int]
) -> Encoded:
    length = len(part.ids)
    if length <= max_length:
        return part
    if any(part.trained) and not any(part.trained[max_length:]):
        return replace(part, ids=part.ids[:max_length], trained=part.trained[:max_length])
    if not sample.context or not sample.answers:
        what = "the end of an answer" if sample.answers else "the end"
        reason = f"{length} tokens, and max_length {max_length} cuts off {what}: raise it or skip such rows"
        raise bad(sample, "length", reason, "too long")
    if truncation == "drop":
        reason = f"the {name} answer has {length} tokens with its prompt, more than max_length {max_length}"
        raise Dropped(sample.place, "length", reason, "too long")
    if UNKNOWN_STOP in part.notes:
        reason = f"the {name} answer has {length} tokens and ends with no stop token, which cutting it could keep"
        raise Dropped(sample.place, "length", reason, LOST)
    shorter = shorten(part, max_length, stops)
    if shorter is None:
        reason = f"max_length {max_length} leaves nothing of the {name} answer ({length} tokens with its prompt)"
        raise Dropped(sample.place, "length", reason, LOST)
    return shorter


def shorten(answer: Encoded, max_length: int, stops: Sequence[int]) -> Encoded | None:
    """An answer cut to at most `max_length` tokens that still ends as a turn ends; None if nothing of it is left.
    Its last turn loses its tail but not its end (the stop tokens it closes with). Where the cut falls before that turn,
    an earlier turn of the answer becomes the last one, whole, or cut in the same way."""
    last = max(i for i, trained in enumerate(answer.trained) if trained)
    first_end = last + 1
    while answer.trained[first_end - 1] and answer.ids[first_end - 1] in stops:
        first_end -= 1
    end = answer.ids[first_end : last + 1]
    keep = max_length - len(end)  # tokens before the end
    while keep > 0 and not answer.trained[keep - 1]:
        keep -= 1  # the cut falls between two turns, or into the prompt
    if keep <= 0:
        return None
    if answer.ids[keep - 1] not in stops:
        return replace(answer, ids=answer.ids[:keep] + end, trained=answer.trained[:keep] + [True] * len(end))
    return replace(answer, ids=answer.ids[:keep], trained=answer.trained[:keep])
