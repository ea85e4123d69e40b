"""docs/add-a-model.md, walked: its file, its line of the table, its comparison, its shapes, its use."""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import filter as matching
from pathlib import Path
from types import ModuleType
from typing import Any

import family_oracles
import pytest
import test_families as family_tests

from fourbit.models import families
from fourbit.models.spec import Spec

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-model.md").read_text()
FILE, LINE, COMPARISON, SHAPES, USE = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)


def run(source: str, names: dict[str, Any]) -> None:
    exec(source, names)  # noqa: S102  (a block of the page)


def added(monkeypatch: pytest.MonkeyPatch, source: str = FILE) -> None:
    """The family of the page, as its steps 2 and 3 add it."""
    module = ModuleType("fourbit.models.exaone")
    module.__package__ = "fourbit.models"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(source, vars(module))
    monkeypatch.setitem(families.FAMILIES, "exaone4", families.FAMILIES["llama"])  # until the line is read
    run(LINE, vars(families) | {"exaone4": module.exaone4})


@pytest.fixture(scope="module")
def family() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        added(monkeypatch)
        monkeypatch.setattr(family_oracles, "SHAPES", dict(family_oracles.SHAPES))
        run(SHAPES, vars(family_oracles))
        yield


@pytest.mark.usefixtures("family")
def test_its_comparison_and_its_use_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    run(COMPARISON, found)
    run(USE, found)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert found["ours"].spec.windows == (7, 7, 7, 0) and found["ours"].spec.no_rope == (3,)


@pytest.mark.usefixtures("family")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("shape", re.findall(r'SHAPES\["(.*?)"\]', SHAPES))
def test_the_suite_holds_for_its_shapes(shape: str, tmp_path: Path) -> None:
    oracle = family_oracles.theirs(shape)
    pair = oracle, family_oracles.ours(oracle)
    family_tests.test_logits_and_likeliest_tokens(pair)
    family_tests.test_a_cache_goes_on_past_windows(pair)
    family_tests.test_packed_rows_and_forks_are_alone(pair)
    family_tests.test_folders_go_both_ways(pair, tmp_path)
    family_tests.test_gradients_of_an_adapter_are_those_under_peft(pair, tmp_path)


@pytest.mark.usefixtures("family")
def test_a_file_may_leave_out_its_defaults() -> None:
    from transformers import Exaone4Config

    said = Exaone4Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=8).to_dict()
    needed = "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    short = {key: said[key] for key in (*needed, "num_key_value_heads")}
    spec = families.read_spec(said)
    assert families.read_spec(short) == spec and spec.windows == (4096, 4096, 4096, 0) * 2


@pytest.mark.parametrize(
    "fault", [("no_rope=tuple", "no_rope=() and tuple"), ('norms="after"', 'norms="both"'), ("eps=1e-5", "eps=1e-2")]
)
def test_its_comparison_finds_a_fault(fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert FILE.count(fault[0]) == 1
    added(monkeypatch, FILE.replace(*fault))
    comparison = COMPARISON.replace(
        "config.to_dict()", "{k: v for k, v in config.to_dict().items() if k != 'rms_norm_eps'}"
    )
    with pytest.raises((AssertionError, RuntimeError)):
        run(comparison, {})


def test_its_table_names_fields_of_a_spec() -> None:
    column = [row.split("|")[2] for row in PAGE.splitlines() if row.startswith("| ") and "`" in row]
    names = [name for cell in column for name in re.findall(r"`([\w*]+)`", cell) if name != "Spec"]
    known = [field.name for field in fields(Spec)]
    assert len(names) > 10 and all(matching(known, name) for name in names)
