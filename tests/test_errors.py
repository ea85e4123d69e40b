"""What every message is made of: safe to print, and one paragraph."""

import ast
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.cli.main import as_flags, main
from fourbit.errors import DiskError, EnvironmentProblem, FourbitError, InputError, NumericError, clean, shown, visible

LIMIT = 2000 - len("fourbit: ")


@given(st.text(st.characters(), max_size=300).flatmap(lambda text: st.sampled_from([text, text * 300])))
def test_any_message_is_one_printable_paragraph(text: str) -> None:
    message = str(InputError(text))
    assert len(message) <= LIMIT
    assert all(c.isprintable() or c in "\n\t" for c in message)
    assert "\n\n" not in message
    message.encode("utf-8")  # half a surrogate pair is escaped


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp", "Zs"]), max_size=100))
def test_a_short_printable_message_is_as_it_was(text: str) -> None:
    assert str(InputError(text)) == text
    assert clean(clean(text)) == clean(text)


def test_what_was_quoted_is_cut_and_the_advice_is_not() -> None:
    message = clean(f"'{'x' * 100_000}' is no file; give another")
    assert message.startswith("'xxx") and message.endswith("is no file; give another") and "more characters" in message
    many = clean(f"these are unknown: {'name ' * 100_000}; leave them out")
    assert many.startswith("these are unknown: name") and many.endswith("; leave them out")


@pytest.mark.parametrize("kind", [FourbitError, InputError, EnvironmentProblem, DiskError, NumericError])
def test_every_error_is_cleaned(kind: type[FourbitError]) -> None:
    assert str(kind("a\x1b[2Jb")) == "a\\x1b[2Jb"


@pytest.mark.parametrize("value", [10**5000, "x" * 5000, [1] * 5000, {"\x1b": "\ud800"}, None], ids=range(5))
def test_values_are_shown_short(value: object) -> None:
    assert len(shown(value)) <= 80
    assert shown(value).isprintable()


def test_what_cannot_drive_a_terminal_is_left() -> None:
    assert visible("äö 漢字\tand\nnew") == "äö 漢字\tand\nnew"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_that_lacks_a_character_gets_it_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))

    assert main(["\udc80漢"]) == 2
    sys.stderr.flush()
    assert isinstance(sys.stderr, io.TextIOWrapper) and b"\\udc80" in sys.stderr.buffer.getvalue()  # type: ignore[attr-defined]


def test_output_that_finds_no_room_is_the_disks_error() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-P", "-m", "fourbit", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 5 and b"the disk is full" in ended.stderr and b"Traceback" not in ended.stderr


FLAG = re.compile(r"(?<![\w-])--[a-z]")


def flags_in(source: str) -> list[str]:
    """Texts with a flag in them, but for docstrings."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text.value for text in texts if id(text) not in docs and FLAG.search(text.value)]


def test_the_library_speaks_of_arguments_and_the_command_line_of_flags() -> None:
    root = Path(__file__).parents[1]
    folders = ("", "kernels", "lora", "optim", "data", "models", "text", "trainer", "trainer/losses")
    found = {path.name: flags_in(path.read_text()) for folder in folders for path in (root / folder).glob("*.py")}
    told = {name: texts for name, texts in found.items() if texts and name not in ("synonyms.py", "settings.py")}
    assert told.pop("gguf_model.py") == ["1 (join the files of the model first: llama-gguf-split --merge)"]
    assert told == {}
    for said, wanted in {
        'go on with resume="auto", or choose another out': "go on with --resume auto, or choose another --out",
        "resume=True goes on, overwrite=True begins anew": "--resume goes on, --overwrite begins anew",
        "name one that can (template=...)": "name one that can (--template)",
        "load it with quant_type=None": "load it with --quant none",
        "load it with trainable=True or another outer": "load it with trainable=True or another outer",
    }.items():
        assert as_flags(said) == wanted


def test_a_planted_flag_is_seen() -> None:
    source = '"""Docs may say --out."""\ndef f(x):\n    """--out"""\n    raise ValueError(f"{x}: choose another --out")'
    assert flags_in(source) == [": choose another --out"]
