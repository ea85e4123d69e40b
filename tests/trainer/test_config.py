"""What a run can be told about its optimizer and its learning rates, and which of it may change on resume."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.errors import InputError
from fourbit.trainer.config import SFTConfig, size_in_bytes
from fourbit.trainer.resume import changed_options


def plain(**options):
    """As a checkpoint holds it."""
    return json.loads(json.dumps(asdict(SFTConfig(out="o", **options))))


@pytest.mark.parametrize(
    "text, size",
    [
        ("2GiB", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("512mib", 512 << 20),
        ("3KB", 3000),
        ("1TB", 10**12),
        ("0GiB", 0),
        ("2G", None),
        ("2", None),
        ("-2GiB", None),
        ("1e3MB", None),
        (" 2GiB", None),
        ("2GiB\n", None),
        ("٢GiB", None),
        ("GiB", None),
        ("9" * 500 + "GiB", None),
    ],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@given(st.text(alphabet="0123456789.KMGTiB ", max_size=12))
def test_a_size_is_a_number_or_none(text):
    assert size_in_bytes(text) is None or size_in_bytes(text) >= 0


@pytest.mark.parametrize(
    "options, error",
    [
        ({"optimizer": "adam"}, "optimizer must be one of adamw, adamw8bit, .* got 'adam'"),
        ({"optimizer_budget": "2GiB"}, "adamw keeps its whole state on the device, paged-adamw does not"),
        ({"optimizer": "paged-lion8bit", "optimizer_budget": "2"}, "such as 2GiB or 512MiB, got '2'"),
        ({"optimizer": "paged-lion8bit", "optimizer_budget": "0B"}, "got '0B'"),
        ({"decay": 0.2}, "decay is the last part of schedule wsd; cosine has none"),
        ({"schedule": "wsd", "decay": 0.0}, "decay must be above 0 and finite, got 0.0"),
        ({"schedule": "inverse_sqrt"}, "schedule must be one of cosine, linear, constant, inverse-sqrt or wsd"),
        ({"warmup": 1.5}, "warmup must be a fraction of all steps below 1, or a number of them, got 1.5"),
        ({"schedule": "wsd", "decay": 2.25}, "decay must be a fraction of all steps below 1, or a number of them"),
        ({"lora_plus": -1.0}, "lora_plus must be above 0"),
        ({"lora_plus": 16.0, "full": True}, "full training has no adapter"),
        ({"batch_size": np.int64(8)}, r"batch_size must be a whole number, got .*8"),
        ({"batch_size": 8.5}, "batch_size must be a whole number, got 8.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"lr": np.float32(-1)}, "lr must be a number, got "),
        ({"lr": "1e-4"}, "lr must be a number, got '1e-4'"),
        ({"lr": None}, "lr must be a number, got null"),
        ({"lr": float("nan")}, "lr must be above 0 and finite, got nan"),
        ({"micro_batch": "atuo"}, "micro_batch must be a whole number or auto, got 'atuo'"),
        ({"lr_scale": {"*": -1.0}}, r"lr_scale must have factors of 0 or more, got -1.0 for '\*'"),
    ],
)
def test_refused(options, error):
    with pytest.raises(InputError, match=error):
        SFTConfig(out="o", **options)


def test_decay_and_warmup_are_fractions_or_steps():
    def rates(total, **options):
        config = SFTConfig(out="o", schedule="wsd", **options)
        return [config.rate_factor(step, total) for step in range(total)]

    assert rates(200, warmup=30, decay=0.25) == rates(200, warmup=0.15, decay=50)
    assert rates(200, warmup=0, decay=7) == [1.0] * 194 + [k / 7 for k in range(6, 0, -1)]
    assert rates(200, warmup=0) == rates(200, warmup=0, decay=0.1)


def test_another_optimizer_is_another_run_and_another_budget_is_not():
    paged = plain(optimizer="paged-adamw8bit", optimizer_budget="2GiB")
    assert changed_options(paged, SFTConfig(out="o", optimizer="paged-adamw8bit")) == []
    assert changed_options(paged, SFTConfig(out="o", optimizer="adamw8bit")) == []
    assert changed_options(paged, SFTConfig(out="o")) == ["optimizer: 'paged-adamw8bit' -> 'adamw'"]
    assert changed_options(plain(), SFTConfig(out="o", optimizer="lion")) == ["optimizer: 'adamw' -> 'lion'"]


def test_the_order_of_patterns_is_no_change():
    a = plain(lr_scale={"a": 1.0, "b": 2.0})
    assert changed_options(a, SFTConfig(out="o", lr_scale={"b": 2.0, "a": 1.0})) == []
    assert changed_options(a, SFTConfig(out="o")) == ["lr_scale: {'a': 1.0, 'b': 2.0} -> {}"]


def test_a_run_from_before_an_option_had_its_default():
    old = {name: value for name, value in plain().items() if name not in ("optimizer", "lora_plus", "lr_scale")}
    assert changed_options(old, SFTConfig(out="o")) == []
    assert changed_options(old, SFTConfig(out="o", lora_plus=16.0)) == ["lora_plus: 1.0 -> 16.0"]
