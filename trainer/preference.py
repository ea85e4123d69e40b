"""Preference training: pairs of answers, or judged ones, in; an adapter out.

What is new beside fine-tuning is the batch (a prompt once, its answers as branches), the loss and the reference it
compares with.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from ..data.batch import Batch, Example, sent
from ..data.encode import Dataset
from ..data.protocol import AnyTokenizer
from ..models.protocol import CausalLM, evaluating
from .callbacks import Options
from .config import DPOConfig
from .losses.judged import mismatch_kl
from .losses.pairs import Scores, mixture, reward_shift, rewards_seen, scores_of
from .losses.tokens import answer_scores, summed, token_kl
from .reference import Referenced
from .step import StepResult, Sums, as_sums
from .trainer import Weights

OwnLoss = Callable[[Scores], Tensor] | None


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Metrics of `Sums` on the rewards of P pairs, [P] each; accuracy counts a tie, as before the first step, as 0."""
    margin = chosen.detach() - rejected.detach()
    each = {"chosen": chosen, "rejected": rejected, "margin": margin, "accuracy": chosen > rejected}
    return {f"reward_{name}": summed(values) for name, values in each.items()}


class DPOTrainer(Referenced):
    """Trains an adapter on preferences: DPO and its relatives, `config.loss` says which.

    model: from `fourbit.load`, with an adapter, fresh or trained before (`load_adapter`). train, val: rows of kind
    "pairs" ("judged" for a loss on single answers). loss: `Scores` -> [P], instead of what config.loss computes, which
    still says the kind of rows, whether there is a reference, and what the metrics' rewards are. The rest: `Trainer`.
    There is never a second model: the reference is the base, with no adapter active, or a frozen copy of the adapter
    as it was at the start. The copy stays on the model, under a name of its own
    ("reference", or "reference-2" and so on where that is taken), so that the trainer can evaluate after training;
    `remove_adapter` takes it off.
    Raises InputError for rows, options or a model that cannot be trained on."""

    config: DPOConfig

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnyTokenizer,
        *,
        config: DPOConfig,
        loss: OwnLoss = None,
        **options: Unpack[Options],
    ) -> None:
        self.objective = config.objective()
        self.kind, self.compares = "judged" if self.objective.unpaired else "pairs", self.objective.needs_reference
        super().__init__(model, tokenizer, config=config, loss=loss, **options)
        self.seen = torch.zeros(2, 2, dtype=torch.float64, device=self.device)  # `pairs.rewards_seen` of all steps
        self.points = {"kl": torch.zeros((), device=self.device), "shift": reward_shift(self.seen)}

    def sums(self, batch: Batch) -> Sums:
        objective = self.objective
        reference = self.reference_logps(batch) if objective.needs_reference else None  # before there is a graph
        answers = answer_scores(self.model, batch)
        labels = None if batch.labels is None else sent(batch.labels, self.device)
        scores = scores_of(answers.logps, answers.lengths, reference, labels=labels, ld_alpha=self.config.ld_alpha)
        rewards = scores.rewards(objective.compared, objective.beta)
        sides = {"chosen": scores.good, "rejected": ~scores.good}
        metrics = {f"logp_{side}": summed(scores.policy, there) for side, there in sides.items()}
        if labels is None:
            metrics |= reward_metrics(*rewards)
        else:
            metrics |= {f"reward_{side}": summed(rewards, there) for side, there in sides.items()}
        if reference is not None:
            metrics["kl"] = summed(token_kl(answers.logps, reference), answers.there)
        metrics["entropy"] = summed(answers.entropy, answers.there)
        metrics["token_accuracy"] = summed(answers.correct, answers.there)
        beta = objective.shift_beta
        carried = {} if beta is None else {"seen": rewards_seen(beta * scores.ratio, scores.good)}
        losses: Any = self.loss(scores) if self.loss else mixture(objective.terms, scores, self.points)
        return as_sums(losses, batch)._replace(metrics=metrics, carried=carried)

    def on(self, model: CausalLM) -> Self:
        other = super().on(model)
        other.points = {name: torch.zeros(point.shape, device=model.device) for name, point in self.points.items()}
        return other

    def begin(self, dataset: Dataset, batches: Sequence[Batch]) -> None:
        if "kl" in self.objective.points:
            numbers = sorted(number for batch in batches for number in batch.numbers)
            self.points["kl"] = self._mismatch(dataset, numbers)

    def applied(self, result: StepResult) -> None:
        if "seen" in result.carried:  # a step that moved nothing, perhaps for a NaN, adds nothing
            self._set_seen(self.seen + torch.where(result.skipped == 0, result.carried["seen"], 0.0))

    def _set_seen(self, seen: Tensor) -> None:
        self.seen, self.points["shift"] = seen, reward_shift(seen)

    def state(self) -> Weights:
        return super().state() | {"seen": self.seen}

    def load_state(self, state: Weights) -> None:
        super().load_state(state)
        self._set_seen(state["seen"].to(self.device))

    @torch.no_grad()
    def _mismatch(self, dataset: Dataset, numbers: Sequence[int]) -> Tensor:
        """KTO's reference point, from each prompt with the answer to another one: 0 where all prompts are the same."""
        others = [self._other_prompt(dataset, numbers, k) for k in range(len(numbers))]
        pairs, most = zip(numbers, others, strict=True), self.config.max_length
        crossed = [crossed_over(dataset.examples[i], other, most) for i, other in pairs if other is not None]
        if not crossed:
            return torch.zeros((), device=self.device)
        policy, reference = [], []
        with evaluating(self.model):
            for batch in self.micro_batches(Dataset("judged", crossed), range(len(crossed)), self.config.micro_batch):
                reference.append(self.reference_logps(batch).sum(-1).flatten())
                policy.append(answer_scores(self.model, batch).logps.sum(-1).flatten())
        return mismatch_kl(torch.cat(policy), torch.cat(reference))

    @staticmethod
    def _other_prompt(dataset: Dataset, chosen: Sequence[int], k: int) -> Example | None:
        """The next example with another prompt, after the k-th of the step and around, then in the whole data."""
        own = prompt_of(dataset.examples[chosen[k]])
        places = chain(chosen[k + 1 :], chosen[:k], range(chosen[k] + 1, len(dataset)), range(chosen[k]))
        return next((dataset.examples[i] for i in places if prompt_of(dataset.examples[i]) != own), None)


def prompt_of(example: Example) -> list[int]:
    """The tokens before the answer."""
    (answer,) = example.parts
    return answer.ids[: answer.trained.index(True)]


def crossed_over(asked: Example, answered: Example, max_length: int) -> Example:
    """The prompt of one example with the answer of another, its end cut off past max_length, or the example's length
    where that is more: one token of the answer stays."""
    prompt, other = prompt_of(asked), answered.parts[0]
    start = other.trained.index(True)
    ids, trained = prompt + other.ids[start:], [False] * len(prompt) + other.trained[start:]
    most = max(max_length, len(asked.parts[0].ids))
    answer = replace(asked.parts[0], ids=ids[:most], trained=trained[:most])
    return replace(asked, parts=(answer,))
