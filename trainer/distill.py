"""Distillation: a student is trained to predict what its teacher predicts, on the tokens of chat rows.

The teacher is another model, 4-bit or of another size, or the student's own base with another adapter or none, which
then is not in memory a second time. Neither's logits ever exist as a whole.
"""

from contextlib import nullcontext
from typing import Self, Unpack

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.protocol import AnyTokenizer
from ..errors import InputError
from ..lora.active import using
from ..lora.layer import AdapterLayer, carried
from ..models.foreign import as_causal_lm
from ..models.protocol import CausalLM, evaluating
from ..text.tokenizer import Tokenizer
from .callbacks import Options
from .config import DistillConfig
from .heard import fake_model
from .losses.tokens import hidden_rows, on_device, summed, token_divergence, token_scores
from .resume import adapters_hash, base_hash
from .run import active_adapters
from .sft import SFTTrainer
from .step import Sums

Teacher = CausalLM | str | None


class DistillTrainer(SFTTrainer):
    """Trains a student towards a teacher: the loss is their divergence, averaged over trained tokens, in nats.

    model: the student, from `fourbit.load`, with an adapter, or dense with `config.full`. teacher: another model with
    the same tokens (see `check_same_tokens`) on the same device; a name: the student's base with its adapter of that
    name (`load_adapter(model, folder, name=..., trainable=False)`); None: the student's base alone. train, val: as
    for SFTTrainer.
    The teacher runs in evaluation mode, without gradients, and is afterwards as it was.
    Raises InputError for rows, options, a model that cannot be trained on, or a teacher that cannot teach it."""

    config: DistillConfig
    takes_loss = False

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnyTokenizer,
        *,
        teacher: Teacher,
        config: DistillConfig,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, tokenizer, config=config, **options)
        model, teacher = self.model, as_causal_lm(teacher)
        if isinstance(teacher, CausalLM):
            _check_other(model, teacher)
            self.teacher, self.adapters = teacher, None
        else:
            if config.full:
                raise InputError("full training changes the student's base, so it cannot be the teacher: give another")
            if teacher == self.adapter:
                raise InputError(f"the adapter '{self.adapter}' is trained, so it cannot be the teacher: give another")
            self.teacher, self.adapters = model, [] if teacher is None else [teacher]
            for name in self.adapters:
                carried(model, name)
        self.teacher_head = self._head()
        if config.top_k is not None and config.top_k > model.vocab_size:
            raise InputError(f"top_k must be at most {model.vocab_size}, the vocabulary, got {config.top_k}")

    def _head(self) -> nn.Module:
        """The teacher's, apart from the model's own: backward runs it too, when other adapters are in place."""
        head = self.teacher.lm_head
        if isinstance(head, AdapterLayer):
            head = head.frozen(head.active if self.adapters is None else dict.fromkeys(self.adapters, 1.0))
        return self.teacher.head(head)

    def on(self, model: CausalLM) -> Self:
        other = super().on(model)
        other.teacher = model if self.adapters is not None else fake_model(self.teacher, model.device.type)
        other.teacher_head = other._head()
        return other

    def depends(self) -> dict[str, str]:
        if self.adapters is None:
            base, active = base_hash(self.teacher), active_adapters(self.teacher)
        else:
            base, active = "the student's base", dict.fromkeys(self.adapters, 1.0)
        return super().depends() | {"teacher": f"{base} with {adapters_hash(self.teacher, active)}"}

    def teacher_hidden(self, here: Batch, rows: Tensor) -> Tensor:
        """Hidden states [N, E] at these flattened places of a batch on the device, without gradient or dropout."""
        switched = nullcontext() if self.adapters is None else using(self.model, *self.adapters)
        with evaluating(self.teacher), switched:
            return hidden_rows(self.teacher, here, rows)

    def sums(self, batch: Batch) -> Sums:
        config = self.config
        here = on_device(self.model, batch)
        theirs = self.teacher_hidden(here, here.rows)  # before there is a graph
        ours = hidden_rows(self.model, here, here.rows)
        beta = 0.5 if config.jsd_beta is None else config.jsd_beta
        how = config.divergence, config.temperature, config.top_k, beta
        divergence = token_divergence(self.model.head(), ours, self.teacher_head, theirs, *how)
        loss = divergence.sum(dtype=torch.float64)
        if not config.sft_weight:
            return Sums(loss, {})
        scores = token_scores(self.model.head(), ours, here.targets)
        metrics = {"divergence": summed(divergence), "cross_entropy": summed(-scores.logps)}
        metrics |= {"token_accuracy": summed(scores.correct), "entropy": summed(scores.entropy)}
        return Sums(loss - config.sft_weight * scores.logps.sum(dtype=torch.float64), metrics)

    def describe(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics  # the loss is no cross-entropy, so it has no perplexity


def _check_other(student: CausalLM, teacher: CausalLM) -> None:
    """InputError for a model of its own that cannot teach the student."""
    if next(teacher.parameters()) is next(student.parameters()):
        raise InputError("the teacher is the student itself: give None for its base, or the name of an adapter on it")
    if teacher.vocab_size != student.vocab_size:
        raise InputError(
            f"the teacher predicts {teacher.vocab_size} tokens, the student {student.vocab_size}: distillation "
            "compares them token by token, so both must have one vocabulary"
        )
    if teacher.device != student.device:
        raise InputError(f"the teacher is on {teacher.device}, the student on {student.device}: put both on one device")


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
