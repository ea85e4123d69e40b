"""adapter_config.json, PEFT's description of an adapter: read strictly, written with few keys.

Reading: a key that could change what the adapter computes is either understood or refused by name; one that cannot, and
any key left at an empty default, is accepted.
Writing: only keys that PEFT has known since rsLoRA came (0.7), because old versions stop at a key they do not know.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mode
from typing import Any, Protocol

from torch import nn

from ..errors import InputError, shown
from .adapter import Adapter, Whole
from .config import LoRAConfig, pattern_value
from .lora import OWN, LoRAParameter, scale_of
from .targets import CLASSIFIERS, adaptable_layers, base_modules, linear_layers, matcher, output_heads, vocabulary_heads
from .tokens import INPUT, TokenRows

REQUIRED = {"r", "lora_alpha", "target_modules", "projection_prng_key"}  # where the kind has it
_ANY = {"target_modules": "target", "exclude_modules": "exclude", "modules_to_save": "modules_to_save"}
_ANY |= {"trainable_token_indices": "train_tokens"}
FIELDS: dict[str, dict[str, str]] = {  # peft_type -> PEFT's name -> that of LoRAConfig
    "LORA": {
        "r": "rank", "lora_alpha": "alpha", **_ANY, "lora_dropout": "dropout", "use_rslora": "rslora",
        "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "bias": "bias",
        "target_parameters": "target_parameters",
    },
    "VERA": {"r": "rank", "vera_dropout": "dropout", "projection_prng_key": "projection_seed", "bias": "bias"} | _ANY,
    "IA3": {"feedforward_modules": "feedforward"} | _ANY,
}  # fmt: skip
UNDERSTOOD = {"peft_type", "use_dora", "layers_to_transform", "layers_pattern", "init_lora_weights", "save_projection"}
STARTS = {"init_lora_weights": True, "init_weights": True, "init_ia3_weights": True, "d_initial": 0.1}  # ours
HARMLESS = {  # what they hold has no part in the forward pass of a saved adapter
    "init_weights", "init_ia3_weights", "d_initial",
    "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
KIND = "fourbit."  # what a peft_type that PEFT does not have begins with
STARTS_THAT_KEEP_THE_BASE = ("true", "false", "gaussian", "orthogonal", "eva")  # others rewrite the base weights too

PATH_LENGTH = 64  # characters of a module's path: what a match reads, and what a repetition may give back one by one
MOST_STEPS = 1 << 20  # of matching a regular expression, or all keys of a pattern, to one path: some milliseconds
MOST_KEYS = 4096  # of a rank or alpha pattern: to compile both takes a second or two, to match a path milliseconds


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says: the LoRA settings, and PEFT's limits on which layers they reach."""

    lora: LoRAConfig
    kind: str = "LORA"
    layers_to_transform: tuple[int, ...] = ()  # all
    layers_pattern: tuple[str, ...] = ()

    def targeted(self, model: nn.Module) -> list[str] | None:
        """Paths of the layers of `model` that the file means, in module order, by PEFT's (lenient) rules.

        None if that takes a regular expression that could run without end; the file's tensors must tell then."""
        target, exclude, everything = self.lora.target or (), self.lora.exclude, self.lora.target == "all-linear"
        if any(isinstance(rule, str) and most_steps(rule) > MOST_STEPS for rule in (target, exclude)):
            return None
        spared = output_heads(model) if everything else set()
        wanted, unwanted = matcher(target), matcher(exclude)
        there = linear_layers(model) if everything else adaptable_layers(model)
        layers = [path for path in there if path not in spared and not unwanted(path)]
        return [path for path in layers if everything or (wanted(path) and self.in_layers(path))]

    def lora_for(self, model: nn.Module) -> LoRAConfig:
        """The settings, without heads that this model does not have: PEFT names all that a task could have."""
        modules, named = base_modules(model), self.lora.modules_to_save
        there = [name for name in named if name not in CLASSIFIERS or any(map(matcher([name]), modules))]
        return replace(self.lora, modules_to_save=there or named)

    def in_layers(self, path: str) -> bool:
        """PEFT's layers_to_transform, which a full path overrides."""
        numbers = self.layers_to_transform
        return not numbers or path in (self.lora.target or ()) or _layer_index(path, self.layers_pattern) in numbers


class PeftLike(Protocol):
    """What is asked of peft's LoraConfig."""

    def to_dict(self) -> dict[str, object]: ...


def from_peft(config: PeftLike | Mapping[str, object]) -> PeftConfig:
    """Settings of a new adapter, from peft's config of a kind in FIELDS. InputError unless it starts as usual."""
    raw = dict(config if isinstance(config, Mapping) else config.to_dict())
    for key, ours in STARTS.items():
        if (start := raw.get(key, ours)) is not ours and start != ours:
            raise InputError(f"the LoraConfig: {key} must be {ours}, fourbit's start, got {shown(start)}")
    read, task = read_config({"peft_type": "LORA"} | raw, "the LoraConfig"), str(raw.get("task_type"))
    named = dict.fromkeys((*read.lora.modules_to_save, *(sorted(CLASSIFIERS) if task.endswith(("CLS", "ANS")) else ())))
    return replace(read, lora=replace(read.lora, modules_to_save=[*named]))


def read_config(raw: Mapping[str, Any], file: str) -> PeftConfig:
    """Check what an adapter_config.json, called `file` in errors, holds; InputError for a kind or a key of PEFT's that
    is not known here."""
    kind = getattr(raw.get("peft_type"), "value", raw.get("peft_type"))  # peft's own objects hold an Enum
    own = str(kind).startswith(KIND)
    if not isinstance(kind, str) or not (kind in FIELDS or own):
        raise InputError(f"{file}: peft_type must be one of {', '.join(FIELDS)}, got {kind!r}")
    names = FIELDS["LORA" if own else kind]
    alone = raw.get("target_parameters") and not raw.get("target_modules")  # adapted, and no layer
    required = [key for key in names if key in REQUIRED and not (alone and key == "target_modules")]
    for key in required:
        if raw.get(key) is None:
            raise InputError(f"{file}: the key '{key}' is missing; PEFT writes it into every {kind} adapter")
    _refuse_unsupported(raw, file, names)
    try:
        said = {ours: raw[key] for key, ours in names.items() if raw.get(key) or key in required}
        said["kind"] = "dora" if raw.get("use_dora") else "lora" if own else kind.lower()
        if isinstance(rows := said.get("train_tokens"), list):
            said["train_tokens"] = {INPUT: rows}  # PEFT's list is no untied head's
        lora = LoRAConfig(**({"target": None} if alone else {}) | said)
    except InputError as problem:
        raise InputError(f"{file}: {problem}") from None
    inputs = [lora.feedforward] if isinstance(lora.feedforward, str) else []
    for key, patterns in (
        ("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern), ("feedforward_modules", inputs),
    ):  # fmt: skip
        if len(patterns) > MOST_KEYS:
            raise InputError(f"{file}: {key} must have at most {MOST_KEYS:,} keys, got {len(patterns):,}")
        if sum(map(most_steps, patterns)) > MOST_STEPS:
            raise InputError(
                f"{file}: {key} may take very long to match, above all {max(patterns, key=most_steps)!r}, and files "
                "from elsewhere are not trusted that far. Write it with layer names, or with fewer choices."
            )
    if isinstance(lora.target, str) and raw.get("layers_to_transform") is not None:
        raise InputError(f"{file}: layers_to_transform goes with a list in target_modules, got {lora.target!r}")
    indices = _listed(raw, "layers_to_transform", int, "whole number", file)
    return PeftConfig(lora, kind, indices, _listed(raw, "layers_pattern", str, "name", file))


def most_steps(pattern: str) -> int:
    """A bound on the steps of matching `pattern` to a module path, about; beyond any limit for one with no small bound.

    Python's matcher backtracks. Without a repeated group each choice in the pattern is met once on a way through it, so
    their product bounds the ways; without any group the alternatives are tried one by one."""
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL).replace("(?:", "(")
    if re.search(r"\)[*+?{]|\(\?", plain):
        return MOST_STEPS + 1
    repetitions, bars = len(re.findall(r"[*+?{]", plain)), plain.count("|")
    return PATH_LENGTH ** min(1 + repetitions, 9) * (2 ** min(bars, 99) if "(" in plain else 1 + bars)


def write_config(model: nn.Module, parts: Mapping[str, Adapter], base_model: str) -> str:
    """The text of an adapter_config.json for an adapter of `model`, given by its layers' paths."""
    kinds = {kind_of(part) for part in parts.values() if not isinstance(part, Whole | TokenRows)}
    kind, *more = kinds - {"LORA"} if OWN in kinds else kinds
    if more:
        raise InputError(f"a file holds an adapter of one kind, and this one's are of {', '.join((kind, *more))}")
    fields = {path: part.peft_fields() for path, part in parts.items() if not isinstance(part, Whole | TokenRows)}
    rows = {path: part.tokens for path, part in parts.items() if isinstance(part, TokenRows) and not part.follows}
    parameters = [path for path, part in parts.items() if isinstance(part, LoRAParameter)]
    config = next(iter(parts.values())).config or LoRAConfig()
    base = Path(base_model)  # PEFT finds it from any folder by its whole path, or a hub's name; it opens no file
    named = str(base.resolve()) if base_model and base.is_dir() else None if base.is_file() else base_model or None
    settings = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM" if vocabulary_heads(model) else None,
        "base_model_name_or_path": named,
        "inference_mode": True,
        **_settings(fields),
        "target_modules": _target_modules(model, [path for path in fields if path not in parameters]),
        **({"target_parameters": parameters} if parameters else {}),  # older PEFT stops at the word
        **({"trainable_token_indices": rows} if rows else {}),
        **({"use_dora": True} if config.kind == "dora" else {}),  # and at this one
        "bias": config.bias,
        "fan_in_fan_out": False,
        "modules_to_save": [*filter(matcher(config.modules_to_save), base_modules(model))] or None,  # not ends, as IA3
    }
    if kind == "IA3":  # PEFT compares names of feedforward layers by their ends without a dot, and expressions whole
        inputs = [path for path, own in fields.items() if own["feedforward_modules"]]
        settings |= {"target_modules": _exactly(fields), "feedforward_modules": _exactly(inputs)}
        del settings["bias"]
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _settings(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the layers' fields, by path, are in the file of all: the commonest value; of ranks and alphas, patterns."""
    some = next(iter(fields.values()))
    settings = {key: mode(own[key] for own in fields.values()) for key in some}
    if "lora_alpha" not in some:
        return settings
    rslora = all(own["use_rslora"] for own in fields.values())
    ranks = {path: own["r"] for path, own in fields.items()}
    alphas = {path: float(own["lora_alpha"]) for path, own in fields.items()}
    for path in [path for path, own in fields.items() if own["use_rslora"] and not rslora]:
        alphas[path] = scale_of(alphas[path], ranks[path], True) * ranks[path]  # for the same scale without it
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return settings | {
        "lora_alpha": _as_integer(alpha),
        "use_rslora": rslora,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": {key: _as_integer(value) for key, value in _pattern(alphas, alpha).items()},
        "init_lora_weights": True,
    }


def kind_of(part: Adapter) -> str:
    """The kind of an adapter's part as peft_type; PEFT refuses by that name what it does not have.

    A subclass may compute something else, so only a class (or an object) that says `peft_type` itself counts."""
    own = vars(part).get("peft_type") or vars(type(part)).get("peft_type")
    return str(own or f"{KIND}{type(part).__name__}")


def _refuse_unsupported(raw: Mapping[str, Any], file: str, names: Mapping[str, str]) -> None:
    """Every key that is neither understood nor harmless must be at an empty default (null, false, 0, "", [] or {})."""
    start = raw.get("init_lora_weights")
    if start is not None and str(start).lower() not in STARTS_THAT_KEEP_THE_BASE:
        raise InputError(
            f"{file}: init_lora_weights={start!r} rewrites the base model's weights too, so this adapter does not fit "
            "the plain base. Convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion) and "
            "load the result."
        )
    for key, value in raw.items():
        if value and key not in names.keys() | UNDERSTOOD | HARMLESS:
            raise InputError(
                f"{file}: {key}={value!r} is a PEFT feature that fourbit does not support, and without it the adapter "
                "would compute something else. Merge the adapter with PEFT, or train one without this feature."
            )


def _listed(raw: Mapping[str, Any], key: str, kind: type, what: str, file: str) -> tuple[Any, ...]:
    """One value, a list of them, or nothing: all as a tuple."""
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if not all(type(one) is kind for one in values):
        raise InputError(f"{file}: {key} must be a {what} or a list of them, got {value!r}")
    return tuple(values)


def _layer_index(path: str, containers: Sequence[str]) -> int | None:
    """Number of the layer that `path` lies in: after one of the containers, or the first number at depth 2 or more."""
    parts = path.split(".")[:-1]
    for container in containers or (None,):
        for place, part in enumerate(parts):
            if part.isdecimal() and (place >= 2 if container is None else place >= 1 and parts[place - 1] == container):
                return int(part)
    return None


def _as_integer(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The shortest rank or alpha pattern that gives every layer its value under PEFT's matching rule."""
    if set(values.values()) == {default}:
        return {}
    exceptions = {name: value for name, value in sorted(values.items()) if value != default}
    by_leaf = {re.escape(name.rpartition(".")[2]): value for name, value in exceptions.items()}
    if all(pattern_value(by_leaf, name, default) == value for name, value in values.items()):
        return by_leaf
    return {f"^{re.escape(name)}": value for name, value in exceptions.items()}


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Last parts if they mean these layers and no other module, else full paths, else an exact regular expression."""
    attached = set(names)
    others = [name for name in base_modules(model) if name not in attached]
    for entries in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if not any(map(matcher(entries), others)):
            return entries
    return _exactly(names)


def _exactly(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names))
