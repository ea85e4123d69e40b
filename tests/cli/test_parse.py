"""Flags and a file into options: order, sources, unknown names; and the set of options, pinned."""

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from fourbit.cli.main import COMMANDS
from fourbit.cli.parse import help_page, parse
from fourbit.errors import InputError
from fourbit.settings import REQUIRED, Checked, setting
from fourbit.synonyms import REMARKS, SYNONYMS, hint

KINDS = {name: importlib.import_module(f"fourbit.cli.{name}").Options for name in COMMANDS}


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Try."""

    title: ClassVar[str] = "all"
    out: str = setting(REQUIRED, "a folder")
    rank: int = setting(16, "a number", least=1)
    lr: float = setting(1e-3, "a rate of 5%")
    size: int | Literal["auto"] = setting("auto", "a size")
    packing: bool = setting(True, "a switch")
    target: tuple[str, ...] = setting(("all",), "names")
    resume: str | None = setting(None, "a place", bare="auto")
    lr_scale: dict[str, float] = setting({}, "factors")


@dataclass(frozen=True, kw_only=True)
class Listed(Options):
    positional: ClassVar[str] = "target"


def read(*args: str) -> Options:
    return parse(Options, "try", args)[0]


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("out: here\nrank: 4\nlr: 1e-4\n")
    options, sources = parse(Options, "try", ["--rank", "8", str(config)])
    assert sources.keys() == {field.name for field in fields(Options)}
    assert options == Options(out="here", rank=8, lr=1e-4)
    assert sources == dict.fromkeys(sources, "default") | {"out": f"{config}:1", "rank": "flag", "lr": f"{config}:3"}


def test_a_flag_that_repeats_the_default_is_still_a_flag() -> None:
    assert parse(Options, "try", ["--out", "x", "--rank", "16"])[1]["rank"] == "flag"


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--lr", "3"], "lr", 3.0),
        (["--lr=1e-5"], "lr", 1e-5),
        (["--size", "4"], "size", 4),
        (["--size", "auto"], "size", "auto"),
        (["--no-packing"], "packing", False),
        (["--packing"], "packing", True),
        (["--target", "a", "--target", "b,c"], "target", ("a", "b,c")),
        (["--resume"], "resume", "auto"),
        (["--resume", "a/b"], "resume", "a/b"),
        (["--rank", "3", "--rank", "5"], "rank", 5),
        (["--lr-scale", "*.a=2", "--lr-scale", "b=x=1e-1"], "lr_scale", {"*.a": 2.0, "b=x": 0.1}),
    ],
)
def test_flags(args: list[str], name: str, value: Any) -> None:
    assert getattr(read("--out", "x", *args), name) == value


def test_a_list_in_a_file_may_be_one_text(tmp_path: Path) -> None:
    config = tmp_path / "run.yml"
    config.write_text("out: x\ntarget: mlp\n")
    assert read(str(config)).target == ("mlp",)
    config.write_text("out: x\ntarget: [a, b]\n")
    assert read(str(config)).target == ("a", "b")


def test_a_mapping_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yml"
    config.write_text("out: x\nlr_scale:\n  '*.lora_B': 16\n  model.layers.0.*: 0.5\n")
    assert read(str(config)).lr_scale == {"*.lora_B": 16.0, "model.layers.0.*": 0.5}
    assert read(str(config), "--lr-scale", "a=1").lr_scale == {"a": 1.0}, "flags win over the file"


def test_bare_arguments() -> None:
    assert parse(Listed, "try", ["--out", "x", "a", "b", "--target", "c"])[0].target == ("a", "b", "c")
    with pytest.raises(InputError, match=r"unexpected argument 'a'"):
        read("--out", "x", "a")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ([], "fourbit try needs --out"),
        (["--out"], "--out: needs a value"),
        (["--out", "x", "--lora-r", "8"], "unknown flag --lora-r: it is called --rank here"),
        (["--out", "x", "--lora_alpha=8"], "unknown flag --lora_alpha; see fourbit try --help"),  # there is no --alpha
        (["--out", "x", "--learning-rate", "8"], "it is called --lr here"),
        (["--out", "x", "--ran", "8"], "unknown flag --ran; did you mean --rank?"),
        (["--out", "x", "--pack"], "unknown flag --pack; did you mean --packing?"),
        (["--out", "x", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["--out", "x", "--rank", "eight"], "--rank must be a whole number, got 'eight'"),
        (["--out", "x", "--lr", "nan"], "--lr must be a number, got 'nan'"),
        (["--out", "x", "--size", "big"], "--size must be a whole number or auto, got 'big'"),
        (["--out", "x", "--packing=no"], "--packing takes no value, got 'no'; there are --packing and --no-..."),
        (["a.yaml", "b.yaml"], "one config file a run, got a.yaml and b.yaml"),
    ],
)
def test_bad_flags(args: list[str], error: str) -> None:
    with pytest.raises(InputError) as caught:
        read(*args)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("rank: 0", "run.yaml:1: rank must be at least 1, got 0"),
        ("\nrank: '8'", "run.yaml:2: rank must be a whole number, got '8'"),
        ("rank: 8.5", "run.yaml:1: rank must be a whole number, got 8.5"),
        ("rank: null", "run.yaml:1: rank must be a whole number, got null"),
        ("rank: true", "run.yaml:1: rank must be a whole number, got True"),
        ("rank: [8]", "run.yaml:1: rank must be a whole number, got [8]"),
        ("lr: high", "run.yaml:1: lr must be a number, got 'high'"),
        ("packing: yes", "run.yaml:1: packing must be true or false, got 'yes'"),
        ("packing: 1", "run.yaml:1: packing must be true or false, got 1"),
        ("size: {a: 1}", "run.yaml:1: size must be a whole number or auto, got {'a': 1}"),
        ("lr_scale: 3", "run.yaml:1: lr_scale must be a mapping of names or patterns to numbers, got 3"),
        ("lr_scale: {a: true}", "run.yaml:1: lr_scale must be a mapping of names or patterns to numbers"),
        ("lr_scale: {a: .nan}", "run.yaml:1: lr_scale must be a finite number, got nan"),
        ("lr_scale: {a: 1, a: 2}", "run.yaml:1: a stands a second time"),
        ("target: 3", "run.yaml:1: target must be text or a list of texts, got 3"),
        ("target: [3]", "run.yaml:1: target must be text or a list of texts, got [3]"),
        ("lora_r: 3", "run.yaml:1: unknown setting 'lora_r': it is called rank here"),
        ("warmup_ratio: 3", "run.yaml:1: unknown setting 'warmup_ratio': warmup is a fraction"),
        ("ranck: 3", "run.yaml:1: unknown setting 'ranck'; did you mean rank?"),
        ("zzz: 3", "run.yaml:1: unknown setting 'zzz'"),
    ],
)
def test_bad_settings(tmp_path: Path, text: str, error: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(InputError) as caught:
        read("--out", "x", str(config))
    assert error in str(caught.value).replace(str(config), "run.yaml")


def test_help_names_every_option() -> None:
    page = help_page(Options, "try")
    assert all(f"--{field.name.replace('_', '-')}" in page for field in fields(Options))
    assert "a rate of 5% (default: 0.001)" in page and "(required)" in page and "\n\nTry.\n\nall:\n" in page
    assert "[DATA ...]" not in page and "[TARGET ...]" in help_page(Listed, "try")


def test_every_synonym_leads_to_an_option() -> None:
    """A rename of ours must not leave a hint behind that names an option nobody has."""
    ours = {field.name for kind in KINDS.values() for field in fields(kind)} | set(COMMANDS)
    assert set(SYNONYMS.values()) <= ours
    assert not set(SYNONYMS) & ours, "a name of ours needs no hint"
    assert all(any(name in remark for name in ours) for remark in REMARKS.values())


def test_hints_spell_as_the_user_wrote() -> None:
    known = {"max_length", "batch_size"}
    assert hint("sequence_len", known) == ": it is called max_length here"
    assert hint("cutoff-len", known, flag=True) == ": it is called --max-length here"
    assert hint("gradient_accumulation_steps", known).startswith(": batch_size counts all examples")
    assert hint("qqq", known) == ""


MODEL = {"model", "quant", "device", "dtype"}
ROWS = {"data", "template", "max_length", "loss_on", "on_bad_row"}
SAMPLING = {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
TRAINING = (
    "out epochs steps batch_size micro_batch packing max_length on_bad_row template lr schedule warmup decay lora_plus "
    "lr_scale optimizer optimizer_budget rounding weight_decay max_grad_norm checkpointing seed eval_every "
    "rslora json patience keep_best save_every keep resume log data val rank alpha dropout target adapter force "
    "deterministic kind start initial_rank rank_warmup rank_final feedforward train_tokens dry_run"
)
REWARDS = "reward reward_seconds"
RL = (
    "loss group_size rollouts_ahead updates max_new_tokens temperature truncated truncated_penalty failed_reward "
    "resample clip_low clip_high clip_most stray baseline scale_rewards kl kl_in kl_estimator kl_stop reference "
    "entropy_bonus top_entropy correction gamma lam value_lr value_clip"
)
DISTILL = "teacher teacher_adapter teacher_quant divergence jsd_beta temperature top_k sft_weight"


FILE = {"overwrite", "resume", "json"}


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("sft", {*TRAINING.split(), *MODEL, "loss_on", "full", "sweep"}),
        ("plan", {*TRAINING.split(), *MODEL, "loss_on", "full", "sweep", "memory", "flops", "lengths"}),
        ("rl", {*TRAINING.split(), *MODEL, *RL.split(), *REWARDS.split()}),
        ("reward", {*TRAINING.split(), *MODEL, "truncation", "head_lr", "center"}),
        ("distill", {*TRAINING.split(), *MODEL, *DISTILL.split(), "loss_on", "full"}),
        (
            "eval",
            MODEL
            | ROWS
            | FILE
            | {"adapter", "force", "match", "base", "max_new_tokens", "batch_size", "answers"}
            | {"keep_dense"},
        ),
        (
            "generate",
            MODEL
            | SAMPLING
            | FILE
            | {
                "adapter",
                "force",
                "data",
                "out",
                "template",
                "batch_size",
                "keep_dense",
                "n",
                "keep",
                *REWARDS.split(),
            },
        ),
        ("chat", MODEL | SAMPLING | {"adapter", "force", "system", "template", "keep_dense"}),
        ("data", ROWS | {"model", "rows", "problems", "json"}),
        ("doctor", {"json"}),
    ],
)
def test_new_options_are_rare(command: str, names: set[str]) -> None:
    """Adding one is a decision: change this list with it, and the tables of the documentation."""
    assert {field.name for field in fields(KINDS[command])} == names
    assert all(field.metadata.get("help") for field in fields(KINDS[command]))
