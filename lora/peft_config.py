"""adapter_config.json, PEFT's description of an adapter: read strictly, written with few keys.

Reading: the file is untrusted and may come from a newer PEFT. A key that could change what the adapter computes is
either understood or refused by name; one that cannot, and any key left at an empty default, is accepted.
Writing: only keys that PEFT has known since rsLoRA came (0.7), because old versions stop at a key they do not know.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError
from .adapter import Adapter
from .config import LoRAConfig, pattern_value
from .lora import scale_of
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


PATH_LENGTH = 64  # characters of a module's path: what a match reads, and what a repetition may give back one by one
MOST_STEPS = 1 << 20  # of matching all patterns of a file to one path: under a millisecond or two


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says: the LoRA settings, and whether they hold for some numbered layers only."""

    lora: LoRAConfig
    some_layers: bool = False

    def targeted(self, model: nn.Module) -> list[str] | None:
        """Paths of the linear layers of `model` that the file's lists mean, in module order, by PEFT's lenient rules.

        None where the file's tensors must say: for numbered layers, and for a regular expression, which in a file from
        elsewhere may be made to never end.
        """
        target, exclude, everything = self.lora.target, self.lora.exclude, self.lora.target == "all-linear"
        if self.some_layers or isinstance(exclude, str) or (isinstance(target, str) and not everything):
            return None
        spared = output_heads(model) if everything else set()
        wanted, unwanted = matcher(target), matcher(exclude)
        layers = [path for path in linear_layers(model) if path not in spared and not unwanted(path)]
        return [path for path in layers if everything or wanted(path)]


def read_config(raw: Mapping[str, Any], file: str) -> PeftConfig:
    """Check what an adapter_config.json, called `file` in errors, holds; InputError for whatever is not plain LoRA."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file}: peft_type must be 'LORA', got {kind!r}; fourbit reads LoRA adapters")
    for key in ("r", "lora_alpha", "target_modules"):
        if raw.get(key) is None:
            raise InputError(f"{file}: the key '{key}' is missing; PEFT writes it into every LoRA adapter")
    _refuse_unsupported(raw, file)
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
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        if sum(map(most_steps, patterns)) > MOST_STEPS:
            raise InputError(
                f"{file}: {key} may take very long to match, above all {max(patterns, key=most_steps)!r}, and files "
                "from elsewhere are not trusted that far. Write it with layer names, or with fewer choices."
            )
    return PeftConfig(lora, raw.get("layers_to_transform") not in (None, []))


def most_steps(pattern: str) -> int:
    """A bound on the steps of matching `pattern` to a module path, about; beyond any limit for one with no small bound.

    Python's matcher backtracks. Without a repeated group each choice in the pattern is met once on a way through it, so
    their product bounds the ways. An escaped character is no choice; one in a character class is counted as if it were.
    """
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL).replace("(?:", "(")
    if re.search(r"\)[*+?{]|\(\?", plain):
        return MOST_STEPS + 1
    repetitions, alternatives = len(re.findall(r"[*+?{]", plain)), plain.count("|") * ("(" in plain)
    return PATH_LENGTH ** min(1 + repetitions, 9) * 2 ** min(alternatives, 99)


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
