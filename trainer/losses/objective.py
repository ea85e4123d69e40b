"""Which preference losses there are, what each may be told, and mixtures of them.

A setting belongs to the losses whose function takes it by name, so the tables below say no more than a function's
signature does. An objective refuses a setting that none of its losses takes: nothing is ignored in silence.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ...errors import InputError
from . import judged, pairs
from .pairs import Compared, Term, divergence_of


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

# What other tools call some: only for the message about a name we do not know.
ELSEWHERE = {"dpo": "sigmoid", "cdpo": "sigmoid", "slic": "hinge", "rpo": "sft", "bco-pair": "bco"}
SETTINGS = {key for loss in LOSSES.values() for key in loss.defaults} | {"divergence_alpha", "ld_alpha"}


class Objective:
    """A weighted sum of losses, checked: {"sigmoid": 0.8, "sft": 0.2} with {"beta": 0.05}.

    losses: names of PAIR_LOSSES, or all of UNPAIRED_LOSSES, with weights above 0, used as they are (not normalised).
    settings: of SETTINGS, each within its bounds, which `DPOConfig` holds. Each goes to every loss that takes it; a
    loss has its own default for what is not there. ld_alpha is for `pairs.scores_of`. Raises InputError for what cannot
    work together, naming the rule and the value."""

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

    def _check_setting(self, key: str, value: Any) -> None:
        losses, takers = ", ".join(self.losses), [name for name in self.losses if key in LOSSES[name].defaults]
        taking = [name for name, loss in LOSSES.items() if key in loss.defaults]
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
        if key == "label_smoothing" and value >= 0.5:
            raise InputError(f"label_smoothing must be below 0.5, got {value}: else labels are rather wrong than right")
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
            near = "".join(f"; did you mean {n}?" for n in get_close_matches(ELSEWHERE.get(plain, plain), LOSSES, n=1))
            raise InputError(f"unknown loss {name!r}{near}; there are {', '.join(LOSSES)}")
        if not 0 < weight < math.inf:
            raise InputError(f"the weight of loss {name} must be a number above 0, got {weight!r}")
    single, paired = ([name for name in losses if name in table] for table in (UNPAIRED_LOSSES, PAIR_LOSSES))
    if single and paired:
        raise InputError(f"loss {single[0]} is for single judged answers and {paired[0]} for pairs: choose one kind")
    if set(losses) == {"sft"}:
        raise InputError("loss sft alone is plain fine-tuning: train with sft (SFTTrainer), or add a preference loss")
