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
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 4.5}, "rank must be a whole number, got 4.5"),
        ({"rank": True}, "rank must be a whole number, got True"),
        (
            {"rank": 10**5000},
            "rank must be at most 2,147,483,647, got a number of thousands of digits",
        ),
        ({"alpha": 10**5000}, "got a number of thousands of digits"),
        ({"dropout": 10**5000}, "got a number of thousands of digits"),
        ({"rank": "8"}, "rank must be a whole number, got '8'"),
        ({"alpha": 0}, "alpha must be above 0 and finite, got 0"),
        ({"alpha": float("inf")}, "alpha must be above 0 and finite, got inf"),
        ({"alpha": float("nan")}, "alpha must be above 0 and finite, got nan"),
        ({"alpha": 10**400}, "alpha must be a number, got 1000"),
        ({"alpha": 1e31}, r"alpha must be at most 1e\+30, got 1e\+31"),
        ({"alpha": "big"}, "alpha must be a number, got 'big'"),
        ({"dropout": 1.0}, "dropout must be a number from 0 up to, but not including, 1; got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"dropout": False}, "dropout must be"),
        ({"dropout": None}, "dropout must be"),
        ({"rslora": 1}, "rslora must be true or false, got 1"),
        ({"target": ()}, "target must not be empty"),
        ({"target": ""}, "target must not be empty"),
        ({"target": ["q_proj", 3]}, "target must be one of text, a list of texts or null, got"),
        ({"target": "q_proj("}, r"target holds 'q_proj\(', which is no regular expression"),
        ({"exclude": "*"}, r"exclude holds '\*', which is no regular expression"),
        ({"exclude": 5}, "exclude must be text or a list of texts, got 5"),
        ({"exclude": {"q_proj", 3}}, "exclude must be text or a list of texts"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "rank_pattern must be at least 1, got 0",
        ),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a mapping of names or patterns to numbers, got"),
        ({"alpha_pattern": {3: 4}}, "alpha_pattern must be a mapping of names or patterns to numbers, got"),
        ({"alpha_pattern": {"q(": 4}}, r"alpha_pattern holds 'q\(', which is no regular expression"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern must be above 0 and finite, got -1"),
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
    assert set(LoRAConfig(target={"q_proj", "v_proj"}).target) == {"q_proj", "v_proj"}
    with pytest.raises(FrozenInstanceError):
        config.rank = 2
