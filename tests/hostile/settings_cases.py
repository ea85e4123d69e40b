"""Settings: YAML files and flags of any kind, and settings that cannot do what they say."""

import json
from typing import Any

from harness import Case, Make
from makes import (
    CHAT,
    ESCAPES,
    GENERATE,
    GOOD,
    LONG,
    SFT,
    aliases,
    all_of,
    folder,
    link,
    nested,
    nothing,
    pipe,
    put,
    rows,
    sparse,
)

YAML = ("sft", "run.yaml")
BASE = "model: m\ndata: good.jsonl\nout: o\nsteps: 1\nrank: 2\n"
DIGITS = "9" * 400
DPO = ("dpo", "--model", "m", "--data", "pairs.jsonl", "--out", "o", "--steps", "1", "--rank", "2")
DISTILL = ("distill", "--model", "m", "--teacher", "m", "--data", "good.jsonl", "--out", "o", "--steps", "1")
EVAL = ("eval", "--model", "m", "--data", "good.jsonl", "--max-new-tokens", "2")


FILES: dict[str, Make | str] = {
    "empty": "",
    "a list": "- a\n- b\n",
    "a text": "hello",
    "a number": "5",
    "null": "null",
    "two documents": BASE + "---\n" + BASE,
    "not YAML": "a: [b",
    "a tab": "\tmodel: m",
    "control characters": "model: m\n\x1b[2J: 5\n",
    "a setting of escapes": json.dumps({ESCAPES: 1}),
    "a setting of 10,000 characters": "x" * 900 + "y" * 9000 + ": 1\n",
    "a value of 60,000 characters": "model: " + "x" * 60_000 + "\ndata: d\nout: o\n",
    "a number of 60,000 digits": BASE + "seed: " + "9" * 60_000 + "\n",
    "70,000 bytes": "# " + "a" * 70_000 + "\n" + BASE,
    "40 GB of nothing": sparse("run.yaml", 40 << 30),
    "not UTF-8": b"model: \xff\n",
    "UTF-16": BASE.encode("utf-16"),
    "a pipe": pipe("run.yaml"),
    "a folder": folder("run.yaml"),
    "a link to itself": link("run.yaml", "run.yaml"),
    "a link to /dev/zero": link("run.yaml", "/dev/zero"),
    "a link to a pipe": all_of(pipe("p"), link("run.yaml", "p")),
    "aliases that unfold to 10^5": aliases(5),
    "aliases that unfold to 10^9": aliases(9),
    "aliases that unfold to 10^60": aliases(60),
    "an alias in a value that is used": "data: " + aliases(8).splitlines()[0][4:] + "\n" + aliases(8) + BASE,
    "an alias of itself": "a: &a [*a]\n" + BASE,
    "an alias that is a key": "a: &a [x]\n*a : 1\n",
    "an alias that is not there": "model: *none\n",
    "merges of mappings": "a: &a {b: 1}\nc: {<<: *a}\n" + BASE,
    "nested 500 deep": "model: " + nested(500),
    "nested 20,000 deep": "model: " + nested(20_000),
    "nested 5,000 deep by question marks": "? " * 5000 + "a",
    "an object of Python": "model: !!python/object/apply:os.system ['id']\n",
    "a type of its own": "model: !evil m\n",
    "binary": "model: !!binary aGk=\n",
    "a set": "model: !!set {a}\n",
    "a setting twice": BASE + "rank: 4\n",
    "a setting twice, once with a dash": BASE + "batch-size: 1\nbatch_size: 2\n",
    "a setting that is a list": "[model]: m\n",
    "an unknown setting": BASE + "learning_rate: 1\n",
    "30,000 commas": "a: [" + "," * 30_000 + "]",
    "6,000 settings": "".join(f"k{i}: 1\n" for i in range(6000)),
}
TYPES: dict[str, list[str]] = {  # of a setting the values that it cannot have
    "model": ["5", "[m]", "{m: 1}", "null", '"a\\0b"', '""', "true", "/"],
    "data": ["5", "{a: 1}", "[]", "[5]", '["a\\0b.jsonl"]', "null", '""'],
    "out": ["5", "[o]", '""', '"a\\0b"', "/dev/null", "null"],
    "val": ["5", "'-5%'", "'1e400%'", "[a]", '"a\\0b"', "'" + DIGITS + "%'"],
    "seed": ["-1", DIGITS, "1.5", "true", "18446744073709551616", "x"],
    "steps": ["0", DIGITS, "1.0", "[1]", "'1'"],
    "epochs": ["0", DIGITS, "null", "9223372036854775808"],
    "batch_size": ["0", DIGITS, "{}"],
    "micro_batch": ["0", DIGITS, "-1", "[auto]", "2.5"],
    "max_length": ["1", DIGITS, "x"],
    "rank": ["0", DIGITS, "33", "true"],
    "alpha": ["0", DIGITS, ".inf", ".nan", "-1", "1e308"],
    "dropout": ["1", "-0.1", ".nan", "x"],
    "lr": ["0", ".inf", DIGITS, "-1", "1e-400", "[1]"],
    "warmup": ["-1", ".nan", DIGITS],
    "weight_decay": ["-1", ".inf", DIGITS],
    "max_grad_norm": ["-1", ".nan", DIGITS],
    "lora_plus": ["0", ".inf", DIGITS],
    "lr_scale": ["5", "[a]", "{a: x}", "{a: -1}", "{'(': 1}", "{'*': .nan}", "{5: 1}", "{'*': " + DIGITS + "}"],
    "target": ["5", "[]", "[5]", "'('", "'(a+)+$'", '""', "{a: 1}", '"a\\0b"'],
    "eval_every": ["0", DIGITS],
    "save_every": ["0", "-1"],
    "keep": ["0", "x"],
    "patience": ["0", "1"],
    "log": ["5", "wandb", "[tensorboard, 5]"],
    "optimizer_budget": ["5", "'1e400GiB'", "'-1GiB'", "'" + DIGITS + "GiB'"],
    "template": ["5", "''", '"a\\0b"', "[x]"],
    "resume": ["5", "''", '"a\\0b"', "/dev/zero"],
    "device": ["5", "cuda", "'cuda:99999999999999999999'", "'cpu:1e9'", "meta"],
    "dtype": ["float8", "16", "float16"],
    "quant": ["int8", "4", "[nf4]"],
}
FLAGS: dict[str, tuple[str, ...]] = {
    "no command": (),
    "an unknown command": ("trian",),
    "a command of escapes": (ESCAPES,),
    "a command of 100,000 characters": (LONG,),
    "a command that is not UTF-8": ("\udcff\udcfe",),
    "an unknown flag": (*SFT, "--ranc", "8"),
    "a flag of escapes": (*SFT, "--" + ESCAPES, "8"),
    "a flag of 100,000 characters": (*SFT, "--" + LONG),
    "a flag that is not UTF-8": (*SFT, "--\udcff"),
    "a stray argument": (*SFT, "stray"),
    "a stray argument of escapes": (*SFT, ESCAPES),
    "a stray argument of 100,000 characters": (*SFT, LONG),
    "a value that is not UTF-8": (*SFT, "--dtype", "\udcff"),
    "a value of escapes": (*SFT, "--device", ESCAPES),
    "a value of 100,000 characters": (*SFT, "--device", LONG),
    "no value": (*SFT, "--rank"),
    "an empty value": (*SFT, "--rank="),
    "two config files": ("sft", "a.yaml", "b.yaml"),
    "a rank of 5,000 digits": (*SFT, "--rank", "9" * 5000),
    "a seed of 400 digits": (*SFT, "--seed", DIGITS),
    "a rate of 1e400": (*SFT, "--lr", "1e400"),
    "a rate of NaN": (*SFT, "--lr", "nan"),
    "a rate of -0": (*SFT, "--lr", "-0"),
    "a pattern of 100,000 characters": (*SFT, "--lr-scale", LONG + "=1"),
    "a target of 100,000 characters": (*SFT, "--target", "x" * 100_000),
    "a target of escapes": (*SFT, "--target", ESCAPES),
    "a target that goes back": (*SFT, "--target", "(a|a|a)+" * 20 + "[b]"),
    "a loss that is unknown": (*DPO, "--loss", "nonsense"),
    "a loss of escapes": (*DPO, "--loss", ESCAPES),
    "a loss with a weight of NaN": (*DPO, "--loss", "sigmoid=nan"),
    "a loss with a weight of 400 digits": (*DPO, "--loss", "sigmoid=" + DIGITS),
    "a loss 10,000 times": (*DPO, *["--loss", "sigmoid=1"] * 10_000),
    "a beta of 0": (*DPO, "--beta", "0"),
    "a beta of infinity": (*DPO, "--beta", "inf"),
    "a smoothing of 1": (*DPO, "--label-smoothing", "1"),
    "a divergence that is unknown": (*DPO, "--divergence", LONG),
    "a teacher that is the student": DISTILL,
    "a teacher that is missing": (*DISTILL, "--teacher", "none"),
    "a teacher that is a file": (*DISTILL, "--teacher", "good.jsonl"),
    "a temperature of 0 in distillation": (*DISTILL, "--sft-weight", "1", "--temperature", "0"),
    "top-k of 400 digits in distillation": (*DISTILL, "--sft-weight", "1", "--top-k", DIGITS),
    "a beta of jsd of 5": (*DISTILL, "--divergence", "jsd", "--jsd-beta", "5"),
    "a temperature of -1": (*CHAT, "--temperature", "-1"),
    "a temperature of 1e400": (*CHAT, "--temperature", "1e400"),
    "a seed of 400 digits in chat": (*CHAT, "--seed", DIGITS, "--temperature", "1"),
    "top-k of 400 digits in chat": (*CHAT, "--top-k", DIGITS, "--temperature", "1"),
    "top-p of 0": (*CHAT, "--top-p", "0"),
    "a batch of 400 digits in eval": (*EVAL, "--batch-size", DIGITS),
    "rows of 400 digits": ("data", "good.jsonl", "--model", "m", "--rows", "-1"),
    "problems of 400 digits": ("data", "good.jsonl", "--model", "m", "--problems", "x"),
    "a device that is not there": (*SFT, "--device", "cuda"),
    "a length that cuts all answers": (*SFT, "--max-length", "2"),
    "more layers than there are": (*SFT, "--target", "layers.7.mlp.up_proj"),
    "patience without rows": (*SFT, "--patience", "1"),
    "full and a rank": (*SFT, "--full"),
    "a rounding that is none": (*SFT, "--rounding", "up"),
}
TOGETHER: dict[str, str] = {  # each fine alone
    "warm-up longer than the run": "warmup: 1000\n",
    "a decay longer than the run": "schedule: wsd\ndecay: 1000\n",
    "warm-up and decay longer than the run": "steps: 10\nschedule: wsd\nwarmup: 8\ndecay: 8\n",
    "a share that holds no row": "val: 1%\n",
    "a share that leaves no row": "val: 99.99%\n",
    "evaluations after the end": "val: good.jsonl\neval_every: 1000\n",
    "checkpoints after the end": "save_every: 1000\n",
    "rates of 0 everywhere": "lr_scale: {'*': 0}\n",
    "a budget of one byte": "optimizer: paged-adamw\noptimizer_budget: 0.0000000001GiB\n",
    "a rank above the layers": "rank: 33\n",
    "a length beyond the positions": "max_length: 1000000000\n",
    "dropout that leaves nothing": "dropout: 0.9999999999999999\n",
    "a rate that ends in infinity": "lr: 1e38\nsteps: 8\nmax_grad_norm: 0\n",
}
SAMPLED: dict[str, tuple[str, ...]] = {  # numbers that cannot be, on the way to an answer
    "a seed of 400 digits": ("--seed", DIGITS, "--temperature", "1"),
    "a seed of 2^64": ("--seed", str(1 << 64), "--temperature", "1"),
    "top-k of 400 digits": ("--top-k", DIGITS, "--temperature", "1"),
    "top-k of 2^63": ("--top-k", str(1 << 63), "--temperature", "1"),
    "a batch of 400 digits": ("--batch-size", DIGITS),
    "a batch of 2^63": ("--batch-size", str(1 << 63)),
    "tokens of 400 digits": ("--max-new-tokens", DIGITS),
    "a temperature of 1e308": ("--temperature", "1e308"),
    "a temperature of the smallest float": ("--temperature", "5e-324"),
    "a temperature of 1e-40": ("--temperature", "1e-40"),
    "top-p of the smallest float": ("--top-p", "5e-324", "--temperature", "1"),
}
FINE_TOGETHER = (  # if it is said, or as what happens at the end of a run counts
    "evaluations after the end",
    "checkpoints after the end",
    "a length beyond the positions",
    "dropout that leaves nothing",
)
LEGAL_SAMPLING = (
    "a temperature of 1e308",
    "a temperature of 1e-40",
    "a temperature of the smallest float",
    "top-p of the smallest float",
)


def yaml(text: Any) -> Make:
    return text if callable(text) else put("run.yaml", text)


def setting(name: str, value: str) -> Make:
    """The base's settings with one changed or added."""
    lines = [line for line in BASE.splitlines() if not line.startswith(name + ":")]
    return put("run.yaml", "\n".join([*lines, f"{name}: {value}"]) + "\n")


def together(text: str) -> Make:
    """The base's settings, with those of `text` in their place."""
    names = {line.partition(":")[0] for line in text.splitlines()}
    kept = [line for line in BASE.splitlines() if line.partition(":")[0] not in names]
    return put("run.yaml", "\n".join(kept) + "\n" + text)


CASES = [
    *[Case(f"yaml: {name}", yaml(content), YAML) for name, content in FILES.items()],
    *[
        Case(f"yaml: {name} = {value if len(value) < 40 else value[:20] + '...'}", setting(name, value), YAML)
        for name, values in TYPES.items()
        for value in values
    ],
    *[
        Case(f"settings together: {name}", together(text), YAML, ends="either" if name in FINE_TOGETHER else "refused")
        for name, text in TOGETHER.items()
    ],
    *[Case(f"flags: {name}", nothing, argv or ("",)) for name, argv in FLAGS.items()],
    *[
        Case(
            f"sampling: {name}",
            rows(GOOD),
            (*GENERATE, *flags),
            ends="either" if name in LEGAL_SAMPLING else "refused",
        )
        for name, flags in SAMPLED.items()
    ],
]
