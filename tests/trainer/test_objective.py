"""What an objective refuses, how losses are given, and what a training must do for one."""

import math
import re
from dataclasses import fields
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.trainer.config import DPOConfig
from fourbit.trainer.losses.objective import SETTINGS, Objective, parse_losses


def test_every_setting_has_its_option() -> None:
    assert {field.name for field in fields(DPOConfig)} >= SETTINGS


ALPHAS = (-0.1, 1.1, math.nan, "x", True)
REFUSED = [
    ({}, {}, "loss must name at least one of sigmoid, robust, "),
    ({"sigmiod": 1.0}, {}, "unknown loss 'sigmiod'; did you mean sigmoid?; there are sigmoid, robust"),
    ({"bco_pair": 1.0}, {}, "did you mean bco?"),
    ({"SPPO_hard": 1.0}, {}, "did you mean sppo-hard?"),
    ({"dpo": 1.0}, {}, "did you mean sigmoid?"),
    ({"zzz": 1.0}, {}, "unknown loss 'zzz'; there are"),
    ({"sft": 1.0}, {}, "loss sft alone is plain fine-tuning: train with sft (SFTTrainer)"),
    ({"sigmoid": 1.0, "kto": 1.0}, {}, "loss kto is for single judged answers and sigmoid for pairs"),
    ({"sigmoid": 0.0}, {}, "the weight of loss sigmoid must be a number above 0, got 0.0"),
    ({"sigmoid": -1}, {}, "above 0, got -1"),
    ({"sigmoid": math.nan}, {}, "above 0, got nan"),
    ({"sigmoid": math.inf}, {}, "above 0, got inf"),
    ({"sigmoid": 1.0}, {"label_smoothing": 0.5}, "label_smoothing must be below 0.5, got 0.5"),
    ({"robust": 1.0}, {"label_smoothing": 0.5}, "label_smoothing must be below 0.5, got 0.5"),
    ({"sigmoid": 1.0, "exo": 1.0}, {"label_smoothing": 0.0}, "label_smoothing of the loss exo must be above 0"),
    ({"ipo": 1.0}, {"label_smoothing": 0.1}, "label_smoothing is not used by the loss ipo, got 0.1: leave it out, or"),
    ({"ipo": 1.0, "sft": 1.0}, {"label_smoothing": 0.0}, "not used by the loss ipo and sft, got 0.0"),
    ({"sigmoid": 1.0}, {"gamma": 0.5}, "or choose among simpo"),
    ({"bco": 1.0}, {"desirable_weight": 1.0}, "or choose among kto, apo-zero-unpaired"),
    ({"nca": 1.0}, {"divergence": "jsd"}, "divergence is not used by the loss nca, got 'jsd'"),
    ({"sigmoid": 1.0, "nca": 1.0}, {"divergence": "jsd"}, "divergence jsd has no meaning for the loss nca"),
    ({"sigmoid": 1.0}, {"divergence_alpha": 0.5}, "divergence_alpha belongs to divergence alpha; got 0.5 without it"),
    ({"kto": 1.0}, {"ld_alpha": 0.5}, "ld_alpha compares the two answers of a pair, got 0.5 with the loss kto"),
]


@pytest.mark.parametrize(("weights", "settings", "message"), REFUSED)
def test_refusals(weights: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Objective(weights, settings)


KINDS = "divergence must be one of reverse-kl, forward-kl, jsd, alpha or null, got "
OUT_OF_BOUNDS = [
    ("sigmoid", {"beta": 0}, "beta must be above 0 and finite, got 0"),
    ("sigmoid", {"beta": math.nan}, "beta must be above 0 and finite, got nan"),
    ("sigmoid", {"beta": True}, "beta must be a number or null, got True"),
    ("kto", {"beta": -0.1}, "beta must be above 0 and finite, got -0.1"),
    ("robust", {"label_smoothing": -0.1}, "label_smoothing must be at least 0, got -0.1"),
    ("simpo", {"gamma": -1.0}, "gamma must be at least 0, got -1.0"),
    ("discopop", {"tau": 0.0}, "tau must be above 0 and finite, got 0.0"),
    ("cpo", {"sft_weight": -1.0}, "sft_weight must be at least 0, got -1.0"),
    ("kto", {"desirable_weight": 0.0}, "desirable_weight must be above 0 and finite, got 0.0"),
    ("kto", {"undesirable_weight": "x"}, "undesirable_weight must be a number or null, got 'x'"),
    ("sigmoid", {"divergence": "js_divergence"}, f"{KINDS}'js_divergence'"),
    ("sigmoid", {"divergence": 3}, f"{KINDS}3"),
    ("sigmoid", {"divergence": "alpha", "divergence_alpha": 1.5}, "divergence_alpha must be at most 1, got 1.5"),
    *(("sigmoid", {"ld_alpha": value}, f"got {value!r}") for value in ALPHAS),
]


@pytest.mark.parametrize(("name", "settings", "message"), OUT_OF_BOUNDS)
def test_settings_have_bounds(name: str, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        DPOConfig(out="run", loss=[name], **settings)


def test_parse_losses() -> None:
    assert parse_losses(["sigmoid"]) == {"sigmoid": 1.0}
    assert parse_losses(["sigmoid=0.8", "sft=.2", "ipo"]) == {"sigmoid": 0.8, "sft": 0.2, "ipo": 1.0}
    for entry in ("sigmoid=", "sigmoid=much", "sigmoid=1=2"):
        with pytest.raises(InputError, match=re.escape(f"NAME=WEIGHT with a number as weight, got {entry!r}")):
            parse_losses([entry])
    with pytest.raises(InputError, match="loss ipo is given twice"):
        parse_losses(["ipo", "ipo=2"])


def test_what_an_objective_asks_for() -> None:
    plain, free = Objective({"sigmoid": 1.0}), Objective({"simpo": 1.0, "sft": 0.1})
    asked = lambda aim: (aim.unpaired, aim.needs_reference, aim.points - {None})
    assert asked(plain) == (False, True, set()) and asked(free) == (False, False, set())
    assert free.beta == 2.0
    kto, bco = Objective({"kto": 1.0, "bco-unpaired": 1.0}), Objective({"sigmoid": 1.0, "bco": 1.0}, {"beta": 0.4})
    assert asked(kto) == (True, True, {"kl", "shift"})
    assert asked(bco) == (False, True, {"shift"}) and bco.beta == 0.4
    assert Objective({"sigmoid": 1.0, "sppo-hard": 1.0}).settings_of("sppo-hard") == {"beta": 1e-3}
