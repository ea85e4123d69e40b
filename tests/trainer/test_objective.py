"""What an objective refuses, how losses are given, and what a training must do for one."""

import math
import re
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.trainer.losses.objective import LOSSES, RULES, Objective, parse_losses


def test_every_setting_has_a_rule() -> None:
    assert {key for loss in LOSSES.values() for key in loss.defaults} | {"divergence_alpha", "ld_alpha"} == set(RULES)


BETWEEN = "a number from 0 up to, but not including, 0.5"
ALPHAS = (-0.1, 1.1, math.nan, "x", True)
REFUSED = [
    ({}, {}, "loss must name at least one of sigmoid, robust, "),
    ({"sigmiod": 1.0}, {}, "unknown loss 'sigmiod'; did you mean sigmoid?; there are sigmoid, robust"),
    ({"bco_pair": 1.0}, {}, "did you mean bco?"),
    ({"SPPO_hard": 1.0}, {}, "did you mean sppo-hard?"),
    ({"dpo": 1.0}, {}, "did you mean sigmoid?"),
    ({"zzz": 1.0}, {}, "unknown loss 'zzz'; there are"),
    ({"aot_unpaired": 1.0}, {}, "it sorts a whole batch"),
    ({"sft": 1.0}, {}, "loss sft alone is plain fine-tuning: train with sft (SFTTrainer)"),
    ({"sigmoid": 1.0, "kto": 1.0}, {}, "loss kto is for single judged answers and sigmoid for pairs"),
    ({"sigmoid": 0.0}, {}, "the weight of loss sigmoid must be a number above 0, got 0.0"),
    ({"sigmoid": -1}, {}, "above 0, got -1"),
    ({"sigmoid": math.nan}, {}, "above 0, got nan"),
    ({"sigmoid": math.inf}, {}, "above 0, got inf"),
    ({"sigmoid": True}, {}, "above 0, got True"),
    ({"sigmoid": "1"}, {}, "above 0, got '1'"),
    ({"sigmoid": 1.0}, {"beta": 0}, "beta must be a number above 0, got 0"),
    ({"sigmoid": 1.0}, {"beta": math.nan}, "beta must be a number above 0, got nan"),
    ({"sigmoid": 1.0}, {"beta": True}, "beta must be a number above 0, got True"),
    ({"kto": 1.0}, {"beta": -0.1}, "beta must be a number above 0, got -0.1"),
    ({"sigmoid": 1.0}, {"label_smoothing": 0.5}, f"label_smoothing must be {BETWEEN}, got 0.5"),
    ({"robust": 1.0}, {"label_smoothing": 0.5}, f"label_smoothing must be {BETWEEN}, got 0.5"),
    ({"robust": 1.0}, {"label_smoothing": -0.1}, f"label_smoothing must be {BETWEEN}, got -0.1"),
    ({"sigmoid": 1.0, "exo": 1.0}, {"label_smoothing": 0.0}, "label_smoothing of the loss exo must be above 0"),
    ({"simpo": 1.0}, {"gamma": -1.0}, "gamma must be a number of at least 0, got -1.0"),
    ({"discopop": 1.0}, {"tau": 0.0}, "tau must be a number above 0, got 0.0"),
    ({"cpo": 1.0}, {"sft_weight": -1.0}, "sft_weight must be a number of at least 0, got -1.0"),
    ({"kto": 1.0}, {"desirable_weight": 0.0}, "desirable_weight must be a number above 0, got 0.0"),
    ({"kto": 1.0}, {"undesirable_weight": "x"}, "undesirable_weight must be a number above 0, got 'x'"),
    ({"ipo": 1.0}, {"label_smoothing": 0.1}, "label_smoothing is not used by the loss ipo, got 0.1: leave it out, or"),
    ({"ipo": 1.0, "sft": 1.0}, {"label_smoothing": 0.0}, "not used by the loss ipo and sft, got 0.0"),
    ({"sigmoid": 1.0}, {"gamma": 0.5}, "or choose among simpo"),
    ({"bco": 1.0}, {"desirable_weight": 1.0}, "or choose among kto, apo-zero-unpaired"),
    ({"nca": 1.0}, {"divergence": "jsd"}, "divergence is not used by the loss nca, got 'jsd'"),
    ({"sigmoid": 1.0, "nca": 1.0}, {"divergence": "jsd"}, "divergence jsd has no meaning for the loss nca"),
    ({"sigmoid": 1.0}, {"divergence": "js_divergence"}, "divergence must be one of reverse-kl, forward-kl, jsd, alpha"),
    ({"sigmoid": 1.0}, {"divergence": "reverse_kl"}, "got 'reverse_kl'; did you mean reverse-kl?"),
    ({"sigmoid": 1.0}, {"divergence": 3}, "got 3"),
    ({"sigmoid": 1.0}, {"divergence": ["jsd"]}, "divergence must be one of reverse-kl, forward-kl, jsd, alpha"),
    ({"sigmoid": 1.0}, {"divergence_alpha": 0.5}, "divergence_alpha belongs to divergence alpha; got 0.5 without it"),
    (
        {"sigmoid": 1.0},
        {"divergence": "alpha", "divergence_alpha": 1.5},
        "divergence_alpha must be a number from 0 to 1, got 1.5",
    ),
    *(({"sigmoid": 1.0}, {"ld_alpha": v}, f"from 0 to 1 (1 discounts nothing), got {v!r}") for v in ALPHAS),
    ({"kto": 1.0}, {"ld_alpha": 0.5}, "ld_alpha compares the two answers of a pair, got 0.5 with the loss kto"),
    ({"sigmoid": 1.0}, {"bata": 0.1}, "there is no setting 'bata' of losses; did you mean beta?"),
    ({"sigmoid": 1.0}, {"zzz": 0.1}, "there is no setting 'zzz' of losses"),
]


@pytest.mark.parametrize(("weights", "settings", "message"), REFUSED)
def test_refusals(weights: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Objective(weights, settings)


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
