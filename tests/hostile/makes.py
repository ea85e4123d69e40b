"""How cases make their inputs: small functions that give functions of the case's folder."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import Make

SFT = ("sft", "--model", "m", "--data", "good.jsonl", "--out", "o", "--steps", "1", "--rank", "2")
SFT_ROWS = ("sft", "--model", "m", "--data", "d.jsonl", "--out", "o", "--steps", "1", "--rank", "2")
DPO_ROWS = ("dpo", "--model", "m", "--data", "d.jsonl", "--out", "o", "--steps", "1", "--rank", "2")
CHAT = ("chat", "--model", "m")  # loads everything; with no line to answer it then ends
GENERATE = ("generate", "--model", "m", "--data", "d.jsonl", "--out", "o", "--max-new-tokens", "2")
DATA = ("data", "d.jsonl", "--model", "m")

DROPPED = object()  # as a value of a key: the key is taken away
HUGE = 10**400
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x08\x7f\u202e\u2028"  # what drives a terminal, or looks like another text
LONG = "long " * 20_000


def nothing(here: Path) -> None:
    """For a case whose command line is all there is."""


def put(name: str, content: bytes | str) -> Make:
    """A file with this content, in place of what may be there."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def make(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(raw)

    return make


def put_json(name: str, value: Any) -> Make:
    return put(name, dumped(value))


def rows(*values: Any) -> Make:
    """`d.jsonl` of these rows: objects, or text taken as it is."""
    return put("d.jsonl", "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in values))


def large_rows(line: str, count: int, name: str = "d.jsonl") -> Make:
    """A file of one line many times."""

    def make(here: Path) -> None:
        chunk = (line + "\n") * 1000
        with (here / name).open("w") as file:
            for _ in range(count // 1000):
                file.write(chunk)

    return make


def sparse(name: str, size: int, head: bytes = b"") -> Make:
    """A file of this size of which only the head is on the disk."""

    def make(here: Path) -> None:
        with (here / name).open("wb") as file:
            file.write(head)
            file.truncate(size)

    return make


def keys(name: str, **changes: Any) -> Make:
    """Change keys of a JSON file (a name with "__" is a path into it); DROPPED takes one away."""

    def make(here: Path) -> None:
        value = json.loads((here / name).read_text())
        for path, new in changes.items():
            *outer, last = path.split("__")
            inner = value
            for key in outer:
                inner = inner[int(key) if isinstance(inner, list) else key]
            if new is DROPPED:
                del inner[last]
            else:
                inner[last] = new
        (here / name).write_text(dumped(value))

    return make


def dumped(value: Any) -> str:
    """JSON, also of whole numbers with more digits than Python prints."""
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(before)


def edit(name: str, change: Callable[[bytes], bytes]) -> Make:
    """A file with its bytes changed."""

    def make(here: Path) -> None:
        (here / name).write_bytes(change((here / name).read_bytes()))

    return make


def all_of(*makes: Make) -> Make:
    """One after the other."""

    def make(here: Path) -> None:
        for each in makes:
            each(here)

    return make


def gone(name: str) -> Make:
    return lambda here: (here / name).unlink()


def pipe(name: str) -> Make:
    """A pipe that nobody writes to, in place of what may be there."""

    def make(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        os.mkfifo(here / name)

    return make


def link(name: str, aim: str) -> Make:
    """A symbolic link in place of what may be there."""

    def make(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        os.symlink(aim, here / name)

    return make


def folder(name: str) -> Make:
    """A folder in place of a file."""

    def make(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).mkdir()

    return make


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def aliases(levels: int) -> str:
    """YAML whose last value is 10 to the power of `levels` texts, once aliases are unfolded."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]")
    return "\n".join(lines) + "\n"


def turns(*texts: str, **more: Any) -> dict[str, Any]:
    """A row of messages: user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **more}


def told(value: Any) -> str:
    """A value in a case's name."""
    text = "huge" if value is HUGE else json.dumps(value)
    return text if len(text) <= 24 else text[:20] + "..."


GOOD = turns("hi", "yo")
Table = Mapping[str, Make]
