"""One place checks type and range of every setting, wherever it came from."""

import copy
import importlib
import math
import pickle
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.cli.main import COMMANDS
from fourbit.errors import InputError
from fourbit.lora.config import LoRAConfig
from fourbit.settings import LARGEST, MOST, Checked, checked, read_fields, setting
from fourbit.trainer.config import DistillConfig, DPOConfig, RewardConfig, SFTConfig

KINDS = [SFTConfig, DPOConfig, RewardConfig, DistillConfig]
KINDS += [importlib.import_module(f"fourbit.cli.{name}").Options for name in COMMANDS]
NEEDED = {"model": "m", "data": ("d",), "out": "o", "teacher": "t", "adapter": ("a",), "to": "gguf"}


def needed(kind: type) -> dict[str, object]:
    """What must be given to make one."""
    without = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}
    verb = {"what": ("resize", "d"), "rank": 4, "out": "o"} if "what" in without else {}
    return verb | {key: value for key, value in NEEDED.items() if key in without}


SETTINGS = [(kind, field.name) for kind in KINDS for field in fields(kind)]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 2**64, math.nan, math.inf, -math.inf, 1e308, 5e-324])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\0", "\x1b[2J", "\udcff", "x" * 100_000, "auto", "none"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@given(st.sampled_from(SETTINGS), VALUES)
def test_any_value_of_any_setting_is_taken_or_refused_by_name(which: tuple[Any, str], value: Any) -> None:
    kind, name = which
    given = needed(kind)
    try:
        taken = getattr(kind(**given | {name: value}), name)
    except InputError as error:
        assert name in str(error) and len(str(error)) <= 2000 and "\0" not in str(error)
        return
    numbers = taken.values() if isinstance(taken, dict) else [taken]
    for number in numbers:
        if isinstance(number, int | float):
            assert math.isfinite(number) and number <= (1e308 if isinstance(number, float) else LARGEST)
    assert taken != "" and "\0" not in str(taken)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_an_end(kind: type) -> None:
    """So a setting that is added has one too: of whole numbers it is `MOST` unless it says its own."""
    given = needed(kind)
    for field in fields(kind):
        if "int" in str(field.type):
            with pytest.raises(InputError, match=f"^{field.name} must be at most"):
                kind(**given | {field.name: 2**63})


@dataclass(frozen=True, kw_only=True)
class Some(Checked):
    name: str = setting(MISSING, "text")
    many: tuple[str, ...] = setting((), "texts")
    rate: float | None = setting(None, "a number", positive=True)
    size: int | Literal["auto"] = setting("auto", "a size", least=1)


def test_values_take_the_type_of_their_field() -> None:
    some = Some(name="a", many=["b"], rate=1)  # type: ignore[arg-type]  # made right
    assert some == Some(name="a", many=("b",), rate=1.0) and type(some.rate) is float
    assert Some(name=Path("a/b"), many=[Path("c"), "d"]) == Some(name="a/b", many=("c", "d"))  # type: ignore[arg-type]  # made right
    assert Some(name="a", many=Path("c")).many == ("c",)  # type: ignore[arg-type]  # made right
    assert Some(name="a", size=1e3).size == 1000 and type(Some(name="a", size=2.0).size) is int  # type: ignore[arg-type]  # made right
    assert checked("size", MOST, int) == MOST and checked("seed", LARGEST, int, {"most": LARGEST}) == LARGEST


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([], "it must be a mapping, got []"),
        ({}, "it lacks name"),
        ({"name": "a", "nmae": "b"}, "it holds 'nmae', which this fourbit does not know"),
        ({"name": 5}, "it: name must be text, got 5"),
        ({"name": "a", "many": ["b", 5]}, "it: many must be text or a list of texts, got ['b', 5]"),
        ({"name": "a", "rate": True}, "it: rate must be a number or null, got True"),
        ({"name": "a", "rate": 10**400}, "it: rate must be a number or null, got 1000"),
        ({"name": "a", "rate": math.nan}, "it: rate must be above 0 and finite, got nan"),
        ({"name": "a", "size": 0}, "it: size must be at least 1, got 0"),
        ({"name": "a", "size": 2**31}, "it: size must be at most 2,147,483,647, got 2147483648"),
        ({"name": "a", "size": -(10**5000)}, "it: size must be at least 1, got a number of thousands of digits"),
        ({"name": "a", "size": 2.5}, "it: size must be a whole number or auto, got 2.5"),
        ({"name": "a", "size": "many"}, "it: size must be a whole number or auto, got 'many'"),
        ({"name": "a\0b"}, "it: name must be text without NUL, got 'a\\x00b'"),
        ({"name": ""}, "name must not be empty"),
    ],
)
def test_a_file_s_mapping_is_checked_against_the_fields(given: Any, error: str) -> None:
    with pytest.raises(InputError) as caught:
        read_fields(Some, given, "it")
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(r=8), "LoRAConfig has no setting 'r': it is called rank here"),
        (lambda: LoRAConfig(lora_alpha=8), "it is called alpha here"),
        (lambda: LoRAConfig(target_modules=["q"]), "it is called target here"),
        (
            lambda: SFTConfig(out="o", num_train_epochs=3),
            "no setting 'num_train_epochs': it is called epochs",
        ),
        (lambda: SFTConfig(out="o", gradient_accumulation_steps=4), "micro_batch splits them"),
        (lambda: DPOConfig(out="o", bata=0.1), "DPOConfig has no setting 'bata'; did you mean beta"),
        (lambda: replace(SFTConfig(out="o"), learning_rate=1.0), "it is called lr here"),
        (lambda: LoRAConfig(zzzz=1), "LoRAConfig has no setting 'zzzz'$"),
    ],
)
def test_a_setting_by_another_tools_name_is_told_ours(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_configs_are_copied_and_pickled() -> None:
    for config in (LoRAConfig(4, alpha=8), SFTConfig(out="o", epochs=3)):
        assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))  # noqa: S301  # our own bytes
