"""What preference training and reward models can be told, on top of what every run can be."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ..data.pairs import Truncation
from ..errors import InputError
from .config import TrainingConfig, at_least, one_of, setting
from .objective import PAIR_LOSSES, SETTINGS, UNPAIRED_LOSSES, Objective, parse_losses
from .scores import check_ld_alpha

ReferenceKind = Literal["auto", "base", "start"]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TrainingConfig):
    """Options that every training on preference rows has. Raises InputError for a value that cannot work."""

    title: ClassVar[str] = "preferences"
    max_length: int = setting(1024, "tokens that a prompt and one answer may have together; see truncation")
    truncation: Truncation = setting(
        "drop",
        "a row with an answer past max_length: drop leaves it out and counts it; answer cuts the answer but keeps its "
        "end-of-turn token",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "truncation", *get_args(Truncation))


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Options of preference training. Raises InputError for a value that cannot work, naming it."""

    lr: float = setting(5e-5, "peak learning rate")
    title: ClassVar[str] = "preferences"
    loss: tuple[str, ...] = setting(
        ("sigmoid",),
        f"one of {', '.join(PAIR_LOSSES)}, or on judged answers {', '.join(UNPAIRED_LOSSES)}; NAME=WEIGHT and the flag "
        "repeated for a weighted sum, such as sigmoid=0.8 and sft=0.2",
    )
    beta: float | None = setting(None, "how strongly the policy is held to the reference; default: the loss' own")
    label_smoothing: float | None = setting(
        None, "share of labels taken to be wrong: sigmoid (cDPO), robust, exo, simpo, cpo"
    )
    gamma: float | None = setting(None, "simpo: the margin of rewards aimed at")
    tau: float | None = setting(None, "discopop: the temperature of its mixture")
    sft_weight: float | None = setting(None, "cpo: the weight of its term that fits the chosen answers")
    desirable_weight: float | None = setting(None, "kto, apo-zero-unpaired: the weight of good answers")
    undesirable_weight: float | None = setting(None, "kto, apo-zero-unpaired: the weight of bad answers")
    divergence: str | None = setting(None, "f-DPO: reverse-kl (DPO itself), forward-kl, jsd or alpha")
    divergence_alpha: float | None = setting(None, "alpha of divergence alpha, 0 to 1")
    ld_alpha: float | None = setting(
        None, "LD-DPO: what tokens past the shorter answer's length count, 0 to 1; default 1"
    )
    reference: ReferenceKind = setting(
        "auto",
        "what the policy is compared with: base (adapter off), or start (the adapter as it was at the start); auto: "
        "start on top of a trained adapter, else base, which then is the same",
    )
    reference_cache: str | None = setting(
        None,
        "a file for the reference's log-probabilities, computed once before training; made if it is not there, and "
        "refused if it was made from other data, weights or template",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "reference", *get_args(ReferenceKind))
        objective = self.objective()
        if self.ld_alpha is not None:
            check_ld_alpha(self.ld_alpha)
            if objective.unpaired:
                raise InputError(
                    f"ld_alpha compares the two answers of a pair, got {self.ld_alpha} with the loss "
                    f"{', '.join(objective.losses)}, which judges single answers: leave it out"
                )
        if not objective.needs_reference:
            for name, default in (("reference", "auto"), ("reference_cache", None)):
                if getattr(self, name) != default:
                    raise InputError(
                        f"{name} has no use with the loss {', '.join(objective.losses)}, which compares with no "
                        f"reference; got {getattr(self, name)!r}: leave it out"
                    )

    def objective(self) -> Objective:
        """The loss as a checked object."""
        given: dict[str, Any] = {name: getattr(self, name) for name in SETTINGS}
        return Objective(parse_losses(self.loss), {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PreferenceConfig):
    """Options of training a reward model. Raises InputError for a value that cannot work, naming it."""

    head_lr: float = setting(
        3e-3, "peak learning rate of the head, which starts at zero; an lr_scale of score.weight decides instead"
    )
    center: float = setting(
        0.0, "weight of the squared sum of a pair's rewards, which holds rewards around zero; 0.01 is usual"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "center")
        if not 0 < self.head_lr < float("inf"):
            raise InputError(f"head_lr must be above 0 and finite, got {self.head_lr}")
