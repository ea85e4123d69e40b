"""Held-out metrics: mean loss of a trained token, and how often the answer is exactly right."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch, Example, micro_batches
from ..data.encode import encode_prompts
from ..data.forms import Sample
from ..data.template import ChatTemplate
from ..models.finite import explain_nonfinite, first_nonfinite
from ..models.generate import generate
from ..models.protocol import CausalLM
from .losses.tokens import batch_token_scores, evaluating, on_device


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the one in the data."""

    prompt: str
    expected: str
    answer: str
    source: str

    @property
    def exact(self) -> bool:
        """Equal but for white space at line ends and at both ends of the text."""
        return _trimmed(self.answer) == _trimmed(self.expected)


def batch_loss_sum(model: CausalLM, batch: Batch) -> Tensor:
    """Sum of the losses of a batch's trained tokens, 0-d float64."""
    return -batch_token_scores(model, batch).logps.sum(dtype=torch.float64)


def nonfinite_layer(model: CausalLM, batch: Batch) -> str | None:
    """Name of the layer whose output first holds NaN or infinity on a batch; None if all are finite."""
    here = on_device(model, batch)
    return first_nonfinite(model, here.input_ids, here.position_ids, here.spans)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats a token; infinite where a float cannot hold it."""
    return math.inf if loss >= 700 else math.exp(loss)


def evaluate_loss(
    model: CausalLM,
    examples: Sequence[Example],
    *,
    packing: bool = True,
    token_budget: int = 512,
    pad_id: int = 0,
) -> float:
    """Mean loss of a trained token over all examples, in nats; its exponential is the perplexity.
    Dropout is off and no gradient is kept. NumericError, naming the layer, where the loss is no number."""
    batches = micro_batches(
        list(enumerate(examples)), packing=packing, micro_batch="auto", token_budget=token_budget, pad_id=pad_id
    )
    total = 0.0
    with evaluating(model):
        for batch in batches:
            total += (loss := batch_loss_sum(model, batch).item())
            if not math.isfinite(loss):
                what = f"losses of rows from {examples[batch.numbers[0]].source} on"
                raise explain_nonfinite(model, what, nonfinite_layer(model, batch))
    return total / sum(batch.trained for batch in batches)


def answer_all(
    model: CausalLM,
    tokenizer: Any,
    template: ChatTemplate,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[Answer]:
    """Greedy answers to the last assistant turn of every sample, in their order."""
    encoded = encode_prompts(samples, tokenizer, template)
    with evaluating(model):
        generated = generate(
            model,
            [ids for ids, _ in encoded],
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            batch_size=batch_size,
        )
    return [
        Answer(tokenizer.decode(ids, skip_special=False), expected, tokenizer.decode(new), sample.source)
        for (ids, expected), new, sample in zip(encoded, generated, samples, strict=True)
    ]


def exact_match(answers: Iterable[Answer]) -> float:
    """Share of answers that are exactly right, 0 to 1; NaN of none."""
    exact = [answer.exact for answer in answers]
    return sum(exact) / len(exact) if exact else math.nan


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
