"""Which preference losses there are, what each may be told, and mixtures of them.

A setting belongs to the losses whose function takes it by name, so the tables below say no more than a function's
signature does. An objective refuses a setting that none of its losses takes: nothing is ignored in silence.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ...errors import InputError
from . import judged, pairs
from .pairs import DIVERGENCES, Compared, Term, divergence_of


class Loss(NamedTuple):
    """function: f(scores, [point,] *, settings...). compared: what β multiplies in an answer's reward, None without.
    point: a number that the function is given besides, the same for a whole optimizer step. "kl" is made when the step
    begins, from answers set against other prompts (`judged.mismatch_kl`); "shift" is carried from step to step, the
    mean of all rewards before this one (`pairs.reward_shift`)."""

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
    "cpo": Loss(pairs.cpo, "policy"),
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Rule = tuple[str, Callable[[Any], bool]]
ABOVE_0: Rule = ("a number above 0", lambda v: v > 0)
AT_LEAST_0: Rule = ("a number of at least 0", lambda v: v >= 0)
RULES: dict[str, Rule] = {  # every setting there is
    **dict.fromkeys(("beta", "tau", "desirable_weight", "undesirable_weight"), ABOVE_0),
    **dict.fromkeys(("gamma", "sft_weight"), AT_LEAST_0),
    "label_smoothing": ("a number from 0 up to, but not including, 0.5", lambda v: 0 <= v < 0.5),
    "divergence": (f"one of {', '.join(DIVERGENCES)}", lambda v: isinstance(v, str) and v in DIVERGENCES),
    "divergence_alpha": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "ld_alpha": ("a number from 0 to 1 (1 discounts nothing)", lambda v: 0 <= v <= 1),
}


class Objective:
    """A weighted sum of losses, checked: {"sigmoid": 0.8, "sft": 0.2} with {"beta": 0.05}.

    losses: names of PAIR_LOSSES, or all of UNPAIRED_LOSSES, with weights above 0, used as they are (not normalised).
    settings: those of RULES. Each goes to every loss that takes it; a loss has its own default for what is not there.
    ld_alpha is for `pairs.scores_of`. Raises InputError for what cannot work, naming the rule and the value.
    """

    def __init__(self, losses: Mapping[str, float], settings: Mapping[str, Any] | None = None) -> None:
        self.losses, self.settings = losses, dict(settings or {})
        _check_names(losses)
        self.unpaired = next(iter(losses)) in UNPAIRED_LOSSES  # it is about judged answers, one by one
        for key, value in self.settings.items():
            self._check_setting(key, value)
        both = [(LOSSES[name], self.settings_of(name)) for name in losses]
        self.points = {loss.point for loss, _ in both}
        self.needs_reference = any(loss.reference for loss, _ in both)
        # What rewards are made of, and scaled with: in a mixture the first loss that has them decides.
        self.compared = next(loss.compared for loss, _ in both if loss.compared is not None)
        self.beta = next(float(own["beta"]) for _, own in both if "beta" in own)
        # beta of the loss that carries the mean of all rewards from step to step (BCO), if there is one
        self.shift_beta: float | None = next((own["beta"] for loss, own in both if loss.point == "shift"), None)
        weighed = zip(losses.values(), both, strict=True)
        self.terms: list[Term] = [(w, partial(loss.function, **own), loss.point) for w, (loss, own) in weighed]

    def settings_of(self, name: str) -> dict[str, Any]:
        """Everything that the loss `name` is called with."""
        own = {key: self.settings.get(key, default) for key, default in LOSSES[name].defaults.items()}
        if isinstance(own.get("divergence"), str):
            own["divergence"] = divergence_of(own["divergence"], self.settings.get("divergence_alpha", 0.5))
        return own

    def _check_setting(self, key: str, value: object) -> None:
        losses, takers = ", ".join(self.losses), [name for name in self.losses if key in LOSSES[name].defaults]
        taking = [name for name, loss in LOSSES.items() if key in loss.defaults]
        if key not in RULES:
            raise InputError(f"there is no setting {key!r} of losses{_near(key, RULES)}")
        if key == "divergence_alpha" and self.settings.get("divergence") != "alpha":
            raise InputError(f"divergence_alpha belongs to divergence alpha; got {value!r} without it: leave it out")
        if key == "ld_alpha" and self.unpaired:
            raise InputError(
                f"ld_alpha compares the two answers of a pair, got {value} with the loss {losses}, which judges single "
                "answers: leave it out"
            )
        if taking and not takers:
            raise InputError(
                f"{key} is not used by the loss {' and '.join(self.losses)}, got {value!r}: leave it out, or choose "
                f"among {', '.join(taking)}"
            )
        rule, holds = RULES[key]
        if (key != "divergence" and not _is_number(value)) or not holds(value):
            raise InputError(f"{key} must be {rule}, got {value!r}{_near(value, DIVERGENCES)}")
        if "exo" in takers and key == "label_smoothing" and value == 0:
            raise InputError("label_smoothing of the loss exo must be above 0 (its authors use 1e-3), got 0")
        others = [name for name in self.losses if LOSSES[name].reference and name not in takers]
        if key == "divergence" and value != "reverse-kl" and others:
            raise InputError(
                f"divergence {value} has no meaning for the loss {others[0]}, which is no function of the difference "
                f"of two rewards; losses that take it: {', '.join(taking)}"
            )


def parse_losses(entries: Sequence[str]) -> dict[str, float]:
    """`["sigmoid=0.8", "sft=0.2"]` or `["sigmoid"]` -> weights by name; a name without a weight has 1.
    Raises InputError for a weight that is no number and for a name said twice."""
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
            plain = str(name).replace("_", "-").lower()
            near = NO_AOT if plain.startswith("aot") else _near(ELSEWHERE.get(plain, plain), LOSSES)
            raise InputError(f"unknown loss {name!r}{near}; there are {', '.join(LOSSES)}")
        if not _is_number(weight) or weight <= 0:
            raise InputError(f"the weight of loss {name} must be a number above 0, got {weight!r}")
    single, paired = ([name for name in losses if name in table] for table in (UNPAIRED_LOSSES, PAIR_LOSSES))
    if single and paired:
        raise InputError(f"loss {single[0]} is for single judged answers and {paired[0]} for pairs: choose one kind")
    if set(losses) == {"sft"}:
        raise InputError(
            "loss sft alone is plain fine-tuning: train with sft (SFTTrainer), or give a preference loss beside it"
        )


def _near(word: object, names: Iterable[str]) -> str:
    near = get_close_matches(str(word).replace("_", "-"), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
