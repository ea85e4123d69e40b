"""Adapters and what runs leave: configs, tensors, settings, metrics, checkpoints, reward heads."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Case, Make
from makes import (
    CHAT,
    DROPPED,
    ESCAPES,
    HUGE,
    LONG,
    aliases,
    all_of,
    edit,
    folder,
    gone,
    keys,
    link,
    nested,
    pipe,
    put,
    sparse,
    told,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ADAPTED = (*CHAT, "--adapter", "run")
CONFIG, WEIGHTS, TEMPLATE = "run/adapter_config.json", "run/adapter_model.safetensors", "run/chat_template.jinja"
KEY = "fourbit.base."
STEP = "run/checkpoints/step-000001"
RUN = (
    "sft",
    "--model",
    "m",
    "--data",
    "good.jsonl",
    "--out",
    "run",
    "--rank",
    "2",
    "--steps",
    "2",
    "--save-every",
    "1",
)
RESUME = (*RUN, "--resume", STEP)
LOCK = ("run/run.lock",)  # of what a run that is refused may change
DPO = ("dpo", "--model", "m", "--data", "pairs.jsonl", "--out", "o", "--steps", "1", "--rank", "2")
WRONG: dict[str, list[Any]] = {
    "peft_type": [None, 1, "LOHA", ["LORA"], ESCAPES, LONG],
    "r": [None, 0, -1, True, 1.5, HUGE, "2", {}, 3],
    "lora_alpha": [None, "4", HUGE, [], 0, -1],
    "lora_dropout": ["x", 1, -1, HUGE, [0.1], {"a": 1}],
    "use_rslora": ["yes", 1, [1]],
    "target_modules": [None, 5, [], [1], {}, "(", "(a+)+$" * 20, ["x" * 100_000], LONG, [ESCAPES]],
    "exclude_modules": [5, "(", {"a": 1}, [1]],
    "rank_pattern": [5, [], {"q_proj": "x"}, {"(": 4}, {"q_proj": HUGE}, {"(a+)+$": 2}, {LONG: 4}],
    "alpha_pattern": [5, {"q_proj": None}, {"[": 4.0}, {"q_proj": HUGE}],
    "layers_to_transform": ["x", [1.5], {}, [True], [10**9]],
    "layers_pattern": [5, [1], {}],
    "bias": [1, "all", [], ESCAPES],
    "modules_to_save": [["lm_head"], "lm_head", 5],
    "use_dora": [True, 1, "x"],
    "init_lora_weights": ["pissa", 5, [1]],
    "an unknown key": [1, LONG],
    "trainable_token_indices": [[1], {"a": [1]}],
}
CONFIGS: dict[str, Make] = {
    "empty": put(CONFIG, ""),
    "a list": put(CONFIG, "[]"),
    "nested 2,000 deep": put(CONFIG, '{"peft_type": ' + nested(2000) + "}"),
    "not UTF-8": put(CONFIG, b'{"peft_type": "\xff"}'),
    "40 GB of nothing": sparse(CONFIG, 40 << 30),
    "a pipe": pipe(CONFIG),
    "a folder": folder(CONFIG),
    "a link out of the folder": all_of(
        edit(CONFIG, lambda raw: raw), link("run/adapter_config.json", "../m/config.json")
    ),
    "5,000 patterns": keys(CONFIG, rank_pattern={f"a{i}": 2 for i in range(5000)}),
}


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Make:
    def make(here: Path) -> None:
        held = load_file(here / file)
        change(held)
        save_file(held, here / file, metadata={"format": "pt"})

    return make


def first(change: Callable[[torch.Tensor], torch.Tensor], file: str = WEIGHTS) -> Make:
    """The first tensor changed."""
    return tensors(lambda held: held.update({min(held): change(held[min(held)]).contiguous()}), file)


def renamed(change: Callable[[str], str]) -> Make:
    return tensors(lambda held: [held.update({change(name): held.pop(name)}) for name in list(held)])


TENSORS: dict[str, Make] = {
    "empty": put(WEIGHTS, b""),
    "cut off": edit(WEIGHTS, lambda raw: raw[:-100]),
    "40 GB of nothing": sparse(WEIGHTS, 40 << 30),
    "a pipe": pipe(WEIGHTS),
    "not there": gone(WEIGHTS),
    "a pickle instead": all_of(gone(WEIGHTS), put("run/adapter_model.bin", b"\x80\x04.")),
    "a link out of the folder": all_of(gone(WEIGHTS), link(WEIGHTS, "../rm/adapter_model.safetensors")),
    "NaN": first(lambda t: t * float("nan")),
    "too large": first(lambda t: t.double() * 1e300 + 1e300),
    "whole numbers": first(lambda t: t.long()),
    "8-bit floats": first(lambda t: t.to(torch.float8_e5m2)),
    "turned round": first(lambda t: t.T),
    "of another rank": first(lambda t: torch.cat([t, t])),
    "with no element": first(lambda t: t[:0]),
    "missing": tensors(lambda held: held.pop(min(held))),
    "missing: all of them": tensors(lambda held: held.clear()),
    "unknown": tensors(lambda held: held.update(extra=torch.zeros(1))),
    "unknown, of escapes": tensors(lambda held: held.update({ESCAPES: torch.zeros(1)})),
    "unknown, of 100,000 characters": tensors(lambda held: held.update({LONG: torch.zeros(1)})),
    "whole numbers under 100,000 characters": tensors(lambda held: held.update({LONG: torch.zeros(1).long()})),
    "a whole weight of 100,000 characters": tensors(
        lambda held: held.update({LONG + "base_layer.weight": torch.zeros(1)})
    ),
    "a whole weight of the base": tensors(
        lambda held: held.update({"base_model.model.model.embed_tokens.weight": torch.zeros(259, 32)})
    ),
    "twice, with and without PEFT's prefix": tensors(
        lambda held: [held.update({name.removeprefix("base_model.model."): held[name].clone()}) for name in list(held)]
    ),
    "of a layer that is not there": renamed(lambda name: name.replace("layers.1", "layers.7")),
}
WRAPPED: dict[str, Make] = {
    "that was compiled": renamed(lambda name: name.replace("model.model.", "model._orig_mod.model.")),
    "in parallel": renamed(lambda name: "module." + name),
    "compiled in parallel": renamed(lambda name: "_orig_mod.module." + name),
}
OURS = "format: fourbit run 1\n"
SETTINGS: dict[str, str] = {  # config.yaml of a model's folder that a run of ours made
    "a list": "- a\n",
    "no YAML": "a: [b\n",
    "quant a list": "quant: [nf4]\n",
    "quant a number": "quant: 4\n",
    "quant unknown": "quant: gptq\n",
    "quant of escapes": 'quant: "\\e[2J\\x07"\n',
    "quant true": "quant: true\n",
    "quant of 10,000 characters": "quant: " + "x" * 10_000 + "\n",
    "quant twice": "quant: nf4\nquant: nf4\n",
    "aliases that unfold": aliases(9),
}
FOREIGN: dict[str, str] = {**SETTINGS, "of another version": "format: fourbit run 2\nquant: gptq\n", "empty": ""}


def stamped(**changes: str) -> Make:
    """The adapter's file says something else of its base."""

    def make(here: Path) -> None:
        with safe_open(here / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        save_file(
            load_file(here / WEIGHTS), here / WEIGHTS, metadata=metadata | {KEY + k: v for k, v in changes.items()}
        )

    return make


STAMPS: dict[str, Make] = {
    "another base's norms": stamped(vectors="0" * 64),
    "another base's signs": stamped(signs="+" * 100),
    "no signs": stamped(signs=""),
    "signs that are none": stamped(signs="01" * 400),
    "signs of a megabyte": stamped(signs="+" * 1_000_000),
    "a form of escapes": stamped(quant=ESCAPES),
    "a form of 100,000 characters": stamped(quant=LONG),
    "no form": stamped(quant=""),
    "a hash of escapes": stamped(weights=ESCAPES),
    "a hash of half its length": stamped(weights="0" * 32),
}
TEMPLATES: dict[str, Make] = {  # that go with the adapter
    "not UTF-8": put(TEMPLATE, b"\xff"),
    "of 100,000 characters": put(TEMPLATE, LONG),
    "a pipe": all_of(gone(TEMPLATE), pipe(TEMPLATE)),
    "a folder": all_of(gone(TEMPLATE), folder(TEMPLATE)),
    "a link out of the folder": all_of(gone(TEMPLATE), link(TEMPLATE, "../m/config.json")),
    "40 GB of nothing": all_of(gone(TEMPLATE), sparse(TEMPLATE, 40 << 30)),
}
METRICS: dict[str, str] = {
    "a number a line": "5\n",
    "a list a line": "[1]\n",
    "null": "null\n",
    "no step": '{"loss": 1}\n',
    "a step that is a text": '{"step": "1", "loss": 1}\n',
    "a step that is null": '{"step": null}\n',
    "a loss that is a text": '{"step": 1, "loss": "x"}\n',
    "a loss that is a list": '{"step": 1, "loss": [1]}\n{"step": 1, "val_loss": {}}\n',
    "a step of 400 digits": '{"step": ' + "9" * 400 + ', "loss": 1}\n',
    "a number of 5,000 digits": '{"step": 1, "loss": ' + "9" * 5000 + "}\n",
    "nested 2,000 deep": nested(2000) + "\n",
}
STATE: dict[str, dict[str, Any]] = {
    "run a list": {"run": []},
    "run of unknown keys": {"run__extra": 1},
    "done a text": {"run__done": "1"},
    "done -1": {"run__done": -1},
    "done huge": {"run__done": HUGE},
    "done null": {"run__done": None},
    "skipped a list": {"run__skipped_in_a_row": []},
    "tokens a text": {"run__tokens": "many"},
    "best metrics a list": {"run__best_metrics": [1]},
    "best metrics of texts": {"run__best_metrics": {"loss": "low"}},
    "config a list": {"config": []},
    "config null": {"config": None},
    "config of other types": {"config__lr": "fast", "config__seed": [1]},
    "config of 100,000 characters": {"config__template": LONG},
    "data a number": {"data": 5},
    "no data": {"data": DROPPED},
}


def signed(change: Make) -> Make:
    """A checkpoint changed, and its manifest made to fit: what someone else's program may write."""

    def make(here: Path) -> None:
        change(here)
        path = here / STEP / "manifest.json"
        body = json.loads(path.read_text())
        body["files"] = {
            name: {
                "bytes": (here / STEP / name).stat().st_size,
                "sha256": hashlib.sha256((here / STEP / name).read_bytes()).hexdigest(),
            }
            for name in body["files"]
        }
        del body["sha256"]
        body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        path.write_bytes(json.dumps(body, sort_keys=True, indent=1).encode() + b"\n")

    return make


FILES: dict[str, Make] = {  # of a checkpoint, not signed
    "no manifest": gone(f"{STEP}/manifest.json"),
    "a manifest that is a list": put(f"{STEP}/manifest.json", "[]"),
    "a manifest that is a pipe": pipe(f"{STEP}/manifest.json"),
    "a manifest nested 2,000 deep": put(f"{STEP}/manifest.json", nested(2000)),
    "a manifest of 40 GB": sparse(f"{STEP}/manifest.json", 40 << 30),
    "a state that is torn": edit(f"{STEP}/state.json", lambda raw: raw[:-20]),
    "weights that are torn": edit(f"{STEP}/weights.safetensors", lambda raw: raw[:-1] + b"\xff"),
    "weights that are a pipe": pipe(f"{STEP}/weights.safetensors"),
}
HEADS: dict[str, Make] = {
    "empty": put("rm/reward_head.safetensors", b""),
    "of two tensors": tensors(lambda held: held.update(x=torch.zeros(1)), "rm/reward_head.safetensors"),
    "of another name, of escapes": tensors(
        lambda held: held.update({ESCAPES: held.pop(min(held))}), "rm/reward_head.safetensors"
    ),
    "of another name, of 100,000 characters": tensors(
        lambda held: held.update({LONG: held.pop(min(held))}), "rm/reward_head.safetensors"
    ),
    "of another size": first(lambda t: t[:, :3], "rm/reward_head.safetensors"),
    "NaN": first(lambda t: t * float("nan") + float("nan"), "rm/reward_head.safetensors"),
    "whole numbers": first(lambda t: t.long(), "rm/reward_head.safetensors"),
    "a pipe": pipe("rm/reward_head.safetensors"),
    "not there": gone("rm/reward_head.safetensors"),
}

MAYBE: list[Any] = [[], {LONG: 4}, "(a+)+$" * 20]  # of these some change nothing

TABLE = [
    *[
        Case(
            f"adapter: {name} = {told(value)}",
            keys(CONFIG, **{name: value}),
            ADAPTED,
            ends="either" if value in MAYBE and name in ("rank_pattern", "target_modules") else "refused",
        )
        for name, values in WRONG.items()
        for value in values
    ],
    *[Case(f"adapter config: {name}", make, ADAPTED) for name, make in CONFIGS.items()],
    *[Case(f"adapter tensor: {name}", make, ADAPTED) for name, make in TENSORS.items()],
    *[Case(f"adapter tensor: names of a model {name}", make, ADAPTED, "done") for name, make in WRAPPED.items()],
    *[Case(f"adapter stamp: {name}", make, ADAPTED) for name, make in STAMPS.items()],
    *[Case(f"adapter template: {name}", make, ADAPTED) for name, make in TEMPLATES.items()],
    *[Case(f"run settings: {name}", put("m/config.yaml", OURS + text), CHAT) for name, text in SETTINGS.items()],
    *[Case(f"foreign config.yaml: {n}", put("m/config.yaml", text), CHAT, "done") for n, text in FOREIGN.items()],
    *[
        Case(f"run settings, resumed: {name}", put("run/config.yaml", OURS + text), RESUME, outputs=LOCK)
        for name, text in {
            "rank a list": "rank: [2]\n",
            "model a number": "model: 5\n",
            "target a mapping": "target: {a: b}\n",
            "quant of 10,000 characters": "quant: " + "x" * 10_000 + "\n",
            "no YAML": "a: [b\n",
            "aliases that unfold": aliases(9),
        }.items()
    ],
    *[
        Case(f"run metrics: {name}", put("run/metrics.jsonl", text), RESUME, ends="either", outputs=("run", *LOCK))
        for name, text in METRICS.items()
    ],
    *[
        Case(f"run metrics: {name}", make, RESUME, outputs=LOCK)
        for name, make in {
            "a pipe": pipe("run/metrics.jsonl"),
            "a folder": folder("run/metrics.jsonl"),
            "a link to the model": link("run/metrics.jsonl", "../m/model.safetensors"),
            "40 GB of nothing": sparse("run/metrics.jsonl", 40 << 30),
        }.items()
    ],
    Case(
        "run metrics: a line of 200 MB",
        put("run/metrics.jsonl", "x" * 200_000_000),
        RESUME,
        ends="either",
        outputs=("run", *LOCK),
    ),
    *[
        Case(f"checkpoint state: {name}", signed(keys(f"{STEP}/state.json", **changes)), RESUME, outputs=LOCK)
        for name, changes in STATE.items()
    ],
    *[Case(f"checkpoint: {name}", make, RESUME, outputs=LOCK) for name, make in FILES.items()],
    Case(
        "checkpoint: weights of NaN",
        signed(first(lambda t: t * float("nan"), f"{STEP}/weights.safetensors")),
        RESUME,
        outputs=LOCK,
    ),
    Case(
        "checkpoint: weights turned round",
        signed(first(lambda t: t.T, f"{STEP}/weights.safetensors")),
        RESUME,
        outputs=LOCK,
    ),
    Case(
        "checkpoint: no weights",
        signed(tensors(lambda held: held.clear(), f"{STEP}/weights.safetensors")),
        RESUME,
        outputs=LOCK,
    ),
    Case(
        "checkpoint: an optimizer's state of another size",
        signed(
            tensors(
                lambda held: [held.update({n: held[n].flatten()[:1].clone()}) for n in list(held)],
                f"{STEP}/optimizer.safetensors",
            )
        ),
        RESUME,
        outputs=LOCK,
    ),
    Case(
        "checkpoint: no generator's state",
        signed(tensors(lambda held: held.clear(), f"{STEP}/rng.safetensors")),
        RESUME,
        outputs=LOCK,
    ),
    Case(
        "checkpoint: a generator's state that is none",
        signed(tensors(lambda held: [held.update({n: torch.zeros(3)}) for n in list(held)], f"{STEP}/rng.safetensors")),
        RESUME,
        outputs=LOCK,
    ),
    Case("checkpoint: a state that is a list", signed(put(f"{STEP}/state.json", "[]")), RESUME, outputs=LOCK),
    Case("checkpoint: one that is none", all_of(), (*RUN, "--resume", "m"), outputs=LOCK),
    Case("checkpoint: another kind's", all_of(), (*RUN, "--resume", "rm/checkpoints/step-000001"), outputs=LOCK),
    *[Case(f"reward head: {name}", make, ("RewardModel.load", "rm"), ends="refused") for name, make in HEADS.items()],
    Case("adapter: a reward model's, for chat", all_of(), (*CHAT, "--adapter", "rm")),
    Case("adapter: a file", all_of(), (*CHAT, "--adapter", "good.jsonl")),
    Case("adapter: the model", all_of(), (*CHAT, "--adapter", "m")),
]
CASES = [replace(case, made=True) for case in TABLE]
