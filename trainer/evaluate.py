"""Held-out metrics: mean loss of a trained token, and how often the answer is right."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.batch import Batch, Example, micro_batches
from ..data.encode import Dataset, encode_questions, load_rows
from ..data.forms import samples_of
from ..data.protocol import AnyTokenizer
from ..data.read import Refused, Rows, parse
from ..data.sample import Sample
from ..data.template import TemplateChoice, template_for
from ..errors import InputError, shown
from ..models.finite import explain_nonfinite, first_nonfinite
from ..models.foreign import as_causal_lm
from ..models.generate import KeepDense, generate_each
from ..models.protocol import CausalLM, evaluating
from ..text.tokenizer_folder import as_tokenizer
from .loop import cross_entropy
from .losses.tokens import on_device

Match = Literal["exact", "json", "regex", "contains"]


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the one in the data.

    expected: the answer in the data as the template writes it, calls and special tokens included, up to the token that
    ends it. answer: all that was generated up to such a token. right: whether they match."""

    prompt: str
    expected: str
    answer: str
    source: str
    right: bool


def nonfinite_layer(model: CausalLM, batch: Batch) -> str | None:
    """Name of the layer whose output first holds NaN or infinity on a batch; None if all are finite."""
    here = on_device(model, batch)
    return first_nonfinite(model, here.input_ids, here.position_ids, here.spans)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats a token; infinite where a float cannot hold it."""
    return math.inf if loss >= 700 else math.exp(loss)


def evaluate_loss(
    model: CausalLM, rows: Rows | Dataset | Sequence[Example], tokenizer: AnyTokenizer | None = None
) -> float:
    """Mean loss of a trained token over all rows, in nats; its exponential is the perplexity.
    rows: files or objects, as a trainer's `val`, for which `tokenizer` is needed; or examples of a dataset.
    Dropout is off and no gradient is kept. NumericError, naming the layer, where the loss is no number."""
    examples: Any = rows
    model = as_causal_lm(model)
    if not (isinstance(rows, list | tuple) and rows and isinstance(rows[0], Example)):
        examples = load_rows(None, as_tokenizer(tokenizer), rows, "sft", max_length=None).examples
    batches, total = micro_batches(list(enumerate(examples)), forks_up_to=model.forks_up_to), 0.0
    with evaluating(model):
        for batch in batches:
            total += (loss := cross_entropy(model, batch).loss.item())
            if not math.isfinite(loss):
                what = f"losses of rows from {examples[min(batch.numbers)].source} on"
                raise explain_nonfinite(model, what, nonfinite_layer(model, batch))
    return total / sum(batch.trained for batch in batches)


def answer_all(
    model: CausalLM,
    tokenizer: AnyTokenizer,
    template: TemplateChoice,
    rows: Rows | Dataset | Sequence[Sample],
    *,
    match: Match = "exact",
    max_new_tokens: int = 128,
    batch_size: int = 32,
    keep_dense: KeepDense = "auto",
) -> Iterator[Answer]:
    """Greedy answers to the last assistant turn of every row (as for `evaluate_loss`), in their order, as they are
    finished. template: as `template_for` takes it; keep_dense: as `generate` does.

    Raises InputError for an answer in the data that `match` cannot compare and a prompt that leaves no room for one,
    NumericError as `generate`."""
    model, samples = as_causal_lm(model), rows.samples if isinstance(rows, Dataset) else samples_of(rows, "sft")
    tokenizer = as_tokenizer(tokenizer)
    template = template_for(tokenizer, template)
    check_comparable(samples, match)
    prompts, written = encode_questions(samples, tokenizer, template)
    check_room(model, samples, prompts)
    how: dict[str, Any] = {"max_length": model.max_positions, "stop_ids": tokenizer.stop_ids, "batch_size": batch_size}
    how["keep_dense"] = keep_dense
    new = generate_each(model, prompts, max_new_tokens=max_new_tokens, **how)
    for sample, prompt, expected, ids in zip(samples, prompts, written, new, strict=True):
        answer = tokenizer.decode(ids, skip_special=False)
        right = matches(answer, expected, _said(sample), match)
        yield Answer(tokenizer.decode(prompt, skip_special=False), expected, answer, sample.source, right)


def check_room(model: CausalLM, samples: Sequence[Sample], prompts: Sequence[Sequence[int]]) -> None:
    """InputError for the first sample whose prompt fills all positions of the model."""
    for sample, prompt in zip(samples, prompts, strict=True):
        if model.max_positions is not None and len(prompt) >= model.max_positions:
            raise InputError(
                f"{sample.source}: the prompt has {len(prompt):,} tokens, which leaves no room for an answer in the "
                f"model's {model.max_positions:,} positions: shorten it, or take the row out"
            )


def share_right(answers: Iterable[Answer]) -> float:
    """Share of answers that are right, 0 to 1; NaN of none."""
    right = [answer.right for answer in answers]
    return sum(right) / len(right) if right else math.nan


def matches(answer: str, expected: str, said: str, match: Match) -> bool:
    """Whether a generated answer is right.

    expected: the answer in the data as the template writes it; said: its own text, "" where it only calls tools. White
    space at line ends and around a text never counts.

    exact: the answer is what the template writes. json: it is the same JSON value. regex: the data's answer is a
    regular expression that is found in it. contains: the data's answer stands in it. What the template writes around
    the data's answer is the template's, and cut off before JSON and expressions are looked at."""
    answer, expected, text, pattern = _trimmed(answer), _trimmed(expected), _trimmed(said), said.strip()
    if match == "exact":
        return answer == expected
    if match == "contains":
        return (text or expected) in answer
    before, found, after = expected.partition(text)
    if found:
        answer = answer.removeprefix(before.rstrip()).removesuffix(after.lstrip()).strip()
    if match == "regex":
        return re.search(pattern, answer) is not None
    try:
        return _same(parse(answer), parse(text))
    except Refused:
        return False


def check_comparable(samples: Iterable[Sample], match: Match) -> None:
    """InputError for the first sample whose answer is no JSON, or no regular expression, where `match` needs it."""
    for sample in samples if match in ("json", "regex") else ():
        said, what = _said(sample), "JSON" if match == "json" else "regular expression"
        try:
            if not said:
                raise Refused
            parse(said) if match == "json" else re.compile(said)
        except (Refused, re.error, OverflowError, RecursionError):
            answer = f"the answer {shown(said)}" if said else "an answer of tool calls alone"
            raise InputError(f"{sample.source}: {answer} is no {what}: mend the row, or take another match") from None


def _said(sample: Sample) -> str:
    return str(sample.answers[0][-1]["content"]).strip()


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are one: 1 is 1.0 and not true, keys have no order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
