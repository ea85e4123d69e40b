"""Log-probabilities of whole answers from a model and a batch of them, without logits of prompts or padding."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.answer_batch import AnswerBatch
from ..kernels.linear_logprobs import check_targets
from ..models.protocol import CausalLM
from .logprobs import token_scores, vocabulary_of
from .step import summed


class Answers(NamedTuple):
    """What a model makes of the A answers to each of P prompts; L is the longest answer's number of tokens."""

    logps: Tensor  # [A, P, L] fp32 or float64: log-probability of each token, zero past an answer's end
    lengths: Tensor  # [A, P] int64
    entropy: Tensor  # [A, P, L] nats, of the distribution that predicts each token; no gradient
    correct: Tensor  # [A, P, L] bool: the token was the likeliest

    @property
    def there(self) -> Tensor:
        """[A, P, L] bool: False past an answer's end."""
        return torch.arange(self.logps.shape[-1], device=self.logps.device) < self.lengths.unsqueeze(-1)

    @property
    def figures(self) -> dict[str, Tensor]:
        """Both as figures of `Sums`, over the answers' tokens: the same however they were laid out."""
        return {"entropy": summed(self.entropy, self.there), "token_accuracy": summed(self.correct, self.there)}


def answer_scores(model: CausalLM, batch: AnswerBatch) -> Answers:
    """One forward pass over a batch that is still on the CPU; the head runs on predicted tokens only.

    A token that both answers of a pair begin with is predicted once and counts in both.
    """
    check_targets(batch.targets, vocabulary_of(model.lm_head))
    device = next(model.parameters()).device
    here = batch.to(device)
    hidden = model.hidden(here.input_ids, here.position_ids, here.spans)  # [B, T, D]
    scores = token_scores(model.lm_head, hidden.flatten(0, 1).index_select(0, here.rows), here.targets)
    logps, entropy, correct = (_in_slots(figure, here.slots) for figure in scores)
    return Answers(logps, here.lengths, entropy, correct)


def _in_slots(values: Tensor, slots: Tensor) -> Tensor:
    """[R] predictions as [A, P, L]; slots of what is not there point past the end, at a zero."""
    return torch.cat([values, values.new_zeros(1)]).index_select(0, slots.flatten()).view(slots.shape)
