"""A run's YAML file: read strictly, written so that it reads back the same."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fourbit.cli.config_file import MAX_VALUES, read_config, write_config
from fourbit.errors import InputError


def read(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(str(path))[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # YAML 1.1 reads text
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("12", 12),
        ("+3", 3),
        ("010", 10),  # YAML 1.1 reads 8
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("'12'", "12"),
        ("[a, 1, 2.5]", ["a", 1, 2.5]),
        (".inf", float("inf")),
        ("9" * 400, int("9" * 400)),
        ("9" * 5000, "9" * 5000),  # more digits than Python reads
        # a thousand, 90, true (and `checkpointing: on` is ours), false, a date in YAML 1.1
        *((text, text) for text in ("1_000", "1:30", "on", "yes", "no", "False", "2024-01-01", "5%")),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: Any) -> None:
    got = read(tmp_path, f"key: {text}\n")["key"]
    assert got == value and type(got) is type(value)


def test_dashes_are_underscores_and_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# first\nmax-length: 5\n\nlr: 1\n")
    assert read_config(str(tmp_path / "run.yaml")) == ({"max_length": 5, "lr": 1}, {"max_length": 2, "lr": 4})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("rank: 8\nlr: 1\nrank: 16\n", r"run.yaml:3: rank stands a second time; line 1"),
        ("max-length: 8\nmax_length: 16\n", r"run.yaml:2: max_length stands a second time"),
        ("a: {b: 1, b: 2}", r"run.yaml:1: b stands a second time"),
        ("a: [{b: 1, b: 2}]", r"run.yaml:1: b stands a second time"),
        ("- rank: 8", r"one setting a line, as `name: value`"),
        ("just text", r"one setting a line"),
        ("rank: [1, 2", r"run.yaml:\d: this is no YAML"),
        ("rank:\n\t- 8", r"run.yaml:2: this is no YAML"),
        ("rank: 8\n  lr: 3", r"run.yaml:2: this is no YAML"),
        ("a: *nowhere", r"run.yaml:1: this is no YAML: found undefined alias"),
        (
            "a: !!python/object/apply:os.system [id]",
            r"run.yaml:1: the value of a has the type tag:yaml.org,2002:python",
        ),
        ("a: !!python/name:os.system", r"run.yaml:1: the value of a has the type .*2002:python"),
        *((f"a: !!{kind} x", rf"run.yaml:1: the value of a has .*,2002:{kind}") for kind in ("int", "bool", "float")),
        ("? [a, b]\n: 3", r"run.yaml:1: a setting's name must be plain text"),
        ('"a\\nb": 3', r"run.yaml:1: a setting's name must be plain text"),
        ("a: " + "[" * 1000 + "]" * 1000, r"run.yaml: nested too deeply"),
        ("a: " + "[" * 60_000, r"run.yaml: nested too deeply"),
        ("a: &a [*a]", r"run.yaml: nested too deeply"),
        ("rank: 8\n---\nrank: 9\n", r"no YAML: but found another document"),
        (b"\xff\xfea\x00:\x00", r"must be UTF-8 text: .* position 0"),
        (b"a: \x00", r"this is no YAML"),
        (b"a: " + b"x" * (1 << 20), r"must be at most 65,536 bytes"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, error: str) -> None:
    begun = time.process_time()
    with pytest.raises(InputError, match=error):
        read(tmp_path, text)
    assert time.process_time() - begun < 5


def test_many_laughs_do_not_unfold(tmp_path: Path) -> None:
    """Nine levels of ten aliases each would be 10^9 values."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 11)}]" for i in range(1, 12)]
    with pytest.raises(InputError, match=f"more than {MAX_VALUES:,} values"):
        read(tmp_path, "\n".join(lines))


def test_a_merge_key_is_a_name_nobody_knows(tmp_path: Path) -> None:
    assert "<<" in read(tmp_path, "base: &b 1\n<<: *b\n")


@pytest.mark.parametrize(("path", "error"), [("nowhere.yaml", "not there"), ("folder.yaml", "no regular file")])
def test_unreadable(tmp_path: Path, path: str, error: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match=f"needs the file {path}, which is {error}"):
        read_config(str(tmp_path / path))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), SCALARS | st.lists(TEXTS).map(tuple), min_size=1)
)
@example({"a": "1e-4", "b": "on", "c": "null", "d": "0x10", "e": "- x", "f": "a: b # c", "g": "'", "h": "\x85\u2028"})
@example({"a": 1e20, "b": -1.5e-7, "c": 10**30, "d": (), "e": ("", "x,y")})
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    write_config(path, settings, dict.fromkeys(settings, "flag"))
    expected = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    got, _ = read_config(str(path))
    assert got == expected and {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in expected.items()}


def test_every_line_names_its_source(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", {"rank": 8, "lr": 1e-4}, {"rank": "flag", "lr": "a\nb.yaml:3"})
    assert (tmp_path / "c.yaml").read_text() == "format: fourbit run 1\nrank: 8     # flag\nlr: 0.0001  # a?b.yaml:3\n"


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"#%@`,? \n\t0.1e~<"), max_size=60))
def test_any_text_is_settings_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_text(text)
    try:
        _, lines = read_config(str(path))
    except InputError as error:
        assert re.match(re.escape(str(path)), str(error))
    else:
        assert all(line >= 1 for line in lines.values())
