"""Bad input on the command line: one clear paragraph, the right exit code, no traceback, nothing half done."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourbit.cli.main import main

Typed = Callable[..., str]
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.fixture
def here(here: Path) -> Path:
    """With two good rows and some bad files too."""
    (here / "good.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD).replace("hi", "ho") + "\n")
    (here / "bad.jsonl").write_text(json.dumps(GOOD) + "\n{\n" + '{"messages": [{"role": "human"}]}\n')
    (here / "empty.jsonl").write_text("")
    (here / "file").write_text("a file")
    (here / "no model").mkdir()
    (here / "weights.bin").write_bytes(b"\x80\x04.")
    (here / "loud.jinja").write_text("{% for m in messages %}{{ m.nothing.here }}{% endfor %}")
    return here


SFT = ["sft", "--model", "m", "--data", "good.jsonl", "--out", "o"]
BOUNDS = {
    "epochs": 1,
    "steps": 1,
    "batch-size": 1,
    "micro-batch": 1,
    "max-length": 2,
    "warmup": 0,
    "seed": 0,
    "keep": 1,
}
CASES = [
    *(([*SFT, f"--{name}", str(n - 1)], f"--{name} must be at least {n}, got {n - 1}") for name, n in BOUNDS.items()),
    *(([*SFT, "--val", share], "--val must be a file, or a share above 0%") for share in ("0%", "150%", "nan%", "a%")),
    (["trian"], "unknown command 'trian'; there are sft"),
    (["train"], "unknown command 'train': it is called sft here"),
    (["dta"], "did you mean data?"),
    (["--model", "m"], "a command comes first, got '--model'"),
    (["sft"], "needs --model, --data, --out"),
    ([*SFT, "--lora-r", "8"], "--lora-r: it is called --rank here"),
    ([*SFT, "--gradient-accumulation-steps", "4"], "batch_size counts all examples"),
    ([*SFT, "--rank", "0"], "--rank must be at least 1, got 0"),
    ([*SFT, "--alpha", "0"], "--alpha must be a"),
    ([*SFT, "--alpha", "nan"], "--alpha must be a number, got 'nan'"),
    ([*SFT, "--dropout", "1"], "--dropout must be a number from 0 up to"),
    ([*SFT, "--target", "q_prj"], "q_proj"),
    ([*SFT, "--target", "("], "--target"),
    ([*SFT, "--lr", "0"], "--lr must be above 0 and finite, got 0"),
    ([*SFT, "--micro-batch", "many"], "--micro-batch must be a whole number or auto, got 'many'"),
    ([*SFT, "--max-length", "10"], "max_length 10 cuts off the end of an answer"),
    ([*SFT, "--schedule", "cosin"], "--schedule must be one of cosine, linear, constant, inverse-sqrt or wsd, got"),
    ([*SFT, "--lr-scale", "*.embed*"], "--lr-scale must be a name or pattern, = and a number, got '*.embed*'"),
    ([*SFT, "--lr-scale", "*=x"], "--lr-scale must be a mapping of names or patterns to numbers"),
    ([*SFT, "--lr-scale", "*=-1"], "--lr-scale must have factors of 0 or more, got -1.0 for '*'"),
    ([*SFT, "--lr-scale", "*.lora_C=2"], "lr_scale: the learning-rate pattern '*.lora_C' matches no parameter"),
    ([*SFT, "--lr-scale", "*=0"], "lr_scale leaves nothing to train"),
    ([*SFT, "--optimizer", "paged-lion", "--optimizer-budget", "2"], "--optimizer-budget must be auto or a size above"),
    ([*SFT, "--optim", "adamw_8bit"], "unknown flag --optim; did you mean --optimizer?"),
    ([*SFT, "--on-bad-row", "ignore"], "--on-bad-row must be error or skip"),
    ([*SFT, "--log", "wandb"], "--log knows tensorboard"),
    ([*SFT, "--quant", "int8"], "--quant must be one of nf4, nf4-nodq, none"),
    ([*SFT, "--full", "--quant", "nf4"], "full training needs the dense model"),
    ([*SFT, "--full", "--rank", "8"], "full training has no adapter: leave out rank"),
    ([*SFT, "--dtype", "float16"], "training in float16 loses small gradients"),
    ([*SFT, "--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ([*SFT, "--val", "5"], "data file 5 does not exist; a share needs a percent sign"),
    ([*SFT, "--patience", "2"], "patience needs validation rows"),
    ([*SFT, "--eval-every", "2"], "eval_every needs validation rows"),
    ([*SFT, "--resume", "nowhere"], "nowhere"),
    ([*SFT, "--template", "nope"], "template 'nope': neither a built-in"),
    ([*SFT, "--template", "loud.jinja"], "loud.jinja"),
    ([*SFT, "--packing", "yes"], "unexpected argument 'yes'"),
    ([*SFT, "nowhere.yaml"], "needs the file nowhere.yaml, which is not there"),
    ([*SFT, "--model", "nowhere"], "fourbit: model nowhere does not exist; give a Hugging Face folder or a .gguf file"),
    (["data", "good.jsonl", "--model", "no.gguf"], "fourbit: model no.gguf does not exist; give a Hugging Face folder"),
    ([*SFT, "--model", "file"], "file"),
    ([*SFT, "--model", "no model"], "no model"),
    ([*SFT, "--model", "weights.bin"], "can run code when read"),
    ([*SFT, "--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be opened: No such file"),
    ([*SFT, "--data", "bad.jsonl"], "bad.jsonl:2: "),
    ([*SFT, "--data", "no model"], "no model"),
    ([*SFT, "--data", "empty.jsonl"], "empty.jsonl"),
    ([*SFT, "--data", "file"], "file"),
    ([*SFT, "--out", "file"], "out file is no folder"),
    ([*SFT, "--out", "file/below"], "out file/below is no folder"),
    (["eval", "--model", "m"], "needs --data"),
    (["eval", "--model", "m", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["eval", "--model", "m", "--data", "good.jsonl", "--adapter", "nowhere"], "adapter nowhere is no folder with"),
    (["eval", "--model", "m", "--data", "good.jsonl", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["eval", "--model", "m", "--data", "good.jsonl", "--lora-path", "o"], "it is called --adapter here"),
    *(
        (["eval", "--model", model, "--data", "good.jsonl", "--answers", file], f"answers {file} must be a file in a f")
        for model, file in (("m", "no/where.jsonl"), ("nowhere", "no model"))
    ),
    (["eval", "--model", "m", "--data", "good.jsonl", "--answers", "a", "--match", "none"], "match none writes none"),
    (["generate", "--model", "m", "--data", "good.jsonl"], "needs --out"),
    (["generate", "--model", "m", "--data", "good.jsonl", "--out", "no/where/a.jsonl"], "a folder that exists"),
    (["generate", "--model", "m", "--data", "good.jsonl", "--out", "no model"], "must be a file"),
    (["generate", "--model", "m", "--data", "bad.jsonl", "--out", "a.jsonl"], "2 of 3 rows cannot be used"),
    (["chat", "--model", "m", "--top-p", "0"], "--top-p must be above 0"),
    (["chat", "--model", "m", "--temperature", "-1"], "--temperature must be at least 0"),
    (["chat", "--model", "nowhere"], "model nowhere does not exist; give a Hugging Face folder"),
    (["data", "good.jsonl"], "needs --model"),
    (["data", "bad.jsonl", "--model", "m"], "bad.jsonl:3: messages[0].content: is missing"),
    (["data", "good.jsonl", "--model", "m", "--rows", "-1"], "--rows must be at least 0"),
    (["doctor", "--verbose"], "unknown flag --verbose"),
]
assert len(CASES) >= 40


@pytest.mark.parametrize(("args", "said"), CASES, ids=[" ".join(args).removeprefix(" ".join(SFT)) for args, _ in CASES])
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert main(args) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err and "fault of fourbit" not in printed.err
    if args[0] != "data":  # which shows the rows that are fine first
        assert printed.out == ""
    assert not (here / "o" / "adapter_config.json").exists() and not (here / "a.jsonl").exists()


SETTINGS = [
    ("lora_r: 8", "run.yaml:1: unknown setting 'lora_r': it is called rank here"),
    ("model: m\nlearning_rate: 1e-4", "run.yaml:2: unknown setting 'learning_rate': it is called lr here"),
    ("rank: '8'", "run.yaml:1: rank must be a whole number, got '8'"),
    ("lr: -1e-4", "run.yaml:1: lr must be above 0 and finite, got -0.0001"),
    ("steps: true", "run.yaml:1: steps must be a whole number or null, got True"),
    ("model:", "run.yaml:1: model must be text, got null"),
    ("optimizer_budget: 2", "run.yaml:1: optimizer_budget must be text, got 2"),
    ("full: true\nalpha: 3", "full training has no adapter: leave out alpha"),
    ("title: x", "run.yaml:1: unknown setting 'title'"),
]


@pytest.mark.parametrize(("text", "said"), SETTINGS, ids=[text for text, _ in SETTINGS])
def test_refused_settings(here: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    (here / "run.yaml").write_text(text)
    given = [arg for arg in SFT if not (arg in ("--model", "m") and text.startswith("model:"))]
    assert main([*given, "run.yaml"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err and printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_the_environments_fault(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--device", "cuda"]) == 3
    assert "torch sees no CUDA devices here" in capsys.readouterr().err


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("missing", "package", "line"),
    [
        ("yaml", "pyyaml", "data run.yaml"),
        ("rich", "rich", "eval --model m good.jsonl"),
        ("matplotlib", "matplotlib", "sft --model m --data good.jsonl --out o --steps 1"),
        ("gguf", "gguf", "data good.jsonl --model m.gguf"),
    ],
)
def test_a_missing_package_is_the_environments_fault(
    here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, missing: str, package: str, line: str
) -> None:
    (here / "run.yaml").write_text("model: m\ndata: good.jsonl\n")
    (here / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0))
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert f" the package {package}: pip install {package}\n" in typed(line, code=3)


def test_doctor_and_help_start_without_packages() -> None:
    """In an interpreter of its own, whose modules are not here yet."""
    program = (
        "import sys, importlib.metadata as metadata\n"
        "gone = ('jinja2', 'yaml', 'rich', 'gguf', 'matplotlib')\n"
        "sys.modules |= dict.fromkeys(gone)\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name.removeprefix('py') in gone:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "from fourbit.cli.main import main\n"
        "assert main(['--help']) == main(['sft', '--help']) == 0\n"
        "sys.exit(main(['doctor']))"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr == "fourbit: missing: pip install jinja2 pyyaml rich gguf matplotlib\n"


def test_an_unwritable_folder_is_the_environments_fault(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--out", "/proc/none/such"]) == 3
    assert "cannot write to the output folder /proc/none/such" in capsys.readouterr().err


def test_the_traceback_comes_with_debug(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--rank", "0", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_names_with_blanks_and_other_scripts_are_fine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "Zeilen für später.jsonl").write_text((here / "good.jsonl").read_text())
    args = [*SFT, "--data", "Zeilen für später.jsonl", "--out", "läufe/erster lauf", "--steps", "1"]
    assert main(args) == 0
    assert (here / "läufe/erster lauf/adapter_config.json").is_file()
    assert "--adapter 'läufe/erster lauf'" in capsys.readouterr().out
