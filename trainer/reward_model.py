"""A reward model: a language model, its adapter, and a vector that turns an answer's last hidden state into a number.

The head lies beside the adapter as `reward_head.safetensors` with one tensor, `score.weight` [1, hidden_size]: the name
and shape that transformers' `LlamaForSequenceClassification` with one label has.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.batch import Batch, Example, micro_batches
from ..data.encode import encode
from ..data.forms import samples_of
from ..data.protocol import AnyTokenizer
from ..data.read import Rows
from ..data.sample import Sample
from ..data.template import FILE as TEMPLATE
from ..data.template import MAX_SOURCE_BYTES, TemplateChoice, template_for
from ..errors import InputError
from ..files import check_finite, float_tensors, read_text, regular_file, write_tensors, write_text
from ..lora.init import Weights
from ..lora.layer import DEFAULT
from ..lora.peft_files import load_adapter, save_adapter
from ..models.finite import explain_nonfinite
from ..models.foreign import as_causal_lm
from ..models.protocol import CausalLM, evaluating
from ..text.tokenizer_folder import as_tokenizer
from .evaluate import nonfinite_layer
from .losses.tokens import hidden_rows

HEAD, KEY = "reward_head.safetensors", "score.weight"


class RewardModel:
    """Scores answers: reward = head . hidden state at the answer's last trained token, its end of turn.
    model: from `fourbit.load`, with the adapter that was trained with the head. head: [1, hidden_size]. Rewards of one
    prompt's answers compare with each other; their zero and their scale mean nothing. template: the file of the chat
    template that it was trained with, the default of `score`. InputError for a head of another shape."""

    def __init__(self, model: CausalLM, head: Tensor, template: Path | None = None) -> None:
        wanted = (1, (model := as_causal_lm(model)).hidden_size)
        if tuple(head.shape) != wanted:
            raise InputError(f"a reward model's head must be {list(wanted)} for this model, got {list(head.shape)}")
        self.model, self.head, self.template = model, head, template

    @classmethod
    def load(
        cls, model: CausalLM, folder: str | Path, *, force: bool = False, dense: Weights | None = None
    ) -> "RewardModel":
        """Put the adapter in `folder` on the model, as `load_adapter` does (`force`, `dense`: its own), and read the
        head and find the template beside it.
        Raises InputError for a head or an adapter that is missing, broken or of another model, before the model is
        touched."""
        head = read_head(model, folder)
        template = regular_file(Path(folder), TEMPLATE) if (Path(folder) / TEMPLATE).exists() else None
        load_adapter(model, folder, force=force, dense=dense)
        return cls(model, head, template)

    def save(self, folder: str | Path, name: str = DEFAULT) -> None:
        """Write the adapter `name` and the head. NumericError for NaN or infinity, DiskError from a full disk."""
        check_finite(KEY, self.head)  # before the adapter is written
        save_adapter(self.model, folder, base_model=self.model.source, name=name)
        write_tensors(Path(folder) / HEAD, {KEY: self.head}, HEAD)
        if self.template is not None:
            write_text(Path(folder) / TEMPLATE, read_text(self.template, MAX_SOURCE_BYTES))

    def rewards(self, batch: Batch) -> Tensor:
        """The reward of each answer, [A, P] in the head's dtype, for a batch that is still on the CPU."""
        here = batch.to(self.head.device)
        assert here.last is not None  # its answers are rated
        last = hidden_rows(self.model, here, here.last.flatten())  # [A * P, D]
        rewards: Tensor = (last.to(self.head.dtype) @ self.head.T).view(here.last.shape)
        return rewards

    def score(
        self,
        tokenizer: AnyTokenizer,
        rows: Rows | Sequence[Sample],
        *,
        template: TemplateChoice = None,
        token_budget: int = 2048,
    ) -> list[float]:
        """The reward of each row's last assistant turn, in order; dropout is off and no gradient is kept.
        rows: files or objects, as a trainer's; a list of messages counts as a row. Each ends with an assistant turn.
        token_budget: tokens that are run through the model at a time. Raises InputError for a row that is none of
        these or cannot be encoded, naming its place, NumericError for rewards that are no numbers."""
        tokenizer = as_tokenizer(tokenizer)
        form = template_for(tokenizer, self.template if template is None else template)
        samples = samples_of(rows, "sft")
        made = encode(samples, tokenizer, form, loss_on="last")
        answers = [Example(parts, label=True) for _, parts in made]  # to be rated: its batch has `last`
        scores = self.rate(answers, token_budget)
        for sample, answer, reward in zip(samples, answers, scores, strict=True):
            if not math.isfinite(reward):
                layer = nonfinite_layer(self.model, *micro_batches([(0, answer)]))
                raise explain_nonfinite(self.model, f"rewards of {sample.source}", layer)
        return scores

    def rate(self, answers: Sequence[Example], token_budget: int = 2048) -> list[float]:
        """The reward of each example's answer, in order, whatever number it is."""
        scores, forks, numbered = [0.0] * len(answers), self.model.forks_up_to, [*enumerate(answers)]
        with evaluating(self.model):
            for batch in micro_batches(numbered, token_budget=token_budget, forks_up_to=forks) if answers else ():
                for place, reward in zip(batch.numbers, self.rewards(batch)[0].tolist(), strict=True):
                    scores[place] = reward
        return scores


def fresh_head(model: CausalLM) -> Tensor:
    """Zeros: all rewards are equal, the loss starts at ln 2, and there is no random start to unlearn."""
    model = as_causal_lm(model)
    return torch.zeros(1, model.hidden_size, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)


def read_head(model: CausalLM, folder: str | Path) -> Tensor:
    """The head that `folder` holds, on the model's device, in fp32 (float64 for a float64 model).
    Raises InputError for a file that is missing, no regular file of the folder, or no head of this model, and for NaN
    or infinity."""
    file = regular_file(Path(folder), HEAD, " fourbit reward writes one beside the adapter it trains.")
    tensors, like = float_tensors(file), fresh_head(model)
    if tensors.keys() != {KEY}:
        raise InputError(f"'{file}' must hold the one tensor '{KEY}', got {', '.join(sorted(tensors)[:4]) or 'none'}")
    if tensors[KEY].shape != like.shape:
        got, want = list(tensors[KEY].shape), list(like.shape)
        raise InputError(f"'{file}': the tensor '{KEY}' must be {want} for this model, got {got}: of another base")
    if not bool(torch.isfinite(tensors[KEY]).all()):
        raise InputError(f"'{file}': the tensor '{KEY}' holds NaN or infinity")
    return tensors[KEY].to(like.device, like.dtype, copy=True)
