"""Distillation: a student is trained to predict what its teacher predicts, on the tokens of chat rows.

The teacher is another model, 4-bit or of another size, or the student's own base with another adapter or none, which
then is not in memory a second time. Neither's logits ever exist as a whole.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..lora.adapter import AdapterLayer, carried, using
from ..models.protocol import CausalLM
from ..models.tokenizer import Tokenizer
from .config import DistillConfig
from .evaluate import evaluating
from .losses.divergence import token_divergence
from .losses.tokens import hidden_rows, token_scores, trained_rows, vocabulary_of
from .sft import SFTTrainer
from .step import Sums, summed


class DistillTrainer(SFTTrainer):
    """Trains a student towards a teacher: the loss is their divergence, averaged over trained tokens, in nats.

    model: the student, from `fourbit.load`, with an adapter, or dense with `config.full`. teacher: another model with
    the same tokens (see `check_same_tokens`) on the same device; a name: the student's base with its adapter of that
    name (`load_adapter(model, folder, name=..., trainable=False)`); None: the student's base alone. train, val: as
    for SFTTrainer.
    The teacher runs in evaluation mode, without gradients, and is afterwards as it was.
    Raises InputError for rows, options, a model that cannot be trained on, or a teacher that cannot teach it.
    """

    config: DistillConfig

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        *,
        teacher: CausalLM | str | None,
        train: Any,
        config: DistillConfig,
        val: Any | float | None = None,
    ) -> None:
        super().__init__(model, tokenizer, train=train, config=config, val=val)
        self.teacher: Teacher
        if isinstance(teacher, CausalLM):
            self.teacher = _Other(model, teacher)
        else:
            self.teacher = _SameBase(model, teacher, config)
        vocabulary = vocabulary_of(model.lm_head)
        if config.top_k is not None and config.top_k > vocabulary:
            raise InputError(f"top_k must be at most {vocabulary}, the vocabulary, got {config.top_k}")

    def sums(self, batch: Batch) -> Sums:
        config = self.config
        here, rows, targets = trained_rows(self.model, batch)
        theirs = self.teacher.hidden(here, rows)  # before there is a graph
        ours = hidden_rows(self.model, here, rows)
        divergence = token_divergence(
            self.model.lm_head,
            ours,
            self.teacher.head,
            theirs,
            kind=config.divergence,
            temperature=config.temperature,
            top_k=config.top_k,
            beta=0.5 if config.jsd_beta is None else config.jsd_beta,
        )
        loss = divergence.sum(dtype=torch.float64)
        if not config.sft_weight:
            return Sums(loss, {})
        scores = token_scores(self.model.lm_head, ours, targets)
        metrics = {
            "divergence": summed(divergence),
            "cross_entropy": summed(-scores.logps),
            "token_accuracy": summed(scores.correct),
            "entropy": summed(scores.entropy),
        }
        return Sums(loss - config.sft_weight * scores.logps.sum(dtype=torch.float64), metrics)

    def describe(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics  # the loss is no cross-entropy, so it has no perplexity


class Teacher:
    """A model to learn from, and how it is put in place for a forward pass."""

    def __init__(self, model: CausalLM, head: nn.Module) -> None:
        self.model, self.head = model, head

    def in_place(self) -> AbstractContextManager[Any]:
        """Inside, `model` is the teacher."""
        return nullcontext()

    def hidden(self, batch: Batch, rows: Tensor) -> Tensor:
        """Hidden states [N, E] at these flattened places of a batch on the device, without gradient or dropout."""
        with evaluating(self.model), self.in_place():
            return hidden_rows(self.model, batch, rows)


class _SameBase(Teacher):
    """The student itself, with another adapter active in place of its own, or none."""

    def __init__(self, model: CausalLM, adapter: str | None, config: DistillConfig) -> None:
        if config.full:
            raise InputError(
                "full training changes the student's base, so the base cannot be the teacher: give a model of its own"
            )
        self.names = [] if adapter is None else [adapter]
        for name in self.names:
            carried(model, name)
        super().__init__(model, frozen_head(model.lm_head, self.names))

    def in_place(self) -> AbstractContextManager[Any]:
        return using(self.model, *self.names)


class _Other(Teacher):
    """A model of its own."""

    def __init__(self, student: CausalLM, model: CausalLM) -> None:
        if model is student:
            raise InputError(
                "the teacher is the student itself: give None for its base, or the name of an adapter on it"
            )
        ours, theirs = vocabulary_of(student.lm_head), vocabulary_of(model.lm_head)
        if ours != theirs:
            raise InputError(
                f"the teacher predicts {theirs} tokens, the student {ours}: distillation compares them token by token, "
                "so both must have one vocabulary"
            )
        places = [next(m.parameters()).device for m in (student, model)]
        if places[0] != places[1]:
            raise InputError(f"the teacher is on {places[1]}, the student on {places[0]}: load both on one device")
        head = model.lm_head
        super().__init__(model, frozen_head(head, head.active if isinstance(head, AdapterLayer) else ()))


def frozen_head(head: nn.Module, names: Sequence[str]) -> nn.Module:
    """An output head with the named adapters as they are now, whatever `head` itself carries and will carry.

    It is there because a head is also run in backward, when no other adapter is in place.
    """
    return head.frozen(names) if isinstance(head, AdapterLayer) else head


def check_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise InputError unless every id stands for the same token in both tokenizers."""
    ours, theirs = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (student, teacher))
    if ours == theirs:
        return
    other = min((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), key=str)
    raise InputError(
        f"teacher and student have different tokenizers ({len(theirs)} and {len(ours)} tokens; {other!r} is "
        f"{theirs.get(other, 'missing')} in the teacher's and {ours.get(other, 'missing')} in the student's): "
        "distillation compares them token by token, so take two models of one family"
    )
