"""Reinforcement: an adapter learns from what its own answers earn.

One base serves every role: the policy is an adapter, the reference its base or its start. A round draws answers to the
prompts of one or several steps, judges them, and trains on them once or several times. The ratio of policy and old
policy is of the trainer's own log-probabilities, before the first update on a round; what sampling rounded otherwise is
measured, and with `correction` weighed.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.encode import Dataset
from ..data.order import step_indices
from ..data.protocol import AnyTokenizer
from ..errors import InputError, NumericError, shown
from ..files import write_text
from ..lora.layer import DEFAULT, adapters_of
from ..lora.merge import merged_bytes
from ..models.cache import bucket
from ..models.decoder import Decoder
from ..models.foreign import as_causal_lm
from ..models.generate import ROWS, Sampled, dense_room, sample
from ..models.protocol import CausalLM, evaluating
from .callbacks import Options, told
from .evaluate import check_room
from .interrupt import Interrupt
from .losses import policy
from .losses.tokens import Answers, answer_scores, summed
from .metrics import Display, finite
from .planner import Case
from .reference import Referenced
from .rewards import RewardFunction, Rewards, answered, each, rated
from .rl_config import RLConfig
from .rollouts import Drawn, Rollouts, differing, restored
from .step import StepResult, Sums
from .trainer import Weights
from .value import VALUE, ValueFunction
from .watch import Watch

EXACT = {torch.float32: 1e-6, torch.float64: 1e-9}  # of log-probabilities: the same pass twice
KEPT, SHOWN = 20, 2  # validation answers of every evaluation: in a file, on the terminal
OF_TOKENS = ("old", "reference", "values", "advantages", "returns")  # what losses read of a round beside `sampled`
TRIES = 3  # rounds in a row without one reward; then the run ends


class PolicyTrainer(Referenced):
    """Trains an adapter by rewards for its answers: GRPO, RLOO, PPO and their relatives, `config.loss` says which.

    model: from `fourbit.load`, with an adapter, fresh or trained before. train, val: prompts; fields of a row beside
    them go to the rewards. rewards: from `rewards_of`, or f(prompt, answer, row) -> a number. The rest: `Trainer`.
    Dropout is off: the policy that is trained is the one that answers. An evaluation answers the validation prompts
    greedily; the best is the one of the highest reward.
    Raises InputError for rows, options or a model that cannot be trained on."""

    kind = "prompts"
    takes_loss = False
    best_metric = "reward"
    best_is = "highest"
    config: RLConfig

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnyTokenizer,
        *,
        config: RLConfig,
        rewards: Rewards | RewardFunction,
        **options: Unpack[Options],
    ) -> None:
        self.compares = config.kl > 0
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards({rewards.__name__: (1.0, each(rewards))})
        if config.failed_reward is not None:
            self.rewards = Rewards(self.rewards.given, config.failed_reward)
        self.round: Rollouts | None = None
        self.values: ValueFunction | None = None
        if config.loss == "ppo":
            self.values = ValueFunction(as_causal_lm(model), options.get("adapter", DEFAULT), config.seed)
            if options.get("optimizer") is None:
                config = replace(config, lr_scale={f"{VALUE}.*": config.value_lr / config.lr, **config.lr_scale})
            else:
                config.refuse(["value_lr"], "an optimizer of your own has its own")
        super().__init__(model, tokenizer, config=config, **options)
        self.told, self.unrewarded = set[str](), 0
        self.callbacks = (*self.callbacks, Watch(self._tell))
        for rows in self.sets:
            check_room(self.model, rows.samples, [example.parts[0].ids for example in rows.examples])

    def _tell(self, sentence: str) -> None:
        if (metrics := getattr(self, "metrics", None)) is not None and metrics.display is not None:
            metrics.display.message(sentence)

    # A round of answers.

    def step_data(self, step: int) -> tuple[list[Batch], list[str]]:
        place = step % self.config.per_round
        if self.round is None or self.round.first != step - place:
            self.round = None
            with self.apart(), self.interrupt.ending():
                self.round = self.draw(step - place)
            if self.round is None:  # the run ends here
                return [], []
            if self.unrewarded >= TRIES:
                self.round = None  # a resumed run draws it again
                self._save()
                what, times = self.rewards.failures.most_common(1)[0]
                kept = ', then resume="auto" goes on where this run ends' * bool(self.progress.saved)
                raise InputError(f"no answer of {TRIES} rounds got a reward; {times} times {what}: mend it{kept}")
        batches = self._batches(self.round, place % self.config.rollouts_ahead)
        numbers = sorted({self.round.numbers[number] for batch in batches for number in batch.numbers})
        return batches, [self.train_set.examples[i].source for i in numbers]

    def _batches(self, made: Rollouts, part: int) -> list[Batch]:
        """The answers of one of a round's steps in micro-batches: the same at every pass."""
        size, parts = self.config.group_size, self.config.rollouts_ahead
        prompts, asked = len(made.ids) // size, self.train_set.examples
        numbers = range(part * prompts // parts * size, (part + 1) * prompts // parts * size)
        both = zip(made.numbers, made.ids, strict=True)
        examples = [rated(asked[number].parts[0].ids, ids) for number, ids in both]
        return self.micro_batches(Dataset("judged", examples), numbers, self.config.micro_batch)

    def draw(self, first: int) -> Rollouts:
        """Answers to the prompts of the steps from `first` on that share a round, judged."""
        config, rows = self.config, len(self.train_set.examples)
        begun = time.perf_counter()
        start = first // config.per_round * config.rollouts_ahead
        numbers = [
            number
            for step in range(start, start + config.rollouts_ahead)
            for number in step_indices(rows, config.batch_size, step, config.seed)
        ]
        found = self._groups(numbers, config.seed + 7919 * first)
        self._exchange(found, first, start)
        made = Rollouts.of(first, found)
        self.unrewarded = self.unrewarded + 1 if bool(made.answers["failed"].all()) else 0
        made.rate = made.counts.sum().item() / (time.perf_counter() - begun)
        self._prepare(made)
        return made

    def _groups(self, numbers: Sequence[int], seed: int) -> list[Drawn]:
        """`group_size` answers to each prompt of these numbers, beside each other."""
        numbers = [number for number in numbers for _ in range(self.config.group_size)]
        return self.answers(self.train_set, numbers, seed, self.config.temperature)

    def answers(self, rows: Dataset, numbers: Sequence[int], seed: int, temperature: float) -> list[Drawn]:
        """An answer to each prompt of these numbers, drawn and judged."""
        config, prompts = self.config, [rows.examples[number].parts[0] for number in numbers]
        how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "max_length": self.model.max_positions}
        how |= {"stop_ids": self.tokenizer.stop_ids, "seed": seed, "temperature": temperature}
        with evaluating(self.model):
            made = sample(self.model, [prompt.ids for prompt in prompts], **how)
        asked = [(rows.samples[i].row, prompt.text, prompt.ids) for i, prompt in zip(numbers, prompts, strict=True)]
        said = [answered(self.tokenizer, *what, one) for what, one in zip(asked, made, strict=True)]
        earned = self.rewards(said)
        for failure in self.rewards.failures.keys() - self.told:
            self.told.add(failure)
            self._tell(f"notice: {failure}; the answer has no reward from it")
        for own, one in zip(earned, made, strict=True):
            own["reward"] -= config.truncated_penalty * (not one.ended)
            own["failed"] = float(math.isnan(own["reward"]))
        return [Drawn(*each) for each in zip(numbers, made, said, earned, strict=True)]

    def _exchange(self, found: list[Drawn], first: int, start: int) -> None:
        """Put answers to other prompts in the place of groups that all earned the same, as often as `resample` says."""
        config, rows, size = self.config, len(self.train_set.examples), self.config.group_size
        for attempt in range(config.resample):
            groups = torch.tensor([one.earned["reward"] for one in found], dtype=torch.float64).view(-1, size)
            silent, there = (~differing(groups)).nonzero().flatten().tolist(), {one.number for one in found}
            others = step_indices(rows, rows, 1 + start * config.resample + attempt, config.seed + 1)
            others = [number for number in others if number not in there][: len(silent)]
            more = self._groups(others, config.seed + 7919 * first + 104729 * (attempt + 1)) if others else []
            for new, place in enumerate(silent[: len(others)]):
                found[place * size : (place + 1) * size] = more[new * size : (new + 1) * size]

    def _prepare(self, made: Rollouts) -> None:
        """What losses need of a round before the first update on it: log-probabilities, advantages."""
        config = self.config
        if config.truncated == "mask":
            made.counts = made.counts & (made.answers["truncated"] == 0)[:, None]
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        for part in range(config.rollouts_ahead):
            for batch in self._batches(made, part):
                for name, values in self._before(batch).items():
                    table = made.tokens.setdefault(name, torch.zeros_like(made.counts, dtype=dtype))
                    table[[*batch.numbers], : values.shape[1]] = values.to("cpu", dtype)
        if config.top_entropy < 1:
            sure = policy.uncertain(made.tokens.pop("entropy"), made.counts, config.top_entropy)
            made.tokens["uncertain"] = sure.float()
        self._advantages(made)

    def _before(self, batch: Batch) -> dict[str, Tensor]:
        """What must be known of the answers of a batch before the policy moves, [P, L] each."""
        config, found = self.config, dict[str, Tensor]()
        rewarded = config.kl > 0 and config.kl_in == "reward"
        if config.per_round > 1 or rewarded or config.top_entropy < 1:
            with evaluating(self.model):
                now = self.scores(batch)
            found = {"old": now.logps[0]} | ({"entropy": now.entropy[0]} if config.top_entropy < 1 else {})
        if self.compares:
            found["reference"] = self.reference_logps(batch, config.temperature)[0]
        if self.values is not None:
            with evaluating(self.model):
                found["values"] = self.values(batch)
        return found

    def _advantages(self, made: Rollouts) -> None:
        config, tokens, counts = self.config, made.tokens, made.counts
        rewards = made.answers["reward"].clone()
        each = torch.zeros_like(counts, dtype=torch.float32)  # of an answer's tokens
        if config.kl and config.kl_in == "reward":
            gap = policy.kl_estimate(tokens["old"], tokens["reference"], config.estimator)
            each = -config.kl * torch.where(counts, gap, 0.0)
        groups = rewards.view(-1, config.group_size)
        if config.group_size > 1:
            spread = policy.deviation(groups.nan_to_num(), ~groups.isnan(), 1).expand_as(groups)
            made.answers["signal"] = differing(groups).float().repeat_interleave(config.group_size)
            made.answers["reward_std"] = spread.float().flatten()
        made.counts = counts = counts & ~rewards.isnan()[:, None]
        if self.values is None:
            groups = (rewards + each.double().sum(1)).view(-1, config.group_size)
            found = policy.advantages(groups, config.way.baseline, config.way.scale)
            tokens["advantages"] = found.flatten().float()[:, None]
        else:
            last = torch.arange(counts.shape[1], device=counts.device) == counts.sum(1, keepdim=True) - 1
            each = torch.where(last, each + rewards.nan_to_num().float()[:, None], each)
            how = {"gamma": config.gamma, "lam": config.lam}
            found, tokens["returns"] = policy.gae(each, tokens["values"], counts, **how)
            tokens["advantages"] = policy.advantages(found.masked_fill(~counts, torch.nan), "batch", "batch", 1e-8)

    def case(self) -> Case:
        """The pass that takes most: answers as long as they may be to the longest prompts; and what answering takes."""
        found, model, config = super(PolicyTrainer, self._longest()).case(), self.model, self.config
        if not isinstance(model, Decoder):
            return found
        dense = merged_bytes(model) if found.device == "cpu" else 0
        dense *= dense <= dense_room(torch.empty(0, dtype=model.dtype), "auto", config.max_new_tokens)
        drawn = config.examples_a_step * config.rollouts_ahead
        rows, spec = min(ROWS, max(drawn, len(self.val_set or ()))), model.spec
        keys = spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * bucket(max(found.sizes))
        chances = rows * model.vocab_size * (model.dtype.itemsize + 8)  # logits, and two of fp32
        return replace(found, answering=dense + 2 * keys * rows * model.dtype.itemsize + chances)

    def tokens_a_step(self) -> float:
        """At most, as answers end earlier: those of the step that `case` is about."""
        return super(PolicyTrainer, self._longest()).tokens_a_step()

    def _longest(self) -> Self:
        config, rows = self.config, self.train_set.examples
        longest = sorted((example.parts[0].ids for example in rows), key=len)[-config.batch_size :]
        prompts = [prompt for prompt in longest for _ in range(config.group_size)]
        most = config.max_new_tokens
        rooms = [min(most, (self.model.max_positions or len(p) + most) - len(p)) for p in prompts]
        words = self.model.vocab_size  # answers that differ from their first token on: what they share would run once
        answers = [Sampled([i % words] * room, [0.0] * room, False) for i, room in enumerate(rooms)]
        said = [answered(self.tokenizer, {}, "", *each) for each in zip(prompts, answers, strict=True)]
        other = copy.copy(self)
        other.config = replace(config, batch_size=len(prompts))  # all answers of a step
        other.round = made = Rollouts.of(-1, [Drawn(0, *each, {}) for each in zip(answers, said, strict=True)])
        made.tokens |= dict.fromkeys(OF_TOKENS, torch.zeros_like(made.counts, dtype=torch.float32))
        other.train_set = Dataset("judged", [one.example for one in said])
        other.total = 1
        return other

    # The loss of a pass.

    def scores(self, batch: Batch) -> Answers:
        """What the policy makes of the answers of a batch, at the temperature."""
        return answer_scores(self.model, batch, self.config.temperature, spread=self.config.entropy_bonus > 0)

    def sums(self, batch: Batch) -> Sums:
        config, made, rows = self.config, self.round, batch.numbers
        assert made is not None
        way = config.way
        self.model.eval()  # without dropout, until layers have run again for backward
        found = self.scores(batch)
        logps = found.logps[0]  # [P, L]
        here = {name: table[[*rows], : logps.shape[1]].to(logps) for name, table in made.tokens.items()}
        counts = made.counts[[*rows], : logps.shape[1]].to(logps.device)
        old = here.get("old", logps.detach())
        reference = here.get("reference")
        given = policy.Rollouts(logps, old, here["advantages"], counts, reference)
        if made.first == 0 == self.run.steps:
            self._check_start(given, "old" in here)
        losses = way.surrogate(given)
        if config.correction:
            losses = losses * policy.importance(old, here["sampled"], config.correction)
        if config.stray:
            losses = losses * ~policy.strayed(given, here["sampled"], config.stray)
        if "uncertain" in here:
            losses = losses * here["uncertain"]
        if config.entropy_bonus:
            losses = losses - config.entropy_bonus * found.entropy[0]
        metrics = self._metrics(made, rows, given, here, found.entropy[0])
        if config.kl and reference is not None:
            gap = policy.kl_estimate(logps, reference, config.estimator)
            losses = losses + config.kl * gap if config.kl_in == "loss" else losses
            metrics["kl"] = summed(policy.kl_estimate(logps, reference, "k3"), counts)
        weights, weight = policy.mean_weights(counts, way.mean, config.max_new_tokens)

        def of_values(function: ValueFunction) -> Sums:
            off = policy.value_loss(function(batch), here["values"], here["returns"], config.value_clip)
            return Sums((off * weights).sum(), {"value_loss": summed(off, counts)})

        rest = None if self.values is None else partial(of_values, self.values)
        return Sums((losses * weights).sum(), metrics, weight=weight, rest=rest)

    def _check_start(self, given: policy.Rollouts, known: bool) -> None:
        """Raise NumericError unless, before the first update, the policy is its old self, and its own reference where
        that is how it starts. Of 16 bits nothing is asked."""
        bound = EXACT.get(self.model.dtype)
        start = self.config.reference == "start" or all(
            p.is_idle() for p in adapters_of(self.model, self.adapter).values()
        )
        for name, other in (("old", given.old if known else None), ("reference", given.reference if start else None)):
            if bound and other is not None:
                off = torch.where(given.counts, given.logps.detach() - other, 0.0).abs().max().item()
                if not off <= bound * max(1.0, float(other.abs().max())):
                    raise NumericError(
                        f"before the first update log-probabilities of the policy are {off:.2g} from the {name} ones, "
                        f"and should be the same: a layer of the model computes otherwise with gradients"
                    )

    def _metrics(
        self, made: Rollouts, rows: Sequence[int], given: policy.Rollouts, here: Mapping[str, Tensor], entropy: Tensor
    ) -> dict[str, Tensor]:
        ratio = given.log_ratio().exp()
        metrics = {name: summed(values[[*rows]], ~values[[*rows]].isnan()) for name, values in made.answers.items()}
        rate = torch.tensor([made.rate], dtype=torch.float64, device="cpu")
        metrics |= {"rollout_tokens_per_second": summed(rate)} if made.rate else {}
        tokens = {"entropy": entropy, "ratio": ratio, "sampling_gap": (given.old - here["sampled"]).abs()}
        if (outside := policy.outside(self.config.way.surrogate, given)) is not None:
            tokens["clipped"] = outside
        metrics |= {name: summed(values, given.counts) for name, values in tokens.items()}
        return {name: values.to(ratio.device) for name, values in metrics.items()}

    def applied(self, result: StepResult) -> None:
        if self.config.kl_stop and "kl" in result.metrics and float(result.metrics["kl"]) > self.config.kl_stop:
            self.run.stopped = True

    def on(self, model: CausalLM) -> Self:
        other = super().on(model)
        other.values = None if self.values is None else self.values.on(model)
        return other

    def course(
        self, interrupt: Interrupt, display: Callable[[int, int], Display] | None = None
    ) -> Generator[list[Batch], None, None]:
        """As `Trainer`'s."""
        self.round = None  # of a run before this one
        return super().course(interrupt, display)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return super().trained_parameters() | ({} if self.values is None else self.values.parameters())

    # Evaluations and checkpoints.

    def evaluate(self, interrupt: Interrupt | bool = False) -> dict[str, float | None]:
        rows, found = self.validation(), list[Drawn]()
        with self.interrupt.ending():
            found = [] if interrupt else self.answers(rows, range(len(rows.examples)), 0, 0.0)
        if not found:
            return {}
        if interrupt is self.interrupt:  # a run's own evaluation
            self._show(found[:KEPT])
        means = {name: values.double().nanmean().item() for name, values in Rollouts.of(0, found).answers.items()}
        return told(self.callbacks, "on_evaluate", self.run, {name: finite(value) for name, value in means.items()})

    def _show(self, found: Sequence[Drawn]) -> None:
        """Answers with what they earned: all into a file, some on the terminal."""
        lines = list[str]()
        for said, earned in [(one.said, one.earned) for one in found]:
            known = {name: finite(value) for name, value in earned.items()}
            lines.append(json.dumps({"prompt": said.prompt, "answer": said.answer, **known}, ensure_ascii=False) + "\n")
            if len(lines) <= SHOWN:
                self._tell(f"  reward {earned['reward']:.3g}  {shown(said.prompt[-60:])} -> {shown(said.answer, 120)}")
        folder = Path(self.config.out) / "samples"
        folder.mkdir(exist_ok=True)
        write_text(folder / f"step-{self.progress.done:06d}.jsonl", "".join(lines))

    def depends(self) -> dict[str, str]:
        return super().depends() | {"rewards": ", ".join(f"{n} {w:g}" for n, (w, _) in self.rewards.given.items())}

    def state(self) -> Weights:
        own = {} if self.round is None else {f"round.{name}": value for name, value in self.round.state().items()}
        return super().state() | own

    def load_state(self, state: Weights) -> None:
        super().load_state(state)
        own = {name.removeprefix("round."): value for name, value in state.items() if name.startswith("round.")}
        self.round = restored(own) if own else None
