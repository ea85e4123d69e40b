"""No message gives advice that fails: what a message advises is done here, and works.

A message is known by its file and a few of its words, so that lines may move. The advice of a command line stands in
`COMMANDS`, of rows in `ROWS`, of library functions in tests under `@follows`; `ELSEWHERE` names tests of other files
that follow one, `NOT_FOLLOWED` the rest, with the reason. A scan of the package finds every text that advises, and the
last tests fail on one that is in none of these, and on a flag, command or function that is named and is not there.
"""

import ast
import importlib
import importlib.util
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fourbit
from fourbit import LoRAConfig, SFTConfig, SFTTrainer
from fourbit.cli import train as training
from fourbit.cli.main import COMMANDS as ALL_COMMANDS
from fourbit.cli.main import as_flags, explain, main
from fourbit.cli.parse import flag_of, options_of
from fourbit.data import read as reading
from fourbit.data.encode import Dataset, load
from fourbit.data.forms import WANTED
from fourbit.data.order import split_validation
from fourbit.errors import FourbitError, InputError
from fourbit.models.load import load_tokenizer
from fourbit.synonyms import SYNONYMS
from fourbit.trainer import metrics

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "cli", "data", "kernels", "lora", "models", "optim", "text", "trainer", "trainer/losses")
FOLLOWED: list[tuple[str, str]] = []  # file, words: by the tests below


class Reached(Exception):
    """A training got as far as its model: what it was refused for lies behind it."""


def follows(*messages: tuple[str, str]) -> Callable[[Any], Any]:
    """Marks a test that follows the advice of these messages."""
    FOLLOWED.extend(messages)
    return lambda test: test


def words_of(said: str) -> Any:
    """Expects an error that says these words."""
    return pytest.raises((FourbitError, ValueError, RuntimeError), match=re.escape(said))


# Commands.

PAIRS = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x"} for w in ("ab", "c", "def", "gh")]
SFT, DPO = "sft --model m --data rows.jsonl --steps 1", "dpo --model m --data pairs.jsonl --steps 1"
DISTILL = "distill --model m --data rows.jsonl --steps 1 --out o"
GENERATE = "generate --model m --data rows.jsonl --max-new-tokens 1"
EVAL = "eval --model m --data rows.jsonl --max-new-tokens 1"


class Case(NamedTuple):
    """The command `wrong`, which ends with the words of a message of `file`; each command of `right` follows its
    advice. `$ ...` in front is a line of a shell, `;` parts what is done one after the other."""

    file: str
    words: str
    wrong: str
    right: tuple[str, ...]


def case(file: str, words: str, wrong: str, *right: str) -> Case:
    FOLLOWED.append((file, words))
    return Case(file, words, wrong, right)


COMMANDS = [
    case("outputs.py", "overwrite=True replaces it, resume=True goes on after its rows, or give another name",
         f"{GENERATE} --out a; {GENERATE} --out a", f"{GENERATE} --out a --overwrite",
         f"{GENERATE} --out a --resume", f"{GENERATE} --out b"),
    case("outputs.py", "overwrite=True replaces it, or give another name",
         f"$ echo 1 > a; {GENERATE} --out a --resume", f"{GENERATE} --out a --overwrite", f"{GENERATE} --out b"),
    case("outputs.py", "overwrite=True begins anew and resume=True goes on: give one of them",
         f"{GENERATE} --out a --overwrite --resume", f"{GENERATE} --out a --overwrite", f"{GENERATE} --out a --resume"),
    case("outputs.py", "which keeps no rows: leave out {}, or name a file", f"{GENERATE} --out - --resume",
         f"{GENERATE} --out -", f"{GENERATE} --out b --resume"),
    case("outputs.py", "which is read: give another place", f"{SFT} --out m", f"{SFT} --out o"),
    case("outputs.py", " is read, as ", f"{GENERATE} --out rows.jsonl --overwrite", f"{GENERATE} --out b"),
    case("outputs.py", "choose another out", f"{SFT} --out /proc/run", f"{SFT} --out o"),
    case("outputs.py", "give another out", f"$ echo 1 > f; {SFT} --out f", f"{SFT} --out o"),
    case("outputs.py", "give an empty or a new one", f"{SFT} --out other", f"{SFT} --out o"),
    case("outputs.py", "go on with resume=\"auto\", or choose another out", f"{SFT} --out run",
         f"{SFT} --out run --rank 2 --resume auto", f"{SFT} --out o"),
    case("outputs.py", "no checkpoint to go on from: choose another out",
         f"$ rm -r run/checkpoints; {SFT} --out run", f"{SFT} --out o"),
    case("cli/data.py", "leave them out with --on-bad-row skip", "data --model m bad.jsonl",
         "data --model m bad.jsonl --on-bad-row skip", "data --model m rows.jsonl"),
    case("cli/distill.py", "give another teacher, teacher_adapter, or sft_weight", f"{DISTILL} --teacher m",
         f"{DISTILL} --teacher other", f"{DISTILL} --teacher m --teacher-adapter run",
         f"{DISTILL} --teacher m --sft-weight 0.5"),
    case("cli/eval.py", "leave one of them out", f"{EVAL} --match none --answers a",
         f"{EVAL} --match none", f"{EVAL} --answers a"),
    case("cli/eval.py", "give answers, or leave it out", f"{EVAL} --resume", EVAL),
    case("cli/eval.py", "leave --no-base out", f"{EVAL} --no-base", EVAL),
    case("cli/eval.py", "give a file, or no-base", f"{EVAL} --adapter run --answers -",
         f"{EVAL} --adapter run --answers a", f"{EVAL} --adapter run --answers - --no-base"),
    case("cli/options.py", "leave json out", f"{EVAL} --answers - --json", f"{EVAL} --answers -",
         f"{EVAL} --answers a --json"),
    case("cli/options.py", "leave json out", f"{GENERATE} --out - --json",
         f"{GENERATE} --out -", f"{GENERATE} --out a --json"),
    case("cli/plan.py", "leave out lengths, or data", "plan --model m --lengths 9 --data rows.jsonl",
         "plan --model m --lengths 9", "plan --model m --data rows.jsonl"),
    case("cli/sft.py", "share: take quant none", f"{SFT} --target q_proj --start pissa --sweep rank=2,4 --out o",
         f"{SFT} --target q_proj --start pissa --sweep rank=2,4 --out o --quant none"),
    case("data/forms.py", "mend them", "generate --model m --data bad.jsonl --out a", f"{GENERATE} --out a"),
    case("cli/load.py", "give a Hugging Face folder or a .gguf file", "data rows.jsonl --model nope",
         "data rows.jsonl --model m"),
    case("cli/load.py", "fourbit sft writes one (--out)", f"{EVAL} --match none --adapter nope",
         f"{EVAL} --match none --adapter run"),
    case("models/generate.py", "give a temperature", f"{GENERATE} --out a --top-k 5",
         f"{GENERATE} --out a --top-k 5 --temperature 1"),
    case("cli/parse.py", "needs {}; see fourbit {} --help", "generate", "generate --help"),
    case("cli/parse.py", "; see fourbit {} --help", "generate --qqqqqqqq 1", "generate --help"),
    case("cli/parse.py", "needs a value; see fourbit", "generate --out", "generate --help"),
    case("cli/parse.py", "and --no-...", f"{EVAL} --match none --base=1 --adapter run",
         f"{EVAL} --match none --base --adapter run", f"{EVAL} --match none --no-base --adapter run"),
    case("synonyms.py", "; did you mean {}?", f"{SFT} --out o --rnak 2", f"{SFT} --out o --rank 2"),
    case("cli/train.py", "--val must be a file, or a share", f"{SFT} --out o --val 200%",
         f"{SFT} --out o --val val.jsonl", f"{SFT} --out o --val 50%"),
    case("cli/train.py", "a share needs a percent sign", f"{SFT} --out o --val 5", f"{SFT} --out o --val 5%"),
    case("cli/train.py", "or leave out full", f"{SFT} --out o --full --rank 2", f"{SFT} --out o --full",
         f"{SFT} --out o --rank 2"),
    case("cli/train.py", "use quant none", f"{SFT} --out o --full --quant nf4", f"{SFT} --out o --full --quant none"),
    case("cli/train.py", "brings its own", f"{SFT} --out o --adapter run --rank 2", f"{SFT} --out o --adapter run"),
    case("cli/train.py", "use dtype bfloat16 or float32", f"{SFT} --out o --dtype float16",
         f"{SFT} --out o --dtype bfloat16", f"{SFT} --out o --dtype float32"),
    case("cli/config_file.py", "name fewer files (cat joins those of rows), or by shorter paths",
         f"{SFT} --out o" + f" --data {'./' * 100}rows.jsonl" * 320,
         f"$ cat $(yes rows.jsonl | head -n 320) > a.jsonl; {SFT.replace('rows', 'a')} --out o",
         f"{SFT} --out o" + " --data rows.jsonl" * 320),
    case("trainer/config.py", "needs validation rows: give val, say 5%", f"{SFT} --out o --eval-every 1",
         f"{SFT} --out o --eval-every 1 --val 5%"),
    case("data/forms.py", "so many that the rest is not read; mend them",
         "$ yes '{\"x\": 1}' | head -n 20002 > a.jsonl; data --model m a.jsonl",
         "$ head -n 30000 rows.jsonl > a.jsonl; data --model m a.jsonl"),
    case("data/read.py", "name the data file in it", "$ mkdir d; data --model m d", "data --model m rows.jsonl"),
    case("data/read.py", "write the rows to a file first", "$ mkfifo p.jsonl; data --model m p.jsonl",
         "$ (cat rows.jsonl > p.jsonl &) ; cat p.jsonl > a.jsonl; data --model m a.jsonl"),
    case("data/read.py", ": use one of {}.", "$ cp rows.jsonl a.txt; data --model m a.txt",
         "$ cp rows.jsonl a.jsonl; data --model m a.jsonl", "$ cp rows.jsonl a.json; data --model m a.json"),
    case("data/read.py", "expected one JSON object a line", "$ echo > a.jsonl; data --model m "
         "a.jsonl", "data --model m rows.jsonl"),
    case("data/read.py", "(iconv -f UTF-16 -t UTF-8 does it)",
         "$ iconv -f UTF-8 -t UTF-16 rows.jsonl > a.jsonl; data --model m a.jsonl",
         "$ iconv -f UTF-16 -t UTF-8 a.jsonl > b.jsonl; data --model m b.jsonl"),
    case("data/read.py", "iconv -f LATIN1 -t UTF-8", "$ printf '{\"text\": \"caf\\351\"}\\n' > a.jsonl; data --model m "
         "a.jsonl", "$ iconv -f LATIN1 -t UTF-8 a.jsonl > b.jsonl; data --model m b.jsonl"),
    case("data/read.py", "unpack it to JSON Lines", "$ gzip -c rows.jsonl > a.jsonl; data --model m a.jsonl",
         "$ gunzip -c < a.jsonl > b.jsonl; data --model m b.jsonl"),
    case("data/template.py", "name one of those or a .jinja file", "data rows.jsonl --model m --template nope",
         "data rows.jsonl --model m --template chatml", "data rows.jsonl --model m --template mine.jinja"),
    case("data/truncate.py", "raise it or skip such rows", "data rows.jsonl --model m --max-length 30",
         "data rows.jsonl --model m --max-length 80", "data rows.jsonl --model m --max-length 30 --on-bad-row skip"),
    case("data/encode.py", "leave them out with on_bad_row skip", f"{SFT.replace('rows', 'bad')} --out o",
         f"{SFT.replace('rows', 'bad')} --out o --on-bad-row skip", f"{SFT} --out o"),
    case("trainer/config.py", "give at most that, or auto", f"{SFT} --out o --batch-size 2 --micro-batch 3",
         f"{SFT} --out o --batch-size 2 --micro-batch 2", f"{SFT} --out o --batch-size 2 --micro-batch auto"),
    case("trainer/config.py", "leave out what is said of it", f"{DISTILL} --teacher other --jsd-beta 0.4",
         f"{DISTILL} --teacher other", f"{DISTILL} --teacher other --jsd-beta 0.4 --divergence jsd"),
    case("trainer/config.py", "reference has no use with", f"{DPO} --out o --loss orpo --reference base",
         f"{DPO} --out o --loss orpo"),
    case("trainer/config.py", "Give validation rows of their own, or none",
         f"{SFT.replace('rows', 'same')} --out o --val 50%", f"{SFT.replace('rows', 'same')} --out o --val val.jsonl",
         f"{SFT.replace('rows', 'same')} --out o"),
    case("trainer/losses/objective.py", "belongs to divergence alpha", f"{DPO} --out o --divergence-alpha 0.5",
         f"{DPO} --out o", f"{DPO} --out o --divergence-alpha 0.5 --divergence alpha"),
    case("trainer/losses/objective.py", "which judges single answers: leave it out",
         f"{DPO} --out o --loss kto --ld-alpha 0.5", f"{DPO.replace('pairs', 'judged')} --out o --loss kto"),
    case("trainer/losses/objective.py", "leave it out, or choose among", f"{DPO} --out o --loss ipo --gamma 1",
         f"{DPO} --out o --loss ipo", f"{DPO} --out o --loss simpo --gamma 1"),
    case("trainer/losses/objective.py", "give it once, with the weight", f"{DPO} --out o --loss ipo --loss ipo=2",
         f"{DPO} --out o --loss ipo=2"),
    case("trainer/losses/objective.py", "choose one kind", f"{DPO} --out o --loss ipo --loss kto",
         f"{DPO} --out o --loss ipo", f"{DPO.replace('pairs', 'judged')} --out o --loss kto"),
    case("trainer/losses/objective.py", "train with sft (SFTTrainer), or add a preference loss",
         f"{DPO} --out o --loss sft", f"{SFT} --out o", f"{DPO} --out o --loss sft --loss sigmoid"),
    case("trainer/losses/objective.py", "; did you mean {}?", f"{DPO} --out o --loss hinges",
         f"{DPO} --out o --loss hinge"),
    case("trainer/evaluate.py", "mend the row, or take another match", f"{EVAL} --match json",
         f"{EVAL} --match contains"),
]  # fmt: skip


@pytest.fixture(scope="module")
def kept(tiny_folder: Path, rows: Path, val_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and rows: good, bad, pairs, judged."""
    place = tmp_path_factory.mktemp("advice")
    lines = {
        "pairs.jsonl": PAIRS,
        "same.jsonl": 2 * [{"prompt": "a", "completion": "a"}],
        "judged.jsonl": [{"prompt": "say", "completion": "a" * n, "label": n % 2 == 0} for n in range(1, 5)],
    }
    for name, found in lines.items():
        (place / name).write_text("\n".join(map(json.dumps, found)))
    (place / "rows.jsonl").write_bytes(rows.read_bytes())
    (place / "val.jsonl").write_bytes(val_rows.read_bytes())
    (place / "bad.jsonl").write_text(rows.read_text() + '{"x": 1}\n')
    (place / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    shutil.copytree(tiny_folder, place / "m")
    shutil.copytree(tiny_folder, place / "other")
    tensors = load_file(place / "other/model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, place / "other/model.safetensors")
    flags = ["--model", "m", "--data", "rows.jsonl", "--steps", "1", "--rank", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["sft", *flags, "--out", "run"]) == 0
    return place


@pytest.fixture
def here(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with all that `kept` holds."""
    for entry in kept.iterdir():
        if entry.name == "run":
            shutil.copytree(entry, tmp_path / "run", copy_function=shutil.copy)
        else:
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def done(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Does lines of a shell and commands of fourbit, parted by `;`, and gives what the last one said, "" if it did
    what it was asked. A training has done it once its model would be read."""

    def stop(*_: Any) -> None:
        raise Reached

    def do(line: str) -> str:
        monkeypatch.setattr(training, "load_weights", stop)
        said = ""
        for part in map(str.strip, line.split(";")):
            if part.startswith(("$", "cat")):
                subprocess.run(["bash", "-c", part.lstrip("$")], check=True, timeout=60)
                continue
            capsys.readouterr()
            code = main(shlex.split(part))
            said = capsys.readouterr().err
            said = "" if code == 0 or "(Reached" in said else said
        return said

    return do


@pytest.mark.parametrize("one", COMMANDS, ids=[f"{each.file}: {each.words}" for each in COMMANDS])
def test_the_advice_of_a_command_works(one: Case, done: Callable[[str], str]) -> None:
    said = done(one.wrong)
    for part in one.words.split("{}"):
        assert as_flags(part) in said
    for line in one.right:
        assert done(line) == "", line


@follows(("cli/chat.py", "start it with one, even empty"))
def test_an_empty_input_is_one(done: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "start it with one" in done("chat --model m")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert done("chat --model m") == ""


@follows(("cli/chat.py", "name another one with --template"))
def test_another_template_says_what_one_leaves_out(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("users.jinja").write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    for template, told in (("users.jinja", True), ("chatml", False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert main(shlex.split(f"chat --model m --max-new-tokens 1 --system Briefly. --template {template}")) == 0
        assert ("name another one with --template" in capsys.readouterr().err) == told


@follows(("cli/train.py", "fourbit chat --model {}"), ("cli/train.py", "fourbit chat --model {} --adapter {}"))
@pytest.mark.parametrize("flags", ["", "--full", "--template mine.jinja"])
def test_what_a_training_says_to_try_runs(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    assert main(shlex.split(f"{SFT} --out o {flags}")) == 0
    (told,) = re.findall(r"try it +fourbit (.*)", capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main([*shlex.split(told), "--max-new-tokens", "1"]) == 0


# Rows.

ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
ROWS: list[tuple[str, str, Any, dict[str, Any], list[dict[str, Any]]]] = [
    ("data/dialects.py", "add the prompt to the row", "pairs", {"chosen": "abc", "rejected": "xyz"},
     [{"prompt": "say", "chosen": "abc", "rejected": "xyz"}]),
    ("data/forms.py", "leave it out, or mend the row", "pairs",
     {"prompt": "no", "chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "no"}]},
     [{"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "no"}]},
      {"prompt": "hi", "chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "no"}]}]),
    ("data/forms.py", "is not {}, keys are {}{}: use {}", "sft", {"x": 1}, [{"messages": [ASK, SAY]},
                                                                            {"prompt": "a", "completion": "b"}]),
    ("data/forms.py", "is not {}, keys are {}{}: use {}", "pairs", {"x": 1},
     [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    ("data/forms.py", "is not {}, keys are {}{}: use {}", "judged", {"x": 1},
     [{"prompt": "a", "completion": "b", "label": True}]),
    ("data/keys.py", "keep one of the two forms", "sft", {"messages": [ASK, SAY], "completion": "b"},
     [{"messages": [ASK, SAY]}, {"prompt": "a", "completion": "b"}]),
    ("data/messages.py", "has both `value` and `content`: keep one of them", "sft",
     {"messages": [ASK, {"from": "gpt", "value": "a", "content": "b"}]},
     [{"messages": [ASK, {"from": "gpt", "value": "a"}]}, {"messages": [ASK, {"from": "gpt", "content": "b"}]}]),
    ("data/messages.py", ": did you mean {}?", "sft", {"messages": [ASK, {**SAY, "role": "Assistant "}]},
     [{"messages": [ASK, SAY]}]),
    ("data/forms.py", "which is given from elsewhere: take it out", "sft",
     {"messages": [ASK, SAY], "chat_template_kwargs": {"messages": 1}},
     [{"messages": [ASK, SAY], "chat_template_kwargs": {}}]),
    ("data/read.py", "use null or leave the field out", "sft", {"messages": [ASK, {**SAY, "weight": math.nan}]},
     [{"messages": [ASK, {**SAY, "weight": None}]}, {"messages": [ASK, SAY]}]),
]  # fmt: skip
FOLLOWED += [(file, words) for file, words, *_ in ROWS]


@pytest.fixture(scope="module")
def tokenizer(kept: Path) -> Any:
    return load_tokenizer(kept / "m")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("file, said, kind, bad, good", ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_the_advice_for_a_row_works(
    file: str, said: str, kind: Any, bad: Any, good: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load([written(tmp_path / "a.jsonl", bad)], tokenizer, kind)
    assert all(part in str(caught.value) for part in said.split("{}"))
    assert WANTED[kind][2] in str(caught.value) or "use {}" not in said
    for row in good:
        assert len(load([written(tmp_path / "a.jsonl", row)], tokenizer, kind)) == 1


@follows(("data/encode.py", "mend them"))
def test_leaving_out_is_advised_where_a_row_is_left(tokenizer: Any, tmp_path: Path) -> None:
    good = {"messages": [ASK, SAY]}
    with words_of("mend them, or leave them out with on_bad_row skip"):
        load([written(tmp_path / "a.jsonl", {"x": 1}, good)], tokenizer, "sft")
    assert len(load([tmp_path / "a.jsonl"], tokenizer, "sft", on_bad_row="skip")) == 1
    for how in ("error", "skip"):
        with pytest.raises(InputError, match="mend them:"):
            load([written(tmp_path / "a.jsonl", {"x": 1})], tokenizer, "sft", on_bad_row=how)


@follows(
    ("data/forms.py", "for padding at the end: take padding out"),
    ("data/read.py", "give one dict a row; a generator gives its rows but once"),
    ("data/read.py", "leave the key out, or such rows"),
    ("data/read.py", "give a list of rows, or one of its parts"),
    ("text/tokenizer_folder.py", "take AutoTokenizer's, or fourbit.load's for the folder"),
)
def test_rows_from_python_are_mended_as_advised(tokenizer: Any, kept: Path) -> None:
    from transformers import AutoTokenizer

    row, ready = {"messages": [ASK, SAY]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    for words, wrong, right in (
        ("take padding out", [ready | {"attention_mask": [0, 1, 1]}], [{k: ids[1:] for k, ids in ready.items()}]),
        ("give one dict a row", iter(()), iter([row])),
        ("leave the key out", [row | {"when": object()}], [row]),
        ("or such rows", [row, row | {"when": object()}], [row]),
        ("give a list of rows", row, [row]),
        ("or one of its parts", {"train": [row]}, {"train": [row]}["train"]),
    ):
        with words_of(words):
            load(wrong, tokenizer)
        assert len(load(right, tokenizer)) == 1
    with words_of("take AutoTokenizer's"):
        load([row], kept / "m")
    for taken in (AutoTokenizer.from_pretrained(kept / "m"), fourbit.load(kept / "m")[1]):
        assert len(load([row], taken)) == 1


@follows(("data/order.py", "needs {}% at least; or give validation rows of their own"))
def test_the_least_share_that_is_named_is_enough(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{**ASK, "content": str(i)}, SAY]} for i in range(100)]
    whole = load([written(tmp_path / "a.jsonl", *rows)], tokenizer, "sft")
    for number in range(2, 101):
        some = Dataset("sft", whole.examples[:number], whole.samples[:number], template=whole.template)
        for share in (1e-6, 1 - 1e-6):
            with words_of("is less than a row on one side") as caught:
                split_validation(some, share)
            least = float(re.findall(r"needs ([\d.]+)%", str(caught.value))[0]) / 100
            assert all(map(len, split_validation(some, min(least, 0.5))))


@follows(("data/read.py", "at most {} are read whole: write one object a line"))
def test_a_long_array_is_read_as_lines(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": [ASK, SAY]}] * 5
    (tmp_path / "a.json").write_text(json.dumps(rows))
    monkeypatch.setattr(reading, "MAX_ARRAY_BYTES", 100)
    with words_of("write one object a line"):
        load([tmp_path / "a.json"], tokenizer, "sft")
    assert len(load([written(tmp_path / "b.json", *rows)], tokenizer, "sft")) == 5


# The library.


def loaded(place: Path, quant_type: str | None = "nf4") -> Any:
    return fourbit.load(place / "m", quant_type=quant_type)


def adapted(place: Path, **how: Any) -> Any:
    model, _ = loaded(place)
    fourbit.attach(model, LoRAConfig(**{"rank": 2} | how))
    return model


@follows(
    ("kernels/quantize4bit.py", "repair or skip it"),
    ("kernels/weight4bit.py", "give both (double quantisation) or neither"),
    ("lora/quantize.py", "skip=() takes it too"),
    ("lora/quantize.py", "untie the weight first"),
    ("lora/quantize.py", "undo that first"),
    ("lora/quantize.py", "has a forward of its own: make it nn.Linear"),
    ("lora/attach.py", "which cannot be replaced in place: wrap it"),
    ("lora/attach.py", "are read, not called: register their parameters in the module around"),
    ("lora/layer.py", "no input can be dropped: set dropout=0"),
    ("models/load.py", "and merge it or take it off (fourbit.remove_adapter) before this"),
    ("models/load.py", "is in 4 bits already, as {}: give quant_type=None"),
    ("lora/attach.py", "is complex, and adapters and their files are real: exclude it"),
    ("lora/targets.py", "name them in a list"),
    ("lora/targets.py", "make it an nn.Linear"),
    ("lora/targets.py", "For all inside it, pass the string"),
    ("lora/targets.py", "pass a list: [{}]"),
    ("lora/layer.py", "give the new one another name, take the old one off (remove_adapter), or continue"),
)
def test_layers_are_changed_as_advised(kept: Path, tmp_path: Path) -> None:
    weight = torch.full((64, 64), math.nan)
    with words_of("repair or skip it"):
        fourbit.nf4.quantize(weight)
    fourbit.nf4.quantize(weight.nan_to_num())
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight.data = weight
    fourbit.quantize_(model, skip=("0",))
    quantized = fourbit.nf4.quantize(torch.randn(64, 64), double_quant=True)
    with words_of("give both (double quantisation) or neither"):
        quantized._replace(nested_offset=None).check()
    quantized._replace(nested_offset=None, nested_absmax=None, absmax=quantized.scales).check(), quantized.check()

    head = nn.ModuleDict({"lm_head": nn.Linear(64, 64)})
    with words_of("skip=() takes it too"):
        fourbit.quantize_(head)
    fourbit.quantize_(head, skip=())
    tied = nn.ModuleDict({"a": nn.Embedding(64, 64), "b": nn.Linear(64, 64)})
    tied["b"].weight = tied["a"].weight
    with words_of("untie the weight first"):
        fourbit.quantize_(tied)
    tied["b"].weight = nn.Parameter(tied["a"].weight.detach().clone())
    fourbit.quantize_(tied)
    with words_of("pass the string '(.*\\\\.)?c\\\\..*'"):
        fourbit.quantize_(nn.ModuleDict({"b": nn.Linear(64, 64), "c": nn.Sequential(nn.Linear(64, 64))}), skip=("c",))
    fourbit.quantize_(
        nn.ModuleDict({"b": nn.Linear(64, 64), "c": nn.Sequential(nn.Linear(64, 64))}), skip=r"(.*\.)?c\..*"
    )
    parametrised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    with words_of("undo that first"):
        fourbit.quantize_(parametrised)
    nn.utils.parametrize.remove_parametrizations(parametrised[0], "weight")
    fourbit.quantize_(parametrised)

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    for kind in (Own, nn.Linear):
        with words_of("has a forward of its own: make it nn.Linear") if kind is Own else nullcontext():
            fourbit.quantize_(nn.Sequential(kind(64, 64)))
    with words_of("wrap it"):
        fourbit.attach(nn.Linear(64, 64), LoRAConfig(rank=2))
    fourbit.attach(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(rank=2))
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    for dropout in (0.1, 0):
        fourbit.attach(attention, LoRAConfig(rank=2, dropout=dropout))
        with words_of("set dropout=0") if dropout else nullcontext():
            attention[0](*3 * [torch.ones(2, 8)])
        fourbit.remove_adapter(attention, "default")
    mixed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.complex64))
    with words_of("is complex, and adapters and their files are real: exclude it"):
        fourbit.attach(mixed, LoRAConfig(rank=2))
    fourbit.attach(mixed, LoRAConfig(rank=2, exclude=["1"]))
    listed = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Module()})
    listed["b"].scales = nn.ParameterList([nn.Parameter(torch.ones(8))])
    with words_of("register their parameters in the module around"):
        fourbit.attach(listed, LoRAConfig(rank=2, modules_to_save=["b"]))
    listed["b"].first, listed["b"].scales = listed["b"].scales[0], None
    fourbit.attach(listed, LoRAConfig(rank=2, modules_to_save=["b"]))
    with words_of("finds no such layer in this model; name them in a list"):
        fourbit.attach(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(rank=2, target="attn"))
    fourbit.attach(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(rank=2, target=["0"]))
    with words_of("pass a list: ['q_proj']"):
        adapted(kept, target="q_proj")
    model = adapted(kept, target=["q_proj"])
    with words_of("already carries an adapter 'default'"):
        fourbit.attach(model, LoRAConfig(rank=2))
    fourbit.attach(model, LoRAConfig(rank=2), name="second")
    fourbit.remove_adapter(model, "default")
    fourbit.attach(model, LoRAConfig(rank=2))
    with words_of("save or load it by itself (save_adapter, load_adapter), and merge it or take it off"):
        fourbit.save_model(model, tmp_path / "whole")
    for name in ("second", "default"):
        fourbit.save_adapter(model, tmp_path / name, name=name)
        fourbit.remove_adapter(model, name)
    fourbit.save_model(model, tmp_path / "whole")
    with words_of("give quant_type=None"):
        fourbit.models.load.load_decoder(tmp_path / "whole", quant_type="fp4")
    fourbit.models.load.load_decoder(tmp_path / "whole", quant_type=None)


@follows(
    ("lora/peft_config.py", "Write it with layer names, or with fewer choices"),
    ("lora/peft_config.py", "Merge the adapter with PEFT, or train one without this feature"),
    ("lora/peft_config.py", "save_pretrained with path_initial_model_for_weight_conversion"),
    ("lora/peft_files.py", "PEFT puts an adapter that has a name into a subfolder: try"),
    ("lora/peft_files.py", "save_pretrained(..., safe_serialization=True)"),
    ("lora/peft_files.py", "Merge the adapter into its own base with PEFT first"),
    ("lora/peft_files.py", "load it into a fresh model instead"),
    ("files.py", "is not followed: copy the file itself there"),
)
def test_adapter_files_are_mended_as_advised(kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    fourbit.save_adapter(adapted(kept), folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    plain, tensors = json.loads(config.read_text()), load_file(weights)

    def load_with(state: dict[str, Any] | None = None, into: Any = None, **changes: Any) -> None:
        config.write_text(json.dumps(plain | changes))
        save_file(state or tensors, weights)
        fourbit.load_adapter(loaded(kept)[0] if into is None else into, folder)

    with words_of("Write it with layer names, or with fewer choices"):
        load_with(rank_pattern={"(.*q|.*q)+_proj": 2})
    load_with(rank_pattern={"q_proj": 2})
    with words_of("Merge the adapter with PEFT, or train one without this feature"):
        load_with(lora_bias=True)
    with words_of("path_initial_model_for_weight_conversion"):
        load_with(init_lora_weights="pissa")
    peft = importlib.util.find_spec("peft")
    theirs = Path(str(peft and peft.origin)).with_name("peft_model.py").read_text()  # importing it takes seconds
    assert "path_initial_model_for_weight_conversion: Optional" in theirs and "safe_serialization: bool" in theirs
    load_with()
    head = {"base_model.model.lm_head.weight": torch.zeros(259, 32)}
    with words_of("Merge the adapter into its own base with PEFT first"):
        load_with(tensors | head)
    with words_of("load it into a fresh model instead"):
        load_with(into=adapted(kept, alpha=7))
    load_with(into=loaded(kept)[0])
    shutil.copytree(folder, tmp_path / "b/default")
    with words_of("into a subfolder: try default"):
        fourbit.load_adapter(loaded(kept)[0], tmp_path / "b")
    fourbit.load_adapter(loaded(kept)[0], tmp_path / "b/default")
    weights.rename(tmp_path / "far")
    weights.symlink_to(tmp_path / "far")
    with words_of("copy the file itself there"):
        fourbit.load_adapter(loaded(kept)[0], folder)
    weights.unlink()
    (folder / "adapter_model.bin").touch()
    with words_of("save it again with save_pretrained(..., safe_serialization=True)"):
        fourbit.load_adapter(loaded(kept)[0], folder)
    shutil.copy(tmp_path / "far", weights)
    fourbit.load_adapter(loaded(kept)[0], folder)


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A model of one's own to break."""
    return Path(shutil.copytree(kept / "m", tmp_path / "mine"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@follows(
    ("files.py", "is not followed: copy the file itself there"),
    ("models/hf.py", "convert them with transformers: from_pretrained(folder), then save_pretrained(another_folder)"),
    ("models/load.py", "Give a folder of safetensors or a .gguf file"),
    ("models/load.py", "Load the model in bfloat16 or float32 (dtype=...)"),
    ("models/load.py", "Use cpu."),
    ("text/tokenizer.py", "mend the text"),
    ("text/tokenizer.py", "are encoded at once. Split it"),
)
def test_model_folders_are_mended_as_advised(folder: Path, tmp_path: Path) -> None:
    tokenizer = fourbit.load(folder)[1]
    weights, far = folder / "model.safetensors", tmp_path / "far.safetensors"
    weights.rename(far)
    weights.symlink_to(far)
    with words_of("copy the file itself there"):
        fourbit.load(folder)
    weights.unlink()
    shutil.copy(far, weights)
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, weights, metadata={"format": "pt"})
    with words_of("Load the model in bfloat16 or float32 (dtype=...)"):
        fourbit.load(folder, dtype=torch.float16)
    fourbit.load(folder, dtype=torch.bfloat16), fourbit.load(folder, dtype=torch.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double() * 1e200
    save_file(tensors, weights, metadata={"format": "pt"})
    with words_of("Only float64 holds it, in Python"):
        fourbit.load(folder)
    fourbit.load(folder, dtype=torch.float64)
    if not torch.cuda.is_available():
        with words_of("Use cpu"):
            fourbit.load(folder, device="cuda")

    import transformers

    shutil.copy(far, weights)
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with words_of("Give a folder of safetensors"):
        fourbit.models.load.load_decoder(folder / "pytorch_model.bin")
    with words_of("convert them with transformers"):
        fourbit.load(folder)
    change(folder / "config.json", architectures=["LlamaForCausalLM"])
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "another")
    fourbit.models.load.load_decoder(tmp_path / "another")

    with words_of("mend the text"):
        tokenizer.encode("\ud800")
    with words_of("Split it"):
        tokenizer.encode("a" * (5 << 20))
    tokenizer.encode("a" * (5 << 9))


def without_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    vocabulary = json.loads(file.read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="!", bos_token="!")
    file.unlink()


def under_another_id(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "tokenizer.json", added_tokens=[tokens[0] | {"id": 3}, *tokens[1:]])


START = {"content": "<|im_start|>", "special": True}


@follows(
    ("text/special_tokens.py", "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"),
)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda folder: change(folder / "tokenizer_config.json", bos_token="<nope>"),
        lambda folder: change(folder / "tokenizer_config.json", extra_special_tokens=["<nope>"]),
        lambda folder: change(folder / "tokenizer_config.json", added_tokens_decoder={"5": START}),
        under_another_id,
        without_vocabulary,
    ],
)
def test_transformers_mends_a_tokenizer(folder: Path, wrong: Callable[[Path], Any]) -> None:
    from transformers import AutoTokenizer

    wrong(folder)
    with words_of("AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"):
        load_tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    load_tokenizer(folder)


def test_what_transformers_cannot_mend_is_to_be_got_again(folder: Path) -> None:
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"found none\. Get it from where the model is from"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match="instantiate"):
        AutoTokenizer.from_pretrained(folder)


@follows(
    ("models/finite.py", "load the model in bfloat16 or float32 (dtype=...)"),
    ("models/finite.py", "see whether the model alone works (without adapter)"),
)
def test_overflow_is_mended_as_advised(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 1e3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with words_of("load the model in bfloat16 or float32 (dtype=...)"):
        fourbit.generate(fourbit.load(folder, dtype=torch.float16)[0], [[1, 2]], max_new_tokens=1)
    for dtype in (torch.bfloat16, torch.float32):
        model = fourbit.load(folder, dtype=dtype)[0]
        fourbit.generate(model, [[1, 2]], max_new_tokens=1)
    fourbit.attach(model, LoRAConfig(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(math.nan)
    with words_of("see whether the model alone works"):
        fourbit.generate(model, [[1, 2]], max_new_tokens=1)
    with fourbit.adapters_off(model):
        fourbit.generate(model, [[1, 2]], max_new_tokens=1)


@follows(
    ("optim/optimizer.py", "make a new optimizer (add_param_group adds to this one)"),
    ("optim/optimizer.py", "was removed from optimizer.state: make a new optimizer"),
    ("optim/optimizer.py", "call optimizer.load_state_dict(optimizer.state_dict())"),
    ("optim/state_files.py", "make one with the `bits` and `min_8bit_size` that it was saved with"),
)
def test_optimizers_are_mended_as_advised() -> None:
    def made(**how: Any) -> tuple[nn.Linear, Any]:
        layer = nn.Linear(64, 64)
        optimizer = fourbit.optim.AdamW(layer.parameters(), lr=1e-3, **how)
        stepped(layer, optimizer)
        return layer, optimizer

    def stepped(layer: nn.Linear, optimizer: Any) -> None:
        layer(torch.ones(1, 64, dtype=layer.weight.dtype)).sum().backward()
        optimizer.step()

    layer, optimizer = made()
    optimizer.param_groups[0]["params"].pop()
    with words_of("make a new optimizer"):
        stepped(layer, optimizer)
    stepped(layer, fourbit.optim.AdamW(layer.parameters(), lr=1e-3))
    layer, optimizer = made()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.step()
    optimizer.state.clear()
    with words_of("was removed from optimizer.state"):
        stepped(layer, optimizer)
    layer, optimizer = made()
    layer.bfloat16()
    layer.zero_grad()
    with words_of("call optimizer.load_state_dict(optimizer.state_dict())"):
        stepped(layer, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    saved = made(bits=8, min_8bit_size=1)[1].state_dict()
    with words_of("make one with the `bits` and `min_8bit_size`"):
        made()[1].load_state_dict(saved)
    made(bits=8, min_8bit_size=1)[1].load_state_dict(saved)


@follows(
    ("trainer/run.py", "call fourbit.attach first, or train all weights (full)"),
    ("trainer/run.py", "attach or load the one to train under that name"),
    ("trainer/run.py", "attach or load it after all others, or with trainable=True"),
    ("trainer/run.py", "call fourbit.use(model, '{}')"),
    ("trainer/sft.py", "load it with quant_type=None"),
    ("trainer/reference.py", "or take another loss"),
    ("trainer/distill.py", "student's base, so it cannot be the teacher: give another"),
    ("trainer/distill.py", "so it cannot be the teacher: give another"),
    ("trainer/distill.py", "give None for its base, or the name of an adapter on it"),
    ("trainer/checkpoint.py", "resume must be auto or a checkpoint folder such as"),
)
def test_trainers_take_what_they_advise(here: Path, tokenizer: Any) -> None:
    def sft(model: Any, **how: Any) -> Any:
        return SFTTrainer(model, tokenizer, train="rows.jsonl", config=SFTConfig(**{"out": "o", "steps": 1} | how))

    def dpo(model: Any, **how: Any) -> Any:
        config = fourbit.DPOConfig(out="o", steps=1, **how)
        return fourbit.DPOTrainer(model, tokenizer, train="pairs.jsonl", config=config)

    def distil(model: Any, teacher: Any, **how: Any) -> Any:
        config = fourbit.DistillConfig(out="o", steps=1, **how)
        return fourbit.DistillTrainer(model, tokenizer, teacher=teacher, train="rows.jsonl", config=config)

    with words_of("call fourbit.attach first, or train all weights (full)"):
        sft(loaded(here)[0])
    sft(adapted(here)), sft(loaded(here, None)[0], full=True)
    with words_of("load it with quant_type=None"):
        sft(loaded(here)[0], full=True)
    model = loaded(here)[0]
    fourbit.attach(model, LoRAConfig(rank=2), name="second")
    with words_of("attach or load the one to train under that name"):
        sft(model)
    fourbit.attach(model, LoRAConfig(rank=2))
    sft(model)
    fourbit.use(model, "second")
    with words_of("call fourbit.use(model, 'default')"):
        sft(model)
    fourbit.use(model, "default")
    sft(model)
    fourbit.use(model, "default", "second")
    with words_of("or take another loss"):
        dpo(model)
    dpo(model, loss=("orpo",))
    fourbit.use(model, "default")
    dpo(model)
    model = loaded(here)[0]
    fourbit.load_adapter(model, "run", trainable=False)
    with words_of("attach or load it after all others, or with trainable=True"):
        sft(model)
    model = loaded(here)[0]
    fourbit.load_adapter(model, "run", trainable=True)
    sft(model)

    with words_of("student's base, so it cannot be the teacher: give another"):
        distil(loaded(here, None)[0], None, full=True)
    distil(loaded(here, None)[0], loaded(here)[0], full=True)
    with words_of("so it cannot be the teacher: give another"):
        distil(model, "default")
    with words_of("give None for its base, or the name of an adapter on it"):
        distil(model, model)
    fourbit.load_adapter(model, "run", name="teacher", trainable=False)
    distil(model, None), distil(model, "teacher")

    with words_of("resume must be auto or a checkpoint folder such as"):
        sft(adapted(here), out="run", resume="nope").train(display=None)
    with words_of('go on with resume="auto", or choose another out'):
        sft(adapted(here), out="run").train(display=None)
    first, again = adapted(here), adapted(here)
    assert sft(first, out="new").train(display=None).steps == 1
    assert sft(again, out="new", resume="auto").train(display=None).steps == 1
    assert sft(adapted(here), out="new", resume="new/checkpoints/step-000001").train(display=None).steps == 1


@follows(
    ("trainer/loop.py", "call forward_backward before optim_step"),
    ("trainer/loop.py", "attach an adapter, or call model.requires_grad_()"),
    ("trainer/loop.py", "make both as for the run that saved the state"),
    ("trainer/loop.py", "make it after the adapter is attached, from those that need a gradient, or give a function"),
)
def test_a_loop_is_mended_as_advised(tmp_path: Path) -> None:
    def run_of(model: nn.Module, **how: Any) -> fourbit.Run:
        return fourbit.Run(model, loss=lambda model, x: model(x).square().sum(1), **how)

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with words_of("attach an adapter, or call model.requires_grad_()"):
        run_of(model)
    run_of(model.requires_grad_())
    early = sgd(model.parameters())
    fourbit.attach(model, LoRAConfig(rank=2))
    with words_of("make it after the adapter is attached, from those that need a gradient, or give a function"):
        run_of(model, optimizer=early)
    run_of(model, optimizer=sgd(p for p in model.parameters() if p.requires_grad))
    run = run_of(model, optimizer=sgd)
    with words_of("call forward_backward before optim_step"):
        run.optim_step()
    run.forward_backward(torch.ones(2, 4))
    run.optim_step()
    folder = run.save_state(tmp_path / "state")
    with words_of("make both as for the run that saved the state"):
        run_of(model).load_state(folder)
    again = run_of(model, optimizer=sgd)
    again.load_state(folder)
    assert again.steps == 1


@follows(
    ("trainer/config.py", "would do nothing, as {}: leave out what is said of it"),
    ("trainer/trainer.py", "give the trainer val, rows or a share such as 0.1"),
)
def test_a_trainer_with_parts_of_ones_own_is_mended_as_advised(here: Path, tokenizer: Any) -> None:
    def sft(how: dict[str, Any], **parts: Any) -> SFTTrainer:
        config = SFTConfig(out="o", steps=1, **how)
        return SFTTrainer(adapted(here), tokenizer, train="rows.jsonl", config=config, **parts)

    with words_of("leave out what is said of it"):
        sft({"lr": 1e-3}, optimizer=torch.optim.SGD)
    sft({}, optimizer=torch.optim.SGD)
    with words_of("give the trainer val, rows or a share such as 0.1"):
        sft({}).evaluate()
    assert sft({}, val=0.1).evaluate()["loss"] and sft({}, val="val.jsonl").evaluate()["loss"]


@follows(
    ("trainer/resume.py", "Go on with what it began with, or begin a new run in another folder (out)"),
    ("trainer/resume.py", "use the same ones"),
    ("trainer/resume.py", "resume with the same data files"),
    ("trainer/metrics.py", "bytes, got {}: move it away"),
)
def test_a_run_is_gone_on_from_as_advised(here: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rows: str = "val.jsonl", rank: int = 2, out: str = "o", **how: Any) -> None:
        config = SFTConfig(out=out, steps=1, resume="auto", **how)
        SFTTrainer(adapted(here, rank=rank), tokenizer, train=rows, config=config).train(display=None)

    run()
    with words_of("resume with the same data files"):
        run("rows.jsonl")
    with words_of("Go on with what it began with, or begin a new run in another folder (out)"):
        run(rank=3)
    with words_of("use the same ones"):
        run(lr=0.3)
    with monkeypatch.context() as patch, words_of("move it away"):
        patch.setattr(metrics, "LARGEST_FILE", 10)
        run()
    Path("o/metrics.jsonl").rename("away")
    run(), run(rank=3, out="p")


# Nothing is left out.

ELSEWHERE = {  # tests of other files that follow an advice
    "tests/trainer/test_sft.py::test_a_run_whose_template_writes_the_date_goes_on_another_day": [
        ("trainer/resume.py", "read with template=ChatTemplate(..., date={}), which writes the date"),
    ],
    "tests/cli/test_sweep_command.py::test_codes_that_all_share_are_not_made_anew": [
        ("trainer/sweep.py", "(target, train_tokens): leave it out there"),
    ],
    "tests/cli/test_rl_command.py::test_what_is_refused_says_what_works": [
        ("cli/rl.py", "give a reward, such as number"),
        ("trainer/rewards.py", "no folder of a reward model (fourbit reward writes one): give one of these"),
        ("trainer/rewards.py", "give it once, with the sum of the weights"),
        ("trainer/rewards.py", "mend it"),
        ("trainer/rewards.py", "give one of them a weight"),
        ("cli/rl.py", "dropout is off where the policy that answers is trained, got {}: leave it out"),
        ("trainer/rl_config.py", "give 2 or more, or a baseline of batch or none without resample"),
        ("trainer/rl_config.py", "take k2 or k3, or kl_in reward"),
        ("trainer/rl_config.py", "which takes {} steps (rollouts_ahead): give {}"),
        ("trainer/losses/policy.py", "leaves them above 0 there: give {}, or none of them"),
    ],
    "tests/cli/test_rl_command.py::test_a_reward_model_with_codes_of_its_own_says_what_works": [
        ("trainer/rewards.py", "train it with the default start, or give a base that is not in 4 bits"),
    ],
    "tests/trainer/test_policy_trl.py::test_a_reward_that_failed_has_no_part_in_its_group": [
        ("trainer/losses/policy.py", "leave-one-out needs 2 answers a prompt or more"),
    ],
    "tests/research/test_written.py::test_a_write_between_forward_and_backward_is_seen": [
        ("models/recompute.py", "write after backward"),  # the last line of it
    ],
    "tests/cli/test_commands.py::test_generate_keeps_the_best_of_several_as_rows_to_learn_from": [
        ("cli/generate.py", "give n of 2 or more, and a reward"),
        ("cli/generate.py", "gives equal ones: give a temperature"),
        ("cli/generate.py", "with n, write to another file"),
    ],
    "tests/cli/test_export_command.py::test_4_bits_that_cannot_hold_it": [
        ("cli/export.py", "--quant nf4 packs it"),
        ("cli/export.py", "fourbit merge --into nf4 with more --residual-bits"),
    ],
    "tests/cli/test_export_command.py::test_what_is_there_stays_and_nothing_half_does": [
        ("cli/export.py", "--out NAME.gguf"),
        ("outputs.py", "{} is there already: give another place"),
    ],
    "tests/cli/test_export_command.py::test_what_peft_opens_and_vllm_may_not": [
        ("cli/export.py", "for vLLM export the model merged, --to hf"),
    ],
    "tests/cli/test_export_command.py::test_the_adapter_alone": [
        ("cli/export.py", "say which with --adapter"),
        ("cli/export.py", "llama-server -m BASE.gguf --lora {}"),
    ],
    "tests/models/test_gguf_write.py::test_what_llama_cpp_does_not_compute_is_refused_and_no_file_appears": [
        ("models/gguf_write.py", "Keep a folder: save_model"),
    ],
    "tests/trainer/test_deterministic.py::test_a_gpu_needs_cublas_to_be_ready": [
        ("trainer/resume.py", "a GPU needs CUBLAS_WORKSPACE_CONFIG=:4096:8 set from the start"),
    ],
    "tests/trainer/test_rank_budget.py::test_a_run_of_ones_own_needs_its_length": [
        ("lora/adalora.py", "give Run its number of steps, total="),
    ],
    "tests/lora/test_adapter_kinds.py::test_what_a_kind_does_not_take": [
        ("lora/config.py", "has no part in an adapter of the kind"),
    ],
    "tests/lora/test_adapter_kinds.py::test_second_derivatives_need_a_trained_A": [
        ("kernels/linear4bit.py", "is not kept where A is frozen: train A too"),
    ],
    "tests/lora/test_rows.py::test_an_input_that_is_not_the_batch_is_refused": [
        ("lora/rows.py", "tokens, ...], or attach adapters without it (exclude=)"),
        ("lora/layer.py", "call the layer itself, or leave its adapters out"),
    ],
    "tests/lora/test_rows.py::test_parts_that_see_no_text_are_refused": [
        ("lora/rows.py", "attach adapters without it"),
    ],
    "tests/cli/test_bad_input.py::test_the_traceback_comes_with_debug": [("cli/main.py", "Run again with --debug")],
    "tests/cli/test_commands.py::test_generate_keeps_what_it_answered_and_goes_on": [
        ("outputs.py", "the same command with resume=True goes on"),
    ],
    "tests/cli/test_training_commands.py::test_tokens_train_beside_any_adapter_and_what_follows_uses_them": [
        ("cli/train.py", "is no token of this model: give some that it has"),
    ],
    "tests/lora/test_tokens.py::test_what_cannot_be_is_refused": [
        ("lora/attach.py", "train_tokens must have it alone"),
        ("lora/tokens.py", "train_tokens gives other ids: give both the same"),
    ],
    "tests/research/test_saved.py::test_a_save_that_leaves_something_out_is_refused": [
        ("lora/layer.py", "Attach with their modules in modules_to_save, freeze them"),
        ("lora/attach.py", "leave them dense (skip in quantize_)"),
    ],
    "tests/research/test_saved.py::test_tied_weights_are_untied_by_advice_or_refused": [
        ("lora/attach.py", "untie them before, with module.{} = torch.nn.Parameter"),
    ],
    "tests/research/test_second_order.py::test_a_head_that_trains_refuses_a_second_order": [
        ("kernels/chunked_head.py", "take torch.func's, or use head(hidden)")
    ],
    "tests/research/test_torch_loops.py::test_settings_of_torch_that_ask_for_nothing_are_taken_and_others_refused": [
        ("optim/state_files.py", "leave it out, or use torch.optim.AdamW for it")
    ],
    "tests/kernels/test_linear4bit.py::test_scales_that_want_a_gradient_are_refused_and_the_advice_works": [
        ("kernels/linear4bit.py", "freeze them, or take dequantize(weight)")
    ],
    "tests/lora/test_attach.py::test_layers_to_transform_that_leave_none_are_refused_and_the_advice_works": [
        ("lora/attach.py", "give whole paths in target_modules in its place"),
    ],
    "tests/lora/test_starts.py::test_what_is_refused_and_what_it_advises": [
        ("lora/attach.py", "is for LoRA on linear layers, and '{}' is none: exclude it"),
        ("lora/config.py", "start must be default, olora, eva, pissa, pissa-8, loftq or loftq-5"),
        ("lora/init.py", "give this model's own dense weights"),
        ("lora/init.py", "is dense: take start='pissa'"),
        ("lora/init.py", "needs the dense weights of 4-bit layers: dense=fourbit.read_weights"),
        ("lora/init.py", "as its sizes are: lower it"),
    ],
    "tests/lora/test_starts.py::TestEva::test_batches_may_be_keywords_and_must_be_there": [
        ("lora/init.py", "needs data, batches that the model is called with"),
    ],
    "tests/lora/test_starts.py::test_codes_that_other_adapters_are_on_are_not_made_anew": [
        ("lora/init.py", "where an adapter is: load the model again"),
    ],
    "tests/lora/test_starts.py::test_files_over_4_bits_bring_their_codes_back": [
        ("lora/convert.py", "which bitsandbytes has not: save the adapter"),
    ],
    "tests/cli/test_start_commands.py::test_a_run_with_a_start_is_trained_saved_and_loaded_again": [
        ("cli/train.py", "start: {}  error {}, was {}"), ("cli/main.py", "--start "),
    ],
    "tests/lora/test_inspect.py::TestExtract::test_what_no_adapter_can_hold_is_refused": [
        ("lora/inspect.py", "which LoRA cannot change: keep the tuned model whole"),
    ],
    "tests/cli/test_adapter_command.py::test_an_adapter_is_shown_compared_and_made_smaller": [
        ("cli/adapter.py", "writes nothing: leave out"),
        ("cli/adapter.py", "{} {} --rank and --out"),
        ("cli/main.py", "make one smaller: fourbit adapter show DIR"),
    ],
    "tests/research/test_own_adapter.py::test_a_round_trip": [
        ("lora/peft_files.py", "give load_adapter the layer that it was attached with"),
    ],
    "tests/lora/test_merge.py::test_what_cannot_be_merged_is_refused_before_anything_changes": [
        ("lora/merge.py", "use(model, name), or name it: merge(model, name)"),
        ("lora/merge.py", "to take the change: keep the adapter"),
    ],
    "tests/cli/test_merge_command.py::test_what_keeps_too_little_is_refused_unless_forced": [
        ("cli/merge.py", "take --into decoded, which keeps all, more --residual-bits, or --force"),
    ],
    "tests/lora/test_merge_4bit.py::test_where_nothing_in_4_bits_changes_nothing_is_made_anew": [
        ("lora/merge.py", "so none could stay so: merge into the dense base"),
    ],
    "tests/optim/test_optimizer.py::test_refuses_what_it_cannot_train": [
        ("optim/groups.py", "give {} {}={}, not a group of it"),
    ],
    "tests/optim/test_groups.py::test_what_cannot_be_meant_is_refused": [
        ("optim/groups.py", "nothing here is that: leave it out"),
    ],
    "tests/lora/test_merge.py::test_unmerging_what_was_not_kept_is_refused": [
        ("lora/merge.py", "take them off first (remove_adapter)"),
        ("lora/merge.py", "merge with keep=True for that"),
    ],
    "tests/research/test_peft_layers.py::test_the_head_of_an_adapted_embedding_keeps_the_bases_weight": [
        ("models/load.py", "differ, and are one tied tensor here: untie it")
    ],
    "tests/lora/test_convert.py::test_bitsandbytes_layers_keep_their_bytes_both_ways": [
        ("lora/convert.py", "convert it before it runs")
    ],
    "tests/test_errors.py::test_the_library_speaks_of_arguments_and_the_command_line_of_flags": [
        ("cli/main.py", "--quant none"),
        ("cli/main.py", "--resume auto"),
    ],
    "tests/models/test_llama_config.py::test_a_spec_made_or_changed_by_hand_has_no_config": [
        ("models/decoder.py", "make it with read_spec")
    ],
    "tests/models/test_generate.py::test_a_sampled_answer_depends_on_its_prompt_and_the_seed_alone": [
        ("models/generate.py", "give a temperature")
    ],
    "tests/data/test_forms.py::test_a_key_that_means_more_elsewhere_is_refused_and_the_advice_works": [
        ("data/keys.py", words)
        for words in (
            "take the key out where the text stands without it", "(`weight` 0 on a turn keeps it from being trained)",
            "take the key out, or the row", "is an older name of `tools`", "is `system` here: rename the key",
            "write it as prompt, chosen and rejected", "would ask for a margin", "holds what a reference model says",
            "write `weight` 0 (not) or 1", "is an older form of `tool_calls`", "write it as `content`",
            "is `arguments` here: rename the key",
        )
    ],
    "tests/data/test_said.py::test_the_advice_for_what_a_template_cannot_say_helps": [
        ("data/encode.py", "name one that can (template=...)")
    ],
    "tests/data/test_said.py::test_the_advice_for_a_special_token_helps": [
        ("data/encode.py", "spell it another way; a `text` row may hold it")
    ],
    "tests/data/test_encode.py::test_a_last_answer_that_the_template_changes_is_refused_with_the_place_and_the_"
    "advice_helps": [("data/turns.py", "cannot be told; name another template (template=...)")],
    "tests/data/test_encode.py::test_only_the_last_of_answers_that_change_and_have_no_stop_token_is_trained": [
        ("data/turns.py", "name another template (template=...)")
    ],
    "tests/data/test_encode.py::test_a_conversation_of_too_many_answers_is_told_the_limit_and_its_advice_helps": [
        ("data/turns.py", "split it, or train the last answer (loss_on last)")
    ],
    "tests/lora/test_adapter_files.py::test_another_base_is_refused_unless_forced": [
        ("lora/peft_files.py", "or force it (force=True)")
    ],
    "tests/text/test_tokenizer_folder.py::test_letters_that_would_vanish_are_refused": [
        ("text/tokenizer_folder.py", "give its model an unk_token of its vocabulary")
    ],
    "tests/research/test_own_loop_edges.py::test_the_advice_of_a_run_works": [
        ("trainer/loop.py", words)
        for words in (
            "call forward_backward before optim_step", "attach an adapter, or call model.requires_grad_()",
            "give a function of it, or a class", "got {}: give a loss", "make both as for the run that saved the state",
            "make it after the adapter is attached",
        )
    ],
    "tests/research/test_own_parts.py::test_a_trainer_evaluates_alone_and_goes_on_with_itself": [
        ("trainer/trainer.py", "give the trainer val, rows or a share such as 0.1")
    ],
    "tests/research/test_own_parts.py::test_a_loss_that_nothing_would_call_is_refused": [
        ("trainer/trainer.py", "leave out loss, or build on fourbit.Run")
    ],
    "tests/research/test_own_parts.py::test_metrics_of_a_loss_have_names_of_their_own_and_any_number": [
        ("trainer/trainer.py", "give rows of which it counts something")
    ],
    "tests/research/test_own_parts.py::test_an_optimizer_and_a_scheduler_of_ones_own_go_on_bit_for_bit": [
        ("trainer/config.py", "leave out what is said of it")
    ],
    "tests/text/test_sentencepiece.py::test_transformers_converts_what_is_not_supported": [
        ("text/sentencepiece.py", "Convert it once with transformers")
    ],
    "tests/trainer/test_resume.py::test_the_advice_for_a_run_that_cannot_be_longer_works": [
        ("trainer/resume.py", "begin a new run from what this one saved, with another out")
    ],
    "tests/trainer/test_checkpoint.py::test_a_second_run_is_refused_and_a_dead_one_does_not_block": [
        ("outputs.py", "wait for that one to end, stop it, or choose another out")
    ],
}  # fmt: skip
NOT_FOLLOWED = {  # why -> what
    "a disk or file system that a test cannot have; another place is tried beside `cannot write to`": [
        ("files.py", "free some space or make the folder writable"),
        ("outputs.py", "start no second run in it"),
    ],
    "a GPU, or a second device": [
        ("cli/load.py", "use float32 (or float16, not to train)"),
        ("trainer/distill.py", "put both on one device"),
    ],
    "a package; the names are those of pyproject.toml": [
        ("cli/doctor.py", "missing: pip install"),
        ("models/foreign.py", "pip install 'fourbit[transformers]', or write the family (docs/add-a-model.md)"),
        ("cli/main.py", "needs the package {}: pip install"),
        ("models/gguf.py", "pip install gguf"),
        ("trainer/metrics.py", "pip install tensorboard"),
    ],
    "memory; that the flags are there is tested below": [("cli/main.py", "--quant nf4 makes the model smaller")],
    "another file or version, which any other test reads": [
        ("files.py", "where a file is to be written: remove it"),
        ("data/read.py", "is longer than {}: write one object a line"),
        ("models/gguf.py", "Check the path and its permissions"),
        ("models/gguf.py", "give the path of a .gguf file"),
        ("models/gguf.py", "a GGUF header alone has 24. Get the file again"),
        ("models/gguf.py", "is damaged or no valid GGUF: get it again"),
        ("models/gguf.py", "only little-endian files are read. Convert it again"),
        ("models/gguf.py", "Convert the model again"),
        ("models/gguf.py", "Take another quantisation of the model"),
        ("models/gguf.py", "It is cut short or damaged: get it again"),
        ("models/gguf.py", "overlap. It is damaged: get it again"),
        ("models/gguf_model.py", "llama-gguf-split --merge"),
        ("models/gguf_model.py", "was put together by hand: get it again"),
        ("models/gguf_tokenizer.py", "load another model from its folder"),
        ("models/gguf_tokenizer.py", "load it from its Hugging Face folder"),
        ("models/hf.py", "Load the unquantised model and let fourbit quantise it"),
        ("models/float8.py", "Load the unquantised model and let fourbit quantise it"),
        ("models/load.py", "holds NaN or infinity. The file is damaged: get it again"),
        ("text/sentencepiece.py", "The file is damaged: get it again"),
        ("text/sentencepiece.py", "Get the file again"),
        ("text/sentencepiece.py", "Load the model from its Hugging Face folder, with a tokenizer.json"),
        ("text/tokenizer_folder.py", "Get the file again"),
        ("text/tokenizer_folder.py", "Get it from where the model is from"),
        ("models/finite.py", "or come from a training that diverged: take others"),
        ("trainer/checkpoint.py", "resume with its version"),
        ("trainer/checkpoint.py", "Go on with that version, or begin a new run"),
        ("trainer/distill.py", "so take two models of one family"),
        ("kernels/chunked_head.py", "leave out the rows that are not trained"),
    ],
    "a row that is to be shorter, or other options to be chosen": [
        ("trainer/policy.py", "{} times {}: mend it"),
        ("trainer/watch.py", "give truncated_penalty, a reward for length"),
        ("trainer/watch.py", "take harder or easier prompts, a finer reward, a higher temperature, or resample"),
        ("models/foreign.py", "give Run a loss of your own"),
        ("models/foreign.py", "take its text model alone"),
        ("models/plan.py", "give what it was made from"),
        ("trainer/evaluate.py", "shorten it, or take the row out"),
        ("trainer/checkpoint.py", "Lower the learning rate, or look at the batch"),
        ("optim/unmoved.py", "use rounding stochastic, in float32 a higher lr"),
    ],
    "no advice": [
        ("cli/main.py", words)
        for words in ("fine-tune a model on chat rows", "answer every row of a file", "fourbit rl --model M")
    ]
    + [("cli/main.py", "--help    all flags")]
    + [("lora/targets.py", "takes away all")]
    + [("cli/forecast.py", words) for words in ("keep {}: {} MiB",)]
    + [("trainer/checkpoint.py", "keep 1 or more"), ("trainer/losses/objective.py", "loss must be NAME or NAME=WEIGHT")]
    + [("cli/main.py", "fourbit quantize --model M"), ("cli/quantize.py", "--budget must be a size above 0")]
    + [("cli/quantize.py", "say it once"), ("cli/main.py", "fourbit export --model M --to gguf")]
    + [("cli/export.py", w) for w in ("--max-lora-rank", "--enable-lora")]
    + [("cli/export.py", w) for w in ("else add one", "GGUF is written of those alone", "--out {}", "read back")]
    + [("cli/load.py", "training is without the {} of its config.json")]
    + [("cli/doctor.py", "for --log tensorboard"), ("cli/parse.py", "-h, --help")]
    + [("data/forms.py", f"`fourbit {name}` reads") for name in ("sft", "dpo", "generate")]
    + [("trainer/reward_model.py", "fourbit reward writes one beside")],
}  # fmt: skip
VERBS = (
    "add attach begin call check choose convert copy delete exclude free get give go join keep leave load lower make "
    "mend merge move name pass pip put raise read remove rename repair replace reset save set shorten skip spell split "
    "start take unpack untie use wait wrap write"
)
ADVICE = re.compile(
    rf"(?i:(?:^\s*|[.:;,(]\s+(?:(?:or|else|first|then|and)\s+)?|\bor )(?:{VERBS.replace(' ', '|')})\b)"
    rf"|--[a-z]|did you mean|begins? anew|goes on with|see fourbit|\bfourbit (?:{'|'.join(ALL_COMMANDS)})\b"
)


def texts(file: Path) -> Iterator[str]:
    """Every text of a module but docstrings and the help of options, `{}` for what is put in."""
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            todo += [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        elif not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            option = ast.AnnAssign if isinstance(node, ast.ClassDef) else ()
            todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, option)]


@pytest.fixture(scope="module")
def said() -> list[tuple[str, str]]:
    """File and text of all that the package says."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).glob("*.py")]
    return sorted({(file.relative_to(ROOT).as_posix(), text) for file in files for text in texts(file)})


@pytest.fixture(scope="module")
def advising(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of these, what advises."""
    return [(file, text) for file, text in said if " " in text.strip() and ADVICE.search(text)]


def test_every_advice_is_followed_or_has_a_reason(said: list[Any], advising: list[Any]) -> None:
    known = FOLLOWED + [one for some in (*ELSEWHERE.values(), *NOT_FOLLOWED.values()) for one in some]
    missing = [one for one in advising if not any(one[0] == file and words in one[1] for file, words in known)]
    assert not missing, "follow these in a test, or say why not:\n" + "\n".join(map(str, missing))
    gone = [(file, words) for file, words in known if not any(file == one and words in text for one, text in said)]
    assert not gone, f"no message says this any more: {gone}"
    for test in ELSEWHERE:
        file, *_, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test


def flags_of(command: str) -> set[str]:
    options = importlib.import_module(f"fourbit.cli.{command}").Options
    return {flag_of(name) for name in options_of(options)}


def test_every_flag_and_command_that_is_named_is_there(advising: list[tuple[str, str]]) -> None:
    flags = {
        "--help",
        "--version",
        "--debug",
        "--no",
        "--no-base",
        "--merge",
        "--lora",
    }  # the last two are other tools'
    flags |= {"--enable-lora", "--lora-modules", "--max-lora-rank"}  # vLLM's
    flags |= {flag for name in ALL_COMMANDS for flag in flags_of(name)}
    for file, text in advising:
        assert {*re.findall(r"--[a-z][a-z-]*[a-z]", text)} <= flags, (file, text)
        for name in re.findall(r"(?:see|use|mean|:|`) ?`?fourbit ([a-z]+)", text):
            assert name in ALL_COMMANDS, (file, text)
        for name in re.findall(r"fourbit\.([A-Za-z_]+)", text):
            assert hasattr(fourbit, name), (file, text)
    for ours in SYNONYMS.values():
        assert f"--{ours.replace('_', '-')}" in flags or ours in ALL_COMMANDS, ours
    assert "**Going on** from a finished run" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("commands", "named"),
    [("sft dpo reward distill", "--micro-batch --max-length --checkpointing"), ("eval generate", "--batch-size"),
     ("eval generate chat", "--max-new-tokens"), ("sft dpo reward distill eval generate chat", "--quant")],
)  # fmt: skip
def test_what_is_advised_where_memory_ran_out_is_there(commands: str, named: str) -> None:
    said = explain(MemoryError())[0]
    for name in commands.split():
        assert {*named.split()} <= {*re.findall(r"--[a-z-]+", said)} & flags_of(name)
