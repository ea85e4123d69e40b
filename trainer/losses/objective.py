"""Which preference losses there are, what each may be told, and mixtures of them.

A setting belongs to the losses whose function takes it by name, so the tables below say no more than a function's
signature does. An objective refuses a setting that none of its losses takes: nothing is ignored in silence.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ...errors import InputError
from . import judged, pairs
from .judged import JudgedScores
from .pairs import DIVERGENCES, Compared, PairScores, Term, divergence_of, mixture


class Loss(NamedTuple):
    """function: f(scores, [point,] *, settings...). compared: what β multiplies in an answer's reward, None without.

    point: a number that the function is given besides, the same for a whole optimizer step. "kl" is made when the step
    begins, from answers set against other prompts (`judged.mismatch_kl`); "shift" is carried from step to step, the
    mean of all rewards before this one (`pairs.reward_shift`).
    """

    function: Callable[..., Tensor]
    compared: Compared | None = "ratio"
    point: Literal["kl", "shift"] | None = None

    @property
    def reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.compared == "ratio"

    @property
    def defaults(self) -> dict[str, Any]:
        """Its settings and what they are if nothing is said."""
        parameters = signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}


# TRL's "aot" and "aot_unpaired" (Melnyk et al. 2024, arXiv 2406.05882) are left out: they sort the log-ratios of the
# whole batch, so their loss depends on which pairs share a micro-batch, and packing would change the training.
PAIR_LOSSES = {
    "sigmoid": Loss(pairs.sigmoid),
    "robust": Loss(pairs.robust),
    "sigmoid-norm": Loss(pairs.sigmoid_norm),
    "ipo": Loss(pairs.ipo),
    "hinge": Loss(pairs.hinge),
    "exo": Loss(pairs.exo),
    "discopop": Loss(pairs.discopop),
    "bco": Loss(pairs.bco, point="shift"),
    "sppo-hard": Loss(pairs.sppo_hard),
    "nca": Loss(pairs.nca),
    "apo-zero": Loss(pairs.apo_zero),
    "apo-down": Loss(pairs.apo_down),
    "simpo": Loss(pairs.simpo, "mean"),
    "cpo": Loss(pairs.cpo, "sum"),
    "orpo": Loss(pairs.orpo, "mean"),
    "sft": Loss(pairs.sft, None),
}
UNPAIRED_LOSSES = {
    "kto": Loss(judged.kto, point="kl"),
    "bco-unpaired": Loss(judged.bco_unpaired, point="shift"),
    "apo-zero-unpaired": Loss(judged.apo_zero_unpaired),
}
LOSSES = PAIR_LOSSES | UNPAIRED_LOSSES

# Names elsewhere: only for the message about a name we do not know.
ELSEWHERE = {
    **dict.fromkeys(("dpo", "cdpo", "reverse-kl"), "sigmoid"),
    **dict.fromkeys(("rdpo", "robust-dpo"), "robust"),
    **dict.fromkeys(("slic", "rso"), "hinge"),
    **dict.fromkeys(("rpo", "nll"), "sft"),
    **{"bco-pair": "bco", "nca-pair": "nca", "exo-pair": "exo", "sppo": "sppo-hard", "kto-pair": "kto"},
    **{"apo": "apo-zero", "ln-dpo": "sigmoid-norm"},
}
NO_AOT = ": it sorts a whole batch, so its result would depend on how a step is split into micro-batches"


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, checked: {"sigmoid": 0.8, "sft": 0.2} with {"beta": 0.05}.

    losses: names of PAIR_LOSSES, or all of UNPAIRED_LOSSES, with weights above 0, used as they are (not normalised).
    settings: beta, label_smoothing, gamma, tau, sft_weight, desirable_weight, undesirable_weight, and f-DPO's
    divergence (a name of DIVERGENCES) with divergence_alpha. Each goes to every loss that takes it; a loss has its own
    default for what is not there. Raises InputError for what cannot work, naming the rule and the value.
    """

    losses: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self.losses)
        for key, value in self.settings.items():
            self._check_setting(key, value)

    @property
    def unpaired(self) -> bool:
        """Whether it reads JudgedScores of single judged answers instead of PairScores."""
        return next(iter(self.losses)) in UNPAIRED_LOSSES

    @property
    def needs_reference(self) -> bool:
        return any(LOSSES[name].reference for name in self.losses)

    @property
    def beta(self) -> float:
        """What rewards are scaled with: beta of the first loss that has one."""
        return next(float(s["beta"]) for s in map(self.settings_of, self.losses) if "beta" in s)

    def settings_of(self, name: str) -> dict[str, Any]:
        """Everything that the loss `name` is called with."""
        known = LOSSES[name].defaults
        given = known | {key: value for key, value in self.settings.items() if key in known}
        if isinstance(given.get("divergence"), str):
            given["divergence"] = divergence_of(given["divergence"], self.settings.get("divergence_alpha", 0.5))
        return given

    @property
    def compared(self) -> Compared:
        """What rewards are made of. As for beta, in a mixture the first loss that has them decides."""
        return next(kind for name in self.losses if (kind := LOSSES[name].compared) is not None)

    @property
    def shift_beta(self) -> float | None:
        """beta of the loss that carries the mean of all rewards from step to step (BCO); None where there is none."""
        return next((self.settings_of(n)["beta"] for n in self.losses if LOSSES[n].point == "shift"), None)

    def terms(self) -> list[Term]:
        """The losses, ready to be called by `pairs.mixture`."""
        return [
            Term(weight, partial(LOSSES[name].function, **self.settings_of(name)), LOSSES[name].point)
            for name, weight in self.losses.items()
        ]

    def __call__(self, scores: PairScores | JudgedScores, points: Mapping[str, Tensor] | None = None) -> Tensor:
        """`pairs.mixture` of these losses."""
        return mixture(self.terms(), scores, points or {})

    def _check_setting(self, key: str, value: object) -> None:
        if key == "divergence_alpha":
            if self.settings.get("divergence") != "alpha":
                raise InputError(
                    f"divergence_alpha belongs to divergence alpha; got {value!r} without it: leave it out"
                )
            _check_value(key, value, "")
            return
        takers = [name for name in self.losses if key in LOSSES[name].defaults]
        if not takers:
            raise InputError(_not_taken(key, value, self.losses))
        for name in takers:
            _check_value(key, value, name)
        others = [name for name in self.losses if LOSSES[name].reference and name not in takers]
        if key == "divergence" and value != "reverse-kl" and others:
            taking = ", ".join(name for name, loss in LOSSES.items() if key in loss.defaults)
            raise InputError(
                f"divergence {value} has no meaning for the loss {others[0]}, which is no function of the difference "
                f"of two rewards; losses that take it: {taking}"
            )


def parse_losses(entries: Sequence[str]) -> dict[str, float]:
    """`["sigmoid=0.8", "sft=0.2"]` or `["sigmoid"]` -> weights by name; a name without a weight has 1.

    Raises InputError for a weight that is no number and for a name said twice.
    """
    found: dict[str, float] = {}
    for entry in entries:
        name, equals, weight = entry.partition("=")
        if name in found:
            raise InputError(f"loss {name} is given twice; give it once, with the weight it shall have")
        try:
            found[name] = float(weight) if equals else 1.0
        except ValueError:
            raise InputError(f"loss must be NAME or NAME=WEIGHT with a number as weight, got {entry!r}") from None
    return found


def _check_names(losses: Mapping[str, float]) -> None:
    if not losses:
        raise InputError(f"loss must name at least one of {', '.join(LOSSES)}; got none")
    for name, weight in losses.items():
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r}{_near(name)}; there are {', '.join(LOSSES)}")
        if not _is_number(weight) or weight <= 0:
            raise InputError(f"the weight of loss {name} must be a number above 0, got {weight!r}")
    single = [name for name in losses if name in UNPAIRED_LOSSES]
    if single and len(single) < len(losses):
        other = next(name for name in losses if name in PAIR_LOSSES)
        raise InputError(f"loss {single[0]} is for single judged answers and {other} for pairs: choose one kind")
    if set(losses) == {"sft"}:
        raise InputError("loss sft alone is plain fine-tuning: use fourbit sft, or give a preference loss beside it")


def _near(name: str) -> str:
    plain = str(name).replace("_", "-").lower()
    if plain.startswith("aot"):
        return NO_AOT
    near = ELSEWHERE.get(plain) or next(iter(get_close_matches(plain, LOSSES, n=1)), None)
    return f"; did you mean {near}?" if near else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Rule = tuple[str, Callable[[Any], bool]]
ABOVE_0: Rule = ("a number above 0", lambda v: v > 0)
AT_LEAST_0: Rule = ("a number of at least 0", lambda v: v >= 0)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("beta", "tau", "desirable_weight", "undesirable_weight"), ABOVE_0),
    **dict.fromkeys(("gamma", "sft_weight"), AT_LEAST_0),
    "label_smoothing": ("a number from 0 up to, but not including, 0.5", lambda v: 0 <= v < 0.5),
    "divergence_alpha": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
}
SETTINGS = (*RULES, "divergence")


def _check_value(key: str, value: object, loss: str) -> None:
    if key == "divergence":
        if not isinstance(value, str) or value not in DIVERGENCES:
            near = get_close_matches(str(value).replace("_", "-"), DIVERGENCES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {value!r}{hint}")
        return
    rule, holds = RULES[key]
    if not _is_number(value) or not holds(value):
        raise InputError(f"{key} must be {rule}, got {value!r}")
    if loss == "exo" and key == "label_smoothing" and value == 0:
        raise InputError("label_smoothing of the loss exo must be above 0 (its authors use 1e-3), got 0")


def _not_taken(key: str, value: object, losses: Mapping[str, float]) -> str:
    taking = [name for name, loss in LOSSES.items() if key in loss.defaults]
    if not taking:
        near = get_close_matches(key, SETTINGS, n=1)
        return f"there is no setting {key!r} of losses{f'; did you mean {near[0]}?' if near else ''}"
    named = " and ".join(losses)
    return f"{key} is not used by the loss {named}, got {value!r}: leave it out, or choose among {', '.join(taking)}"
