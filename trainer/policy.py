"""Reinforcement: an adapter learns from what its own answers earn.

One base serves every role: the policy is an adapter, the reference its base or its start. A round draws answers to the
prompts of one or several steps, judges them, and trains on them once or several times. The ratio of policy and old
policy is of the trainer's own log-probabilities, before the first update on a round; what sampling rounded otherwise is
measured, and with `correction` weighed.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.encode import Dataset
from ..data.order import step_indices
from ..data.protocol import AnyTokenizer
from ..errors import InputError, NumericError, shown
from ..lora.layer import DEFAULT, adapters_of
from ..models.foreign import as_causal_lm
from ..models.generate import Sampled, sample
from ..models.protocol import CausalLM, evaluating
from .callbacks import Options, told
from .config import RLConfig
from .evaluate import check_room
from .interrupt import Interrupt
from .losses import policy
from .losses.policy import POLICIES
from .losses.tokens import Answers, answer_scores, summed
from .metrics import finite
from .planner import Case
from .reference import Referenced
from .rewards import Answered, Rewards
from .rollouts import Rollouts, drawn, exchanged, restored
from .step import StepResult, Sums
from .trainer import Weights
from .value import VALUE, ValueFunction
from .watch import Watch

EXACT = {torch.float32: 1e-6, torch.float64: 1e-9}  # of log-probabilities: the same pass twice
SHOWN = 2  # validation answers at every evaluation
TRIES = 3  # rounds in a row without one reward; then the run ends


class PolicyTrainer(Referenced):
    """Trains an adapter by rewards for its answers: GRPO, RLOO, PPO and their relatives, `config.loss` says which.

    model: from `fourbit.load`, with an adapter, fresh or trained before. train, val: prompts; fields of a row beside
    them go to the rewards. rewards: a `Rewards`. The rest: `Trainer`. Dropout is off: the policy that is trained is the
    one that answers. An evaluation answers the validation prompts greedily; the best is the one of the highest reward.
    Raises InputError for rows, options or a model that cannot be trained on."""

    kind = "prompts"
    best_metric = "reward"
    best_is = "highest"
    config: RLConfig

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnyTokenizer,
        *,
        config: RLConfig,
        rewards: Rewards,
        **options: Unpack[Options],
    ) -> None:
        self.compares = config.kl > 0
        self.rewards = rewards if config.failed_reward is None else Rewards(rewards.given, config.failed_reward)
        self.round: Rollouts | None = None
        self.values: ValueFunction | None = None
        if config.loss == "ppo":
            self.values = ValueFunction(as_causal_lm(model), options.get("adapter", DEFAULT), config.seed)
            if options.get("optimizer") is None:
                config = replace(config, lr_scale={f"{VALUE}.*": config.value_lr / config.lr, **config.lr_scale})
        super().__init__(model, tokenizer, config=config, **options)
        self.steps_per_epoch *= config.updates
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
            self.round = self.draw(step - place)
        batches = self._batches(self.round, place % self.config.rollouts_ahead)
        numbers = sorted({self.round.numbers[number] for batch in batches for number in batch.numbers})
        return batches, [self.train_set.examples[i].source for i in numbers]

    def _batches(self, made: Rollouts, part: int) -> list[Batch]:
        """The answers of one of a round's steps in micro-batches: the same at every pass."""
        size, parts = self.config.group_size, self.config.rollouts_ahead
        prompts = len(made.examples) // size
        numbers = range(part * prompts // parts * size, (part + 1) * prompts // parts * size)
        return self.micro_batches(Dataset("judged", made.examples), numbers, self.config.micro_batch)

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
        made = self._answered(first, numbers, config.seed + 7919 * first)
        made = self._with_signal(made, start)
        self.unrewarded = self.unrewarded + 1 if bool(made.answers["failed"].all()) else 0
        if self.unrewarded >= TRIES:
            what, times = self.rewards.failures.most_common(1)[0]
            raise InputError(f"no answer of {TRIES} rounds got a reward; {times} times {what}: mend it")
        made.rate = made.counts.sum().item() / (time.perf_counter() - begun)
        self._prepare(made)
        return made

    def _answered(self, first: int, numbers: Sequence[int], seed: int) -> Rollouts:
        """Drawn and judged answers to the prompts of these numbers."""
        config = self.config
        numbers = [number for number in numbers for _ in range(config.group_size)]
        prompts = [self.train_set.examples[number].parts[0].ids for number in numbers]
        with evaluating(self.model):
            found = sample(self.model, prompts, seed=seed, temperature=config.temperature, **self._limits())
        made = drawn(first, numbers, prompts, found)
        self._judge(made)
        return made

    def _limits(self) -> dict[str, Any]:
        how = {"max_new_tokens": self.config.max_new_tokens, "max_length": self.model.max_positions}
        return how | {"stop_ids": self.tokenizer.stop_ids}

    def _judge(self, made: Rollouts) -> None:
        judged = self.rewards(self._texts(self.train_set, made.numbers, made.examples))
        for failure in self.rewards.failures.keys() - self.told:
            self.told.add(failure)
            self._tell(f"notice: {failure}; the answer has no reward from it")
        total = torch.tensor(judged.total, dtype=torch.float64)
        total -= self.config.truncated_penalty * made.answers["truncated"].double()
        made.answers["reward"] = total
        for name, values in judged.by_source.items():
            made.answers[f"reward/{name}"] = torch.tensor(values, dtype=torch.float64)
        made.answers["failed"] = total.isnan().float()

    def _texts(self, rows: Dataset, numbers: Sequence[int], examples: Sequence[Any]) -> list[Answered]:
        stops, made = set(self.tokenizer.stop_ids), list[Answered]()
        for number, example in zip(numbers, examples, strict=True):
            prompt, sample = rows.examples[number].parts[0], rows.samples[number]
            ids = example.parts[0].ids[len(prompt.ids) :]
            text = self.tokenizer.decode(ids[: len(ids) - (ids[-1] in stops)], skip_special=False)
            made.append(Answered(prompt.text, text, sample.row, example))
        return made

    def _with_signal(self, made: Rollouts, start: int) -> Rollouts:
        """Exchange prompts whose answers all earned the same for others, as often as `resample` allows."""
        config = self.config
        for attempt in range(config.resample):
            groups = made.answers["reward"].view(-1, config.group_size)
            silent = (~differing(groups)).nonzero().flatten().tolist()
            if not silent:
                break
            rows = len(self.train_set.examples)
            others = step_indices(rows, rows, 1 + start * config.resample + attempt, config.seed + 1)
            others = [number for number in others if number not in made.numbers][: len(silent)]
            if not others:
                break
            more = self._answered(made.first, others, config.seed + 7919 * made.first + 104729 * (attempt + 1))
            made = exchanged(made, silent[: len(others)], more, config.group_size)
        return made

    def _prepare(self, made: Rollouts) -> None:
        """What losses need of a round before the first update on it: log-probabilities, advantages."""
        config = self.config
        if config.truncated == "mask":
            made.counts = made.counts & (made.answers["truncated"] == 0)[:, None]
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        made.tokens |= {name: torch.zeros(made.counts.shape, dtype=dtype) for name in self._tables()}
        for part in range(config.rollouts_ahead):
            for batch in self._batches(made, part):
                for name, values in self._before(batch, made.tokens).items():
                    made.tokens[name][[*batch.numbers], : values.shape[1]] = values.to("cpu", dtype)
        if "uncertain" in made.tokens:
            made.tokens["uncertain"] = policy.uncertain(
                made.tokens["uncertain"], made.counts, config.top_entropy
            ).float()
        self._advantages(made)

    def _tables(self) -> list[str]:
        """What must be known of each token before the first update on a round."""
        config = self.config
        rewarded = config.kl > 0 and config.kl_in == "reward"
        asked = {
            "old": config.per_round > 1 or rewarded or config.top_entropy < 1,
            "uncertain": config.top_entropy < 1,
            "reference": self.compares,
            "values": self.values is not None,
        }
        return [name for name, wanted in asked.items() if wanted]

    def _before(self, batch: Batch, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is wanted of the answers of a batch before the policy moves, [P, L] each."""
        found = dict[str, Tensor]()
        if "old" in wanted:
            with evaluating(self.model):
                now = self.scores(batch)
            found = {name: x[0] for name, x in {"old": now.logps, "uncertain": now.entropy}.items() if name in wanted}
        if "reference" in wanted:
            found["reference"] = self.reference_logps(batch, self.config.temperature)[0]
        if self.values is not None:
            with evaluating(self.model):
                found["values"] = self.values(batch)
        return found

    def _advantages(self, made: Rollouts) -> None:
        config, tokens, counts = self.config, made.tokens, made.counts
        rewards, each = made.answers["reward"].clone(), torch.zeros(counts.shape)  # of an answer, of its tokens
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
            way, groups = POLICIES[config.loss], (rewards + each.double().sum(1)).view(-1, config.group_size)
            found = policy.advantages(groups, config.baseline or way.baseline, config.scale_rewards or way.scale)
            tokens["advantages"] = found.flatten().float()[:, None]
        else:
            last = torch.arange(counts.shape[1]) == counts.sum(1, keepdim=True) - 1
            each = torch.where(last, each + rewards.nan_to_num().float()[:, None], each)
            how = {"gamma": config.gamma, "lam": config.lam}
            found, tokens["returns"] = policy.gae(each, tokens["values"], counts, **how)
            tokens["advantages"] = policy.whitened(found, counts)

    def case(self) -> Case:
        """The pass that takes most: answers as long as they may be to the longest prompts."""
        config, rows = self.config, self.train_set.examples
        longest = sorted((example.parts[0].ids for example in rows), key=len)[-config.batch_size :]
        prompts = [prompt for prompt in longest for _ in range(config.group_size)]
        most = config.max_new_tokens
        rooms = [min(most, (self.model.max_positions or len(p) + most) - len(p)) for p in prompts]
        words = self.model.vocab_size  # answers that differ from their first token on: what they share would run once
        answers = [Sampled([i % words] * room, [0.0] * room, False) for i, room in enumerate(rooms)]
        other = copy.copy(self)
        other.config = replace(config, batch_size=len(prompts))  # all answers of a step
        other.round = made = drawn(-1, [0] * len(prompts), prompts, answers)
        names = [*self._tables(), "advantages", "returns"]
        made.tokens |= dict.fromkeys(names, torch.zeros(made.counts.shape))
        other.train_set = Dataset("judged", made.examples)
        return super(PolicyTrainer, other).case()

    # The loss of a pass.

    def scores(self, batch: Batch) -> Answers:
        """What the policy makes of the answers of a batch, at the temperature."""
        return answer_scores(self.model, batch, self.config.temperature, spread=self.config.entropy_bonus > 0)

    def sums(self, batch: Batch) -> Sums:
        config, made, rows = self.config, self.round, batch.numbers
        assert made is not None
        self.model.eval()  # without dropout, until layers have run again for backward
        found = self.scores(batch)
        values = None if self.values is None else self.values(batch)
        logps = found.logps[0]  # [P, L]
        here = {name: made.at(name, rows, logps.shape[1]).to(logps) for name in made.tokens}
        counts = made.counts[[*rows], : logps.shape[1]].to(logps.device)
        old = here.get("old", logps.detach())
        reference = here.get("reference")
        given = policy.Rollouts(logps, old, here["advantages"], counts, reference)
        if made.first == 0 == self.run.steps:
            self._check_start(given, "old" in here)
        losses = POLICIES[config.loss].surrogate(given, **self._clips())
        if config.correction:
            losses = losses * policy.importance(old, here["sampled"], config.correction)
        if "uncertain" in here:
            losses = losses * here["uncertain"]
        if config.entropy_bonus:
            losses = losses - config.entropy_bonus * found.entropy[0]
        metrics = self._metrics(made, rows, given, here, found.entropy[0])
        if config.kl and reference is not None:
            gap = policy.kl_estimate(logps, reference, config.estimator)
            losses = losses + config.kl * gap if config.kl_in == "loss" else losses
            metrics["kl"] = summed(policy.kl_estimate(logps, reference, "k3"), counts)
        if values is not None:
            off = policy.value_loss(values, here["values"], here["returns"], config.value_clip)
            metrics["value_loss"] = summed(off, counts)
            losses = losses + off
        weights, weight = policy.mean_weights(counts, POLICIES[config.loss].mean, config.max_new_tokens)
        return Sums((losses * weights).sum(), metrics, weight=weight)

    def _clips(self) -> dict[str, float]:
        given = {name: getattr(self.config, name) for name in ("clip_low", "clip_high")}
        return {name: value for name, value in given.items() if value is not None}

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
        metrics |= {"rollout_tokens_per_second": summed(torch.tensor([made.rate]))} if made.rate else {}
        metrics["entropy"] = summed(entropy, given.counts)
        metrics["ratio"] = summed(ratio, given.counts)
        if (outside := policy.outside(POLICIES[self.config.loss].surrogate, given, self._clips())) is not None:
            metrics["clipped"] = summed(outside, given.counts)
        metrics["sampling_gap"] = summed((given.old - here["sampled"]).abs(), given.counts)
        return {name: values.to(ratio.device) for name, values in metrics.items()}

    def applied(self, result: StepResult) -> None:
        if self.config.kl_stop and "kl" in result.metrics and float(result.metrics["kl"]) > self.config.kl_stop:
            self.run.stopped = True

    def on(self, model: CausalLM) -> Self:
        other = super().on(model)
        other.values = None if self.values is None else self.values.on(model)
        return other

    def course(self, *args: Any, **how: Any) -> Any:
        self.round = None  # of a run before this one
        return super().course(*args, **how)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return super().trained_parameters() | ({} if self.values is None else self.values.parameters())

    # Evaluations and checkpoints.

    def evaluate(self, interrupt: Interrupt | bool = False) -> dict[str, float | None]:
        prompts = [example.parts[0].ids for example in self.validation().examples]
        with evaluating(self.model):
            made = sample(self.model, prompts, seed=0, temperature=0.0, **self._limits())
        if interrupt:
            return {}
        numbers = range(len(prompts))
        answers = drawn(0, numbers, prompts, made)
        texts = self._texts(self.validation(), numbers, answers.examples)
        judged = self.rewards(texts)
        for one, reward in list(zip(texts, judged.total, strict=True))[:SHOWN]:
            self._tell(f"  reward {reward:.3g}  {shown(one.prompt[-60:])} -> {shown(one.answer, 120)}")
        late = self.config.truncated_penalty * answers.answers["truncated"].double()
        columns = {"reward": torch.tensor(judged.total, dtype=torch.float64) - late} | {
            f"reward/{name}": v for name, v in judged.by_source.items()
        }
        found = {
            name: torch.as_tensor(values, dtype=torch.float64).nanmean().item() for name, values in columns.items()
        }
        found |= {name: values.mean().item() for name, values in answers.answers.items()}
        return told(self.callbacks, "on_evaluate", self.run, {name: finite(value) for name, value in found.items()})

    def depends(self) -> dict[str, str]:
        return super().depends() | {"rewards": ", ".join(f"{n} {w:g}" for n, (w, _) in self.rewards.given.items())}

    def state(self) -> Weights:
        own = {} if self.round is None else {f"round.{name}": value for name, value in self.round.state().items()}
        return super().state() | own

    def load_state(self, state: Weights) -> None:
        super().load_state(state)
        own = {name.removeprefix("round."): value for name, value in state.items() if name.startswith("round.")}
        self.round = restored(own) if own else None


def differing(rewards: Tensor) -> Tensor:
    """[P] bool: whether the rewards that are known of a group [P, G] differ."""
    return rewards.nan_to_num(nan=-torch.inf).amax(1) > rewards.nan_to_num(nan=torch.inf).amin(1)
