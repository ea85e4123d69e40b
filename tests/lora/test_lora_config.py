"""LoRAConfig refuses what cannot be meant, and says which field, rule and value."""

from dataclasses import FrozenInstanceError

import pytest

from fourbit.errors import InputError
from fourbit.lora.config import LoRAConfig


def test_defaults() -> None:
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.dropout, config.target, config.rslora) == (
        16,
        32,
        0.0,
        "all-linear",
        False,
    )
    assert (config.rank_pattern, config.alpha_pattern, config.exclude) == ({}, {}, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number from 1 to 2,147,483,647, got 0"),
        ({"rank": 4.0}, "rank must be a whole number from 1 to 2,147,483,647, got 4.0"),
        ({"rank": True}, "rank must be a whole number from 1 to 2,147,483,647, got True"),
        (
            {"rank": 10**5000},
            "rank must be a whole number from 1 to 2,147,483,647, got a number of thousands of digits",
        ),
        ({"alpha": 10**5000}, "got a number of thousands of digits"),
        ({"dropout": 10**5000}, "got a number of thousands of digits"),
        ({"rank": "8"}, "rank must be a whole number from 1 to 2,147,483,647, got '8'"),
        ({"alpha": 0}, r"alpha must be a number above 0 and below 1e\+30, got 0"),
        ({"alpha": float("inf")}, r"alpha must be a number above 0 and below 1e\+30, got inf"),
        ({"alpha": float("nan")}, r"alpha must be a number above 0 and below 1e\+30, got nan"),
        ({"alpha": 10**400}, r"alpha must be a number above 0 and below 1e\+30, got 1000"),
        ({"alpha": "big"}, r"alpha must be a number above 0 and below 1e\+30, got 'big'"),
        ({"dropout": 1.0}, "dropout must be a number from 0 up to, but not including, 1; got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"dropout": False}, "dropout must be"),
        ({"dropout": None}, "dropout must be"),
        ({"rslora": 1}, "rslora must be true or false, got 1"),
        ({"target": ()}, "target must name at least one layer"),
        ({"target": ""}, "target must name at least one layer"),
        ({"target": ["q_proj", 3]}, "target must be a string or a list of layer names, got"),
        ({"target": ["q_proj", ""]}, "target must be a string or a list of layer names, got"),
        ({"target": None}, "target must be a string or a list"),
        ({"target": "q_proj("}, r"target holds 'q_proj\(', which is no regular expression"),
        ({"exclude": "*"}, r"exclude holds '\*', which is no regular expression"),
        ({"exclude": 5}, "exclude must be a string or a list"),
        (
            {"rank_pattern": {"q_proj": 0}},
            r"rank_pattern\['q_proj'\] must be a whole number from 1 to 2,147,483,647, got 0",
        ),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map patterns to numbers, got"),
        ({"rank_pattern": {"": 4}}, "rank_pattern must have regular expressions as keys, got ''"),
        ({"alpha_pattern": {3: 4}}, "alpha_pattern must have regular expressions as keys, got 3"),
        ({"alpha_pattern": {"q(": 4}}, r"alpha_pattern holds 'q\(', which is no regular expression"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] must be a number above 0 and below 1e\+30, got -1"),
        ({"target": "(" * 5000}, "no regular expression"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(**settings)


def test_it_does_not_change_under_the_callers_hands() -> None:
    pattern, names = {"q_proj": 4}, ["q_proj"]
    config = LoRAConfig(rank_pattern=pattern, target=names)
    pattern["v_proj"], names[0] = 2, "other"
    assert config.rank_pattern == {"q_proj": 4} and config.target == ("q_proj",)
    with pytest.raises(FrozenInstanceError):
        config.rank = 2
