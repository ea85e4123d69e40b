"""Options of reinforcement: what a step draws, and how it learns from what that earned."""

from dataclasses import dataclass
from inspect import signature
from typing import ClassVar, Literal

from ..errors import InputError
from ..optim.schedule import Schedule
from ..settings import setting
from .config import TrainingConfig
from .losses.policy import POLICIES, Baseline, Estimator, Policy, Scale, way_of

CLIPS, OF_KL = ("clip_low", "clip_high", "clip_most"), ("kl_in", "kl_estimator", "kl_stop", "reference")
BY_GROUPS, BY_VALUES = ("baseline", "scale_rewards"), ("gamma", "lam", "value_lr", "value_clip")  # advantages


@dataclass(frozen=True, kw_only=True)
class RLConfig(TrainingConfig):
    """Options of reinforcement by rewards."""

    title: ClassVar[str] = "reinforcement"
    batch_size: int = setting(2, "prompts per optimizer step, each with group_size answers", least=1)
    lr: float = setting(5e-5, "peak learning rate", positive=True)
    schedule: Schedule = setting("constant", "learning rate after warm-up, as for fine-tuning")
    loss: str = setting("grpo", f"one of {', '.join(POLICIES)}", metavar="NAME")
    group_size: int = setting(8, "answers to each prompt of a step", least=1)
    rollouts_ahead: int = setting(1, "steps whose prompts are answered at once", least=1)
    updates: int = setting(1, "passes over the answers before new ones are made", least=1)
    max_new_tokens: int = setting(256, "tokens an answer may have", least=1)
    temperature: float = setting(1.0, "of sampling, and of the policy that is trained", positive=True)
    truncated: Literal["keep", "mask"] = setting("keep", "an answer without an end: is rewarded, or teaches nothing")
    truncated_penalty: float = setting(0.0, "what is taken off the reward of an answer without an end", least=0)
    failed_reward: float | None = setting(None, "of an answer whose reward failed; default: it teaches nothing")
    resample: int = setting(0, "times that prompts whose answers all earn the same are exchanged for others", least=0)
    clip_low: float | None = setting(None, "ratios are clipped below 1 less this; default: the loss'", positive=True)
    clip_high: float | None = setting(None, "ratios are clipped above 1 plus this; default: the loss'", positive=True)
    clip_most: float | None = setting(None, "a worse answer's ratio counts at most this; default: all of it", least=1)
    stray: float | None = setting(
        None, "worse answers that lost more nats a token than this since they were drawn teach nothing", positive=True
    )
    baseline: Baseline | None = setting(None, "mean that is taken off a reward; default: the loss' own")
    scale_rewards: Scale | None = setting(
        None, "advantages are divided by the deviation of group or batch; default likewise, if the baseline allows"
    )
    kl: float = setting(0.0, "weight of the KL to the reference; 0: no reference", least=0)
    kl_in: Literal["loss", "reward"] = setting("loss", "where the KL counts")
    kl_estimator: Estimator | None = setting(None, "of the KL: default k3 in the loss, k1 in the reward")
    kl_stop: float | None = setting(None, "the run ends when the KL of a token is above this", positive=True)
    reference: Literal["auto", "base", "start"] = setting("auto", "what the KL compares with, as for preferences")
    entropy_bonus: float = setting(0.0, "weight of the mean entropy of a token, which is to stay high", least=0)
    top_entropy: float = setting(1.0, "share of the tokens that are trained: the least certain", positive=True, most=1)
    correction: float | None = setting(
        None, "weights for what sampling and training round otherwise, cut off at this; default: none", least=1
    )
    gamma: float = setting(1.0, "ppo: the discount of later tokens' rewards", positive=True, most=1)
    lam: float = setting(0.95, "ppo: lambda of the generalised advantages", least=0, most=1)
    value_lr: float = setting(1e-4, "ppo: the peak learning rate of the value function", positive=True)
    value_clip: float = setting(0.2, "ppo: values move at most this in a step, for the loss", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in POLICIES:
            raise InputError(f"loss must be one of {', '.join(POLICIES)}, got {self.loss!r}")
        taken, ppo = signature(POLICIES[self.loss].surrogate).parameters, self.loss == "ppo"
        whole = "level" in taken and taken["level"].default != "token"
        useless = {
            f"the loss {self.loss} has one ratio an answer, and with it all its tokens": ["top_entropy"] * whole,
            f"the loss {self.loss} takes none": [name for name in CLIPS if name not in taken],
            "they make advantages of rewards, and ppo's come from values": BY_GROUPS if ppo else (),
            f"the loss {self.loss} has no value function": () if ppo else BY_VALUES,
            "kl is 0": () if self.kl else OF_KL,
        }
        for why, names in useless.items():
            self.refuse(names, why)
        try:
            baseline = self.way.baseline
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.group_size < 2 and (self.resample or baseline in ("group", "leave-one-out")):
            what = "resample" if self.resample else f"a baseline of {baseline}"
            raise InputError(
                f"{what} compares the answers to a prompt, got group_size {self.group_size}: give 2 or more, or a "
                "baseline of batch or none without resample"
            )
        if (self.kl_in, self.kl_estimator) == ("loss", "k1"):
            raise InputError("kl_estimator k1 in the loss has the mean gradient 0: take k2 or k3, or kl_in reward")
        if 0 < (over := (steps := self.steps or 0) % self.per_round) < self.rollouts_ahead:
            raise InputError(
                f"steps {steps} ends before each answer of the last round is trained once, which takes "
                f"{self.rollouts_ahead} steps (rollouts_ahead): give {steps - over + self.rollouts_ahead}"
            )

    @property
    def way(self) -> Policy:
        """The loss, with what is said of it here."""
        clips = {name: getattr(self, name) for name in CLIPS}
        return way_of(self.loss, self.baseline, self.scale_rewards, **clips)

    @property
    def examples_a_step(self) -> int:
        """Answers that a step learns from."""
        return self.batch_size * self.group_size

    @property
    def estimator(self) -> Estimator:
        """Of the KL, as asked or by where it counts."""
        return self.kl_estimator or ("k3" if self.kl_in == "loss" else "k1")

    @property
    def per_round(self) -> int:
        """Optimizer steps on the answers that are made at once."""
        return self.rollouts_ahead * self.updates

    def epoch_steps(self, rows: int) -> int:
        return super().epoch_steps(rows) * self.updates

    def total_steps(self, rows: int) -> int:
        """In whole rounds: an answer that is made is trained."""
        return self.steps or -(-self.epochs * self.epoch_steps(rows) // self.per_round) * self.per_round
