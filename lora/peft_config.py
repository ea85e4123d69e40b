"""adapter_config.json, PEFT's description of an adapter: read strictly, written with few keys.

Reading: the file is untrusted and may come from a newer PEFT. A key that could change what the adapter computes is
either understood or refused by name; one that cannot, and any key left at an empty default, is accepted.
Writing: only keys that PEFT has known since rsLoRA came (0.7), because old versions stop at a key they do not know.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError
from .adapter import Adapter
from .config import LoRAConfig, pattern_value
from .lora import scale_of
from .safe_regex import backtracks_little
from .targets import base_modules, linear_layers, matcher, output_heads

UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
}  # fmt: skip
HARMLESS = {  # what they hold has no part in the forward pass of a saved adapter
    "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
STARTS_THAT_KEEP_THE_BASE = ("true", "false", "gaussian", "orthogonal", "eva")  # others rewrite the base weights too


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says: the LoRA settings, and PEFT's limits on which layers they reach."""

    lora: LoRAConfig
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def targeted(self, model: nn.Module) -> list[str] | None:
        """Paths of the linear layers of `model` that the file means, in module order, by PEFT's (lenient) rules.

        None if that takes a regular expression that could run without end; the file's tensors must tell then.
        """
        for rule in (self.lora.target, self.lora.exclude):
            if isinstance(rule, str) and not backtracks_little(rule):
                return None
        target, everything = self.lora.target, self.lora.target == "all-linear"
        heads = output_heads(model) if everything else set()
        wanted, unwanted = matcher(target), matcher(self.lora.exclude)
        names = [name for name in linear_layers(model) if name not in heads and not unwanted(name)]
        return [name for name in names if everything or (wanted(name) and self._in_layers(name))]

    def _in_layers(self, name: str) -> bool:
        """PEFT's layers_to_transform, which a full path overrides."""
        if self.layers_to_transform is None or name in self.lora.target:
            return True
        return _layer_index(name, self.layers_pattern) in self.layers_to_transform


def read_config(text: str, file: str) -> PeftConfig:
    """Parse the text of an adapter_config.json, which errors call `file`; InputError for whatever is not plain LoRA."""
    raw = _json_object(text, file)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file}: peft_type must be 'LORA', got {kind!r}; fourbit reads LoRA adapters")
    for key in ("r", "lora_alpha", "target_modules"):
        if raw.get(key) is None:
            raise InputError(f"{file}: the key '{key}' is missing; PEFT writes it into every LoRA adapter")
    _refuse_unsupported(raw, file)
    for key in ("rank_pattern", "alpha_pattern"):
        _refuse_costly_patterns(raw.get(key), key, file)
    try:
        lora = LoRAConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout") or 0.0,
            target=raw["target_modules"],
            rslora=raw.get("use_rslora") or False,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            exclude=raw.get("exclude_modules") or (),
        )
    except InputError as problem:
        raise InputError(f"{file}: {problem}") from None
    if isinstance(lora.target, str) and raw.get("layers_to_transform") is not None:
        raise InputError(f"{file}: layers_to_transform goes with a list in target_modules, got {lora.target!r}")
    return PeftConfig(lora, _indices(raw.get("layers_to_transform"), file), _strings(raw.get("layers_pattern"), file))


def write_config(model: nn.Module, parts: Mapping[str, Adapter], base_model: str) -> str:
    """The text of an adapter_config.json for an adapter of `model`, given by its layers' paths."""
    fields = {path: part.peft_fields() for path, part in parts.items()}
    rslora = all(own["use_rslora"] for own in fields.values())
    ranks = {path: own["r"] for path, own in fields.items()}
    alphas = {path: _alpha(own, rslora) for path, own in fields.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    settings = {
        "peft_type": next(iter(parts.values())).peft_type,
        "task_type": "CAUSAL_LM" if output_heads(model) else None,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _as_integer(alpha),
        "lora_dropout": _most_common(own["lora_dropout"] for own in fields.values()),
        "use_rslora": rslora,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": {key: _as_integer(value) for key, value in _pattern(alphas, alpha).items()},
        "target_modules": _target_modules(model, list(parts)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _alpha(fields: Mapping[str, Any], rslora: bool) -> float:
    """The alpha that gives a layer its scale where the whole adapter is rsLoRA, or is not."""
    if rslora or not fields["use_rslora"]:
        return float(fields["lora_alpha"])
    return scale_of(fields["lora_alpha"], fields["r"], True) * fields["r"]


def _json_object(text: str, file: str) -> dict[str, Any]:
    try:
        raw = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{file}: this is no valid JSON: {str(problem) or 'nested too deeply'}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: an adapter_config.json holds one JSON object, this one holds a {type(raw).__name__}")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"the key {twice[0]!r} stands there twice")
    return dict(pairs)


def _refuse_unsupported(raw: Mapping[str, Any], file: str) -> None:
    """Every key that is neither understood nor harmless must be at an empty default (null, false, 0, "", [] or {})."""
    if raw.get("bias") not in (None, "none"):
        raise InputError(f"{file}: bias must be 'none', got {raw['bias']!r}; trained biases are not supported")
    start = raw.get("init_lora_weights")
    if start is not None and str(start).lower() not in STARTS_THAT_KEEP_THE_BASE:
        raise InputError(
            f"{file}: init_lora_weights={start!r} rewrites the base model's weights too, so this adapter does not fit "
            "the plain base. Convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion) and "
            "load the result."
        )
    for key, value in raw.items():
        if value and key not in UNDERSTOOD | HARMLESS:
            raise InputError(
                f"{file}: {key}={value!r} is a PEFT feature that fourbit does not support, and without it the adapter "
                "would compute something else. Merge the adapter with PEFT, or train one without this feature."
            )


def _refuse_costly_patterns(patterns: object, key: str, file: str) -> None:
    for pattern in patterns if isinstance(patterns, dict) else ():
        if not backtracks_little(pattern):
            raise InputError(
                f"{file}: the {key} key {pattern!r} may take very long to match, and files from elsewhere are not "
                "trusted that far. Write it without repeated groups, or with layer names."
            )


def _indices(value: object, file: str) -> tuple[int, ...] | None:
    """layers_to_transform: an index, a list of them, or nothing."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in values):
        raise InputError(f"{file}: layers_to_transform must be a whole number or a list of them, got {value!r}")
    return tuple(values) or None


def _strings(value: object, file: str) -> tuple[str, ...]:
    """layers_pattern: a name, a list of them, or nothing."""
    values = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(name, str) for name in values):
        raise InputError(f"{file}: layers_pattern must be a name or a list of names, got {value!r}")
    return tuple(values)


def _layer_index(name: str, containers: Sequence[str]) -> int | None:
    """Number of the layer that `name` lies in: after one of the containers, or the first number at depth 2 or more."""
    parts = name.split(".")[:-1]
    for container in containers or (None,):
        for place, part in enumerate(parts):
            if part.isdecimal() and (place >= 2 if container is None else place >= 1 and parts[place - 1] == container):
                return int(part)
    return None


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _as_integer(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The shortest rank or alpha pattern that gives every layer its value under PEFT's matching rule."""
    if set(values.values()) == {default}:
        return {}
    exceptions = {name: value for name, value in sorted(values.items()) if value != default}
    by_leaf = {re.escape(name.rpartition(".")[2]): value for name, value in exceptions.items()}
    by_path = {re.escape(name): value for name, value in exceptions.items()}
    for keys in (by_leaf, by_path):
        if all(pattern_value(keys, name, default) == value for name, value in values.items()):
            return keys
    return {f"^{key}": value for key, value in by_path.items()}


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Last parts if they mean these layers and no other module, else full paths, else an exact regular expression."""
    attached = set(names)
    others = [name for name in base_modules(model) if name not in attached]
    for entries in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if not any(map(matcher(entries), others)):
            return entries
    return "|".join(re.escape(name) for name in sorted(names))
