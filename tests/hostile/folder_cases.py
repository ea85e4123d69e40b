"""Places: outputs that are inputs, links, pipes and folders of others; paths of any bytes; streams that are closed."""

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path

from harness import Case, Make
from makes import (
    CHAT,
    DATA,
    ESCAPES,
    GENERATE,
    GOOD,
    LONG,
    SFT,
    all_of,
    folder,
    link,
    nothing,
    pipe,
    put,
    rows,
    turns,
)

TRAIN = SFT[:5]
FULL = (*TRAIN, "--steps", "1", "--full", "--quant", "none", "--out")
BYTES = "\udcff\udcfe"  # a name that is not UTF-8
DISTILL = ("distill", "--model", "m", "--teacher", "m", "--data", "good.jsonl", "--steps", "1", "--rank", "2")
EVAL = ("eval", "--model", "m", "--data", "good.jsonl", "--max-new-tokens", "2")
ANSWERS = ("generate", "--model", "m", "--data", "d.jsonl", "--max-new-tokens", "2", "--out")
RUN = (*SFT, "--steps", "1")
RESUMED = (
    "sft",
    "--model",
    "m",
    "--data",
    "good.jsonl",
    "--steps",
    "2",
    "--save-every",
    "1",
    "--rank",
    "2",
    "--out",
    "run",
    "--resume",
)
ROW = '{"prompt": "hi", "completion": "yo"}\n'


def read_by(name: str) -> Make:
    """A pipe that this process keeps open, so that who writes a little into it does not wait."""

    def make(here: Path) -> None:
        os.mkfifo(here / name)
        kept.append(os.open(here / name, os.O_RDWR | os.O_NONBLOCK))

    return make


kept: list[int] = []  # of pipes that are read by nobody else; closed with the process


def renamed(old: str, new: str) -> Make:
    return lambda here: os.rename(os.fsencode(here / old), os.fsencode(here) + b"/" + os.fsencode(new))


def bound(name: str) -> Make:
    """A socket that nobody listens to."""

    def make(here: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(here):
            made.bind(name)

    return make


def outside(inner: str, aim: str = "good.jsonl") -> Make:
    """The output folder is there, and a name in it is a link out of it."""

    def make(here: Path) -> None:
        (here / "o").mkdir()
        os.symlink(os.path.join(*[".."] * (1 + inner.count("/")), aim), here / "o" / inner)

    return make


OUTPUTS: dict[str, tuple[Make, tuple[str, ...]]] = {  # what is read, or is another's, must not be written
    "the model's folder, full": (nothing, (*FULL, "m")),
    "the model's folder, an adapter": (nothing, (*SFT[:5], "--steps", "1", "--rank", "2", "--out", "m")),
    "the model's folder by a link": (link("n", "m"), (*FULL, "n")),
    "a folder in the model's": (nothing, (*FULL, "m/o")),
    "the starting adapter's folder": (
        nothing,
        ("dpo", "--model", "m", "--adapter", "run", "--data", "pairs.jsonl", "--steps", "1", "--out", "run"),
    ),
    "the teacher's folder": (nothing, (*DISTILL, "--sft-weight", "1", "--full", "--quant", "none", "--out", "m")),
    "the teacher's adapter": (nothing, (*DISTILL, "--teacher-adapter", "run", "--out", "run")),
    "a folder with files of another": (put("o/precious.txt", "mine"), (*SFT, "--out", "o")),
    "a folder with another's config.yaml": (put("o/config.yaml", "mine: true\n"), SFT),
    "a folder with another's metrics": (put("o/metrics.jsonl", '{"mine": 1}\n'), SFT),
    "a folder with another's adapter": (put("o/adapter_model.safetensors", "mine"), SFT),
    "a folder whose run.lock is a folder": (lambda here: (here / "o" / "run.lock").mkdir(parents=True), SFT),
    "a folder whose run.lock is a pipe": (lambda here: ((here / "o").mkdir(), os.mkfifo(here / "o" / "run.lock")), SFT),
    "a folder whose run.lock is a link out": (outside("run.lock"), SFT),
    "a folder whose config.yaml is a link out": (outside("config.yaml"), SFT),
    "a folder whose metrics are a link out": (outside("metrics.jsonl"), SFT),
    "a folder whose adapter is a link out": (outside("adapter_model.safetensors"), SFT),
    "a folder whose curve is a link out": (outside("loss.png"), SFT),
    "a folder whose checkpoints are a link out": (outside("checkpoints", "rm"), SFT),
    "a folder whose config.yaml is a folder": (lambda here: (here / "o" / "config.yaml").mkdir(parents=True), SFT),
    "a folder whose metrics are a folder": (lambda here: (here / "o" / "metrics.jsonl").mkdir(parents=True), SFT),
    "a folder whose metrics are a pipe": (
        lambda here: ((here / "o").mkdir(), os.mkfifo(here / "o" / "metrics.jsonl")),
        SFT,
    ),
    "a folder whose checkpoints are a file": (put("o/checkpoints", "mine"), SFT),
    "a folder whose adapter is a folder": (
        lambda here: (here / "o" / "adapter_model.safetensors").mkdir(parents=True),
        SFT,
    ),
    "a file": (put("o", "mine"), SFT),
    "below a file": (nothing, (*TRAIN, "--out", "good.jsonl/x")),
    "a link to nothing": (link("o", "nowhere/at/all"), SFT),
    "a link to itself": (link("o", "o"), SFT),
    "a pipe": (pipe("o"), SFT),
    "a link to a file": (link("o", "good.jsonl"), SFT),
    "an empty name": (nothing, (*TRAIN, "--out", "")),
    "a name of 5,000 characters": (nothing, (*TRAIN, "--out", LONG[:5000])),
    "a name of 300 characters": (nothing, (*TRAIN, "--out", "x" * 300)),
    "a folder in /proc": (nothing, (*TRAIN, "--out", "/proc/none/such")),
    "answers: the rows": (rows(GOOD), (*ANSWERS, "d.jsonl")),
    "answers: the rows by a link": (all_of(rows(GOOD), link("a", "d.jsonl")), (*ANSWERS, "a")),
    "answers: the rows by another path": (rows(GOOD), (*ANSWERS, "m/../d.jsonl")),
    "answers: the rows by a hard link": (
        all_of(rows(GOOD), lambda h: os.link(h / "d.jsonl", h / "a")),
        (*ANSWERS, "a"),
    ),
    "answers: the model's config": (rows(GOOD), (*ANSWERS, "m/config.json")),
    "answers: the model's weights": (rows(GOOD), (*ANSWERS, "m/model.safetensors")),
    "answers: the model's file": (rows(GOOD), ("generate", "--model", "m.gguf", *ANSWERS[3:], "m.gguf")),
    "answers: the adapter's weights": (
        rows(GOOD),
        (*ANSWERS, "run/adapter_model.safetensors", "--adapter", "run"),
    ),
    "answers: the template": (
        all_of(rows(GOOD), put("t.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")),
        (*ANSWERS, "t.jinja", "--template", "t.jinja"),
    ),
    "answers: an existing file": (all_of(rows(GOOD), put("a.jsonl", "mine")), (*ANSWERS, "a.jsonl")),
    "answers: a folder": (all_of(rows(GOOD), folder("a")), (*ANSWERS, "a")),
    "answers: a link to itself": (all_of(rows(GOOD), link("a", "a")), (*ANSWERS, "a")),
    "answers: in no folder": (rows(GOOD), (*ANSWERS, "no/where")),
    "answers: an empty name": (rows(GOOD), (*ANSWERS, "")),
    "answers: a name of 300 characters": (rows(GOOD), (*ANSWERS, "x" * 300)),
    "evaluation: the rows": (nothing, (*EVAL, "--answers", "good.jsonl")),
    "evaluation: the model's config": (nothing, (*EVAL, "--answers", "m/config.json")),
    "evaluation: in no folder": (nothing, (*EVAL, "--answers", "no/where/a.jsonl")),
    "evaluation: a folder": (nothing, (*EVAL, "--answers", "m")),
    "evaluation: without a name": (nothing, (*EVAL, "--answers", "")),
    "evaluation: a file that is there": (put("a.jsonl", "mine"), (*EVAL, "--adapter", "run", "--answers", "a.jsonl")),
    "evaluation: the base's name is there": (
        put("a.base.jsonl", "mine"),
        (*EVAL, "--adapter", "run", "--answers", "a.jsonl"),
    ),
    "answers: an existing file of the model, overwritten": (rows(GOOD), (*ANSWERS, "m/config.json", "--overwrite")),
    "answers: the rows, overwritten by a link": (
        all_of(rows(GOOD), link("a", "d.jsonl")),
        (*ANSWERS, "a", "--overwrite"),
    ),
    "answers: what the model links to, overwritten": (
        all_of(rows(GOOD), renamed("m/model.safetensors", "w"), link("m/model.safetensors", "../w")),
        (*ANSWERS, "w", "--overwrite"),
    ),
    "answers: the settings": (put("g.yaml", "model: m\nout: g.yaml\ndata: good.jsonl\n"), ("generate", "g.yaml")),
    "answers: another's file, resumed": (all_of(rows(GOOD), put("a", "mine")), (*ANSWERS, "a", "--resume")),
    "answers: rows of other data, resumed": (
        all_of(rows(GOOD), put("a", '{"prompt": "x", "answer": "y"}\n')),
        (*ANSWERS, "a", "--resume"),
    ),
    "answers: a full device": (rows(GOOD), (*ANSWERS, "/dev/full")),
    "answers: JSON beside them": (rows(GOOD), (*ANSWERS, "-", "--json")),
    "evaluation: two files into a pipe": (read_by("a"), (*EVAL, "--adapter", "run", "--answers", "a")),
    "evaluation: the adapter's settings": (nothing, (*EVAL, "--adapter", "run", "--answers", "run/config.yaml")),
    "evaluation: the base's are the rows": (
        all_of(nothing, renamed("good.jsonl", "a.base.jsonl")),
        (*EVAL[:4], "a.base.jsonl", "--adapter", "run", "--answers", "a.jsonl", "--overwrite"),
    ),
    "a finished run whose settings are a link out": (link("run/config.yaml", "../good.jsonl"), RESUMED),
    "a finished run whose metrics are a link out": (link("run/metrics.jsonl", "../good.jsonl"), RESUMED),
    "a finished run whose metrics are a pipe": (pipe("run/metrics.jsonl"), RESUMED),
    "a finished run whose adapter is a link out": (link("run/adapter_model.safetensors", "../good.jsonl"), RESUMED),
    "a finished run without checkpoints": (lambda here: (here / "run" / "checkpoints").rename(here / "o"), RESUMED),
    "a folder in the adapter's": (
        nothing,
        ("dpo", "--model", "m", "--adapter", "run", "--data", "pairs.jsonl", "--steps", "1", "--out", "run/new"),
    ),
    "the data's folder": (all_of(folder("f"), put("f/d.jsonl", ROW)), (*SFT[:3], "--data", "f/d.jsonl", "--out", "f")),
    "the folder that one is in": (nothing, (*TRAIN, "--out", ".")),
    "a socket": (bound("o"), SFT),
    "answers: a socket": (all_of(rows(GOOD), bound("a")), (*ANSWERS, "a")),
}
STREAMED: dict[str, tuple[Make, tuple[str, ...]]] = {  # and stay what they are
    "answers into a pipe that is read": (all_of(rows(GOOD), read_by("a")), (*ANSWERS, "a")),
    "answers by a link into a pipe": (all_of(rows(GOOD), read_by("p"), link("a", "p")), (*ANSWERS, "a")),
    "answers to standard output by its name": (rows(GOOD), (*ANSWERS, "-")),
    "answers to a link to standard output": (all_of(rows(GOOD), link("a", "/proc/self/fd/1")), (*ANSWERS, "a")),
    "answers by a link to a new file": (all_of(rows(GOOD), link("a", "o")), (*ANSWERS, "a")),
    "evaluation into a pipe that is read": (read_by("a"), (*EVAL, "--answers", "a")),
}
PATHS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "rows that are not UTF-8 and missing": (nothing, (*SFT[:3], "--data", BYTES + ".jsonl", "--out", "o")),
    "rows of escapes, missing": (nothing, (*SFT[:3], "--data", ESCAPES + ".jsonl", "--out", "o")),
    "rows of 5,000 characters": (nothing, (*SFT[:3], "--data", "x" * 5000 + ".jsonl", "--out", "o")),
    "rows of 300 characters": (nothing, (*SFT[:3], "--data", "x" * 300 + ".jsonl", "--out", "o")),
    "bad rows under a name that is not UTF-8": (
        all_of(rows("{"), renamed("d.jsonl", BYTES + ".jsonl")),
        (*SFT[:3], "--data", BYTES + ".jsonl", "--out", "o"),
    ),
    "bad rows under a name of escapes": (
        all_of(rows("{"), renamed("d.jsonl", ESCAPES + ".jsonl")),
        (*SFT[:3], "--data", ESCAPES + ".jsonl", "--out", "o"),
    ),
    "an empty file under a name of escapes": (
        put(ESCAPES + ".jsonl", ""),
        (*SFT[:3], "--data", ESCAPES + ".jsonl", "--out", "o"),
    ),
    "a model that is not UTF-8 and missing": (nothing, ("chat", "--model", BYTES)),
    "a model of escapes, missing": (nothing, ("chat", "--model", ESCAPES)),
    "a model of 5,000 characters": (nothing, ("chat", "--model", "x" * 5000)),
    "a model without a tokenizer, of escapes": (lambda here: (here / ESCAPES).mkdir(), ("chat", "--model", ESCAPES)),
    "a model without a name": (nothing, ("chat", "--model", "")),
    "a model that is /dev/zero": (nothing, ("chat", "--model", "/dev/zero")),
    "a model that is a pipe": (pipe("p"), ("chat", "--model", "p")),
    "an adapter that is not UTF-8 and missing": (nothing, (*CHAT, "--adapter", BYTES)),
    "an adapter of escapes, missing": (nothing, (*CHAT, "--adapter", ESCAPES)),
    "an adapter of 5,000 characters": (nothing, (*CHAT, "--adapter", "x" * 5000)),
    "settings that are not UTF-8 and missing": (nothing, ("sft", BYTES + ".yaml")),
    "settings of 5,000 characters": (nothing, ("sft", "x" * 5000 + ".yaml")),
    "settings of escapes, no YAML": (put(ESCAPES.replace("/", "") + ".yaml", "a: [b"), ("sft", ESCAPES + ".yaml")),
    "an output of escapes below a file": (nothing, (*TRAIN, "--out", "good.jsonl/" + ESCAPES)),
    "a checkpoint that is not UTF-8": (nothing, (*SFT, "--resume", BYTES)),
    "a template that is not UTF-8": (nothing, (*SFT, "--template", BYTES)),
    "validation rows that are not UTF-8": (nothing, (*SFT, "--val", BYTES)),
}
NAMES: dict[str, tuple[Make, tuple[str, ...]]] = {  # that are legal
    "rows under a name that is not UTF-8": (
        all_of(rows(GOOD), renamed("d.jsonl", BYTES + ".jsonl")),
        ("data", BYTES + ".jsonl", "--model", "m"),
    ),
    "a model under a name that is not UTF-8": (renamed("m", BYTES), ("chat", "--model", BYTES)),
    "an adapter under a name that is not UTF-8": (renamed("run", BYTES), (*CHAT, "--adapter", BYTES)),
    "an output that is not UTF-8": (nothing, (*SFT[:5], "--steps", "1", "--rank", "2", "--out", "o/" + BYTES)),
    "an output of escapes": (nothing, (*SFT[:5], "--steps", "1", "--rank", "2", "--out", "o/" + ESCAPES)),
}
EMOJI = turns("naïve 日本 \U0001f600", "größer ≤ \U0001f600")
STREAMS = {
    "rows that ASCII lacks": Case("", rows(EMOJI), DATA, encoding="ascii"),
    "rows that Latin-1 lacks": Case("", rows(EMOJI), DATA, encoding="latin-1"),
    "bars that ASCII lacks": Case("", rows(GOOD), DATA, encoding="ascii"),
    "help in ASCII": Case("", nothing, ("sft", "--help"), encoding="ascii"),
    "JSON in ASCII": Case("", rows(EMOJI), (*DATA, "--json"), encoding="ascii"),
    "a chat in ASCII": Case("", nothing, (*CHAT, "--max-new-tokens", "40"), encoding="ascii", stdin="hi\nho\n"),
    "a chat in Latin-1": Case("", nothing, (*CHAT, "--max-new-tokens", "40"), encoding="latin-1", stdin="hi\nho\n"),
    "a chat of bytes that are not UTF-8": Case("", nothing, (*CHAT, "--max-new-tokens", "2"), stdin="\udcff\udcfe\n"),
    "a chat of NUL and escapes": Case("", nothing, (*CHAT, "--max-new-tokens", "2"), stdin="\0" + ESCAPES + "\n"),
    "a chat of a line of 5 MB": Case("", nothing, (*CHAT, "--max-new-tokens", "2"), stdin="a b " * 1_250_000 + "\n"),
    "a chat without standard input": Case("", nothing, CHAT, closed=("stdin",)),
    "rows without standard output": Case("", rows(GOOD), DATA, closed=("stdout",)),
    "rows without standard error": Case("", rows(GOOD), DATA, closed=("stderr",)),
    "rows without any stream": Case("", rows(GOOD), DATA, closed=("stdin", "stdout", "stderr")),
    "answers without standard error": Case("", rows(GOOD), GENERATE, closed=("stderr",)),
    "training without standard output": Case("", nothing, RUN, closed=("stdout",)),
    "help without standard output": Case("", nothing, ("--help",), closed=("stdout",)),
    "doctor without standard output": Case("", nothing, ("doctor",), closed=("stdout",)),
    "no columns": Case("", rows(GOOD), DATA, env={"COLUMNS": "0"}),
    "columns of a text": Case("", rows(GOOD), RUN, env={"COLUMNS": "many"}),
    "10^9 columns": Case("", rows(GOOD), DATA, env={"COLUMNS": "1000000000"}),
    "no folder for temporary files": Case("", nothing, RUN, env={"TMPDIR": "/nonexistent", "HOME": "/nonexistent"}),
    "no PATH": Case("", rows(GOOD), DATA, env={"PATH": ""}),
    "a time zone that is none": Case("", rows(GOOD), DATA, env={"TZ": ESCAPES.replace("/", "")}),
    "devices of CUDA that are none": Case("", nothing, ("doctor",), env={"CUDA_VISIBLE_DEVICES": "x,y"}),
    "a locale that is C": Case("", rows(EMOJI), DATA, env={"LC_ALL": "C", "PYTHONUTF8": "0"}),
}
BAD_STREAMS = {
    "rows to a device that is full": Case("", rows(GOOD), DATA, stdout="/dev/full"),
    "JSON to a device that is full": Case("", rows(GOOD), (*DATA, "--json"), stdout="/dev/full"),
    "help to a device that is full": Case("", nothing, ("sft", "--help"), stdout="/dev/full"),
    "a chat to a device that is full": Case(
        "", nothing, (*CHAT, "--max-new-tokens", "2"), stdin="hi\n", stdout="/dev/full"
    ),
    "a bad row without standard error": Case(
        "", rows("{"), (*SFT[:3], "--data", "d.jsonl", "--out", "o"), closed=("stderr",)
    ),
    "a bad row in ASCII": Case(
        "", rows('{"日本": 1}'), (*SFT[:3], "--data", "d.jsonl", "--out", "o"), encoding="ascii"
    ),
    "a bad flag without standard error": Case("", nothing, ("sft", "--nö"), closed=("stderr",)),
}


TABLE = [
    *[Case(f"output: {name}", make, argv, outputs=("o", "run/run.lock")) for name, (make, argv) in OUTPUTS.items()],
    Case("output: a finished run", nothing, (*TRAIN, "--steps", "1", "--out", "run"), outputs=("run/run.lock",)),
    *[Case(f"output: {name}", make, argv, ends="done") for name, (make, argv) in STREAMED.items()],
    *[Case(f"path: {name}", make, argv) for name, (make, argv) in PATHS.items()],
    *[Case(f"path: {name}", make, argv, ends="either") for name, (make, argv) in NAMES.items()],
    *[replace(case, name=f"streams: {name}", ends="either") for name, case in STREAMS.items()],
    *[replace(case, name=f"streams: {name}") for name, case in BAD_STREAMS.items()],
]
CASES = [replace(case, made=True) for case in TABLE]
