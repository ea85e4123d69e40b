"""Which layers a LoRAConfig means: names and patterns resolved against a model, strictly.

The matching rules are PEFT's (a list entry is a full path or its end after a dot; a string is a regular expression on
the full path; a pattern key matches the end of a path), but an entry that matches nothing is an error that shows the
nearest names: a silent typo trains the wrong layers.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError
from .config import LoRAConfig, pattern_key
from .layer import AdapterLayer, plain_modules
from .linear4bit import NF4Linear
from .lora import LoRAParameter, is_linear, lora_kind
from .parameter4bit import DenseParameter, StandIn, stand_in

Linear = nn.Linear | NF4Linear

PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # words in a path, last parts
    "attn": (("attn", "attention"), ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value")),
    "mlp": (
        ("mlp", "ffn", "feed_forward", "feedforward"),
        ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"),
    ),
}
ADAPTABLE = "linear layer, embedding or convolution"
CLASSIFIERS = {"classifier", "score", "qa_outputs"}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module in module order, as if no adapter were attached: an AdapterLayer stands for its base."""
    modules = plain_modules(model).items()
    return {path: module.base if isinstance(module, AdapterLayer) else module for path, module in modules}


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every linear layer: nn.Linear, NF4Linear, Conv1D of transformers, by what they compute. Errors as below."""
    return {name: cast(Linear, layer) for name, layer in adaptable_layers(model).items() if is_linear(layer)}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that LoRA can be put on: linear layers, embeddings, convolutions.

    InputError for a model that has lazy modules without sizes."""
    if lazy := next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None):
        raise InputError(f"'{lazy}' has no size yet: run the model on a batch first, which makes its lazy modules")
    kinds = {name: (layer, lora_kind(layer)) for name, layer in base_modules(model).items()}
    return {name: layer for name, (layer, kind) in kinds.items() if kind not in (None, LoRAParameter)}


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str, Any]]:
    """Path -> holder, name and parameter, of those of two or three dimensions that are no layer's weight, torch's own
    layers included; a stand-in is the holder of its own, which is called as what it stands for."""
    return {
        path if isinstance(module, StandIn) else f"{path}.{name}".lstrip("."): (module, name, parameter)
        for path, module in base_modules(model).items()
        if isinstance(module, StandIn) or not (lora_kind(module) or type(module).__module__.startswith("torch."))
        for name, parameter in ([("", module.weight)] if isinstance(module, StandIn) else module._parameters.items())
        if parameter is not None and parameter.ndim in (2, 3)
    }


def expert_parameters(model: nn.Module) -> dict[str, Any]:
    """Path -> parameter that holds a matrix for each expert, or what is read in its place: of three dimensions, in a
    module that has "expert" in its path or its class's name, as the fused experts of transformers 5 have."""
    return {
        path: parameter
        for path, (module, _, parameter) in _parameters(model).items()
        if "expert" in f"{path} {type(module).__name__}".lower() and parameter.ndim == 3 and not parameter.is_complex()
    }


def expose(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Paths of the parameters that `entries` mean (full paths or their ends, PEFT's rule), of two dimensions or three
    and no layer's weight. From here on each is kept as a module in its place, which nothing that reads it can tell.
    InputError for an entry that matches none."""
    there = _parameters(model) if entries else {}
    chosen = listed(model, "target_parameters", entries, list(there))
    for path in [path for path in there if path in chosen]:
        module, name, parameter = there[path]
        if not isinstance(module, StandIn):
            stand_in(module, name, DenseParameter(parameter))
    return [path for path in there if path in chosen]


def resolve(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Paths of the layers that `config` targets, in module order; InputError for an entry that matches nothing."""
    if config.target is None:
        return []
    layers = list(adaptable_layers(model))
    if not layers:
        raise InputError(f"LoRA needs a {ADAPTABLE}, and this {type(model).__name__} has none.{_own_forwards(model)}")
    chosen = _targeted(model, config.target, layers)
    excluded = listed(model, "exclude", config.exclude, layers) if config.exclude else set()
    names = [name for name in layers if name in chosen and name not in excluded]
    if not names:
        raise InputError(f"exclude={config.exclude!r} takes away all {len(chosen)} layers of target={config.target!r}")
    return names


def check_patterns_used(field: str, patterns: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise InputError for a pattern key that decides nothing among the targeted `names`."""
    used = {name: pattern_key(patterns, name) for name in names}
    for key in [key for key in patterns if key not in used.values()]:
        earlier = next((used[name] for name in names if pattern_key([key], name)), None)
        why = f"decides nothing: {earlier!r} stands before it and matches the same layers"
        none = f"matches none of the {len(names)} targeted layers.{nearest(key, names)}"
        raise InputError(f"{field} key {key!r} {why if earlier else none}")


def nearest(entry: str, names: Iterable[str]) -> str:
    """A sentence with the names closest to `entry`, full paths and last parts alike; else some of those there are."""
    names = list(names)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    close = difflib.get_close_matches(entry, [*leaves, *names], n=5, cutoff=0.6)
    if close:
        return f" Nearest: {', '.join(close)}."
    return f" Last parts of the names there are: {', '.join(list(leaves)[:12])}."


def matcher(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path is one of the names or, after a dot, ends in one: PEFT's rule. A string must match it whole."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda path: bool(expression.fullmatch(path))
    entries = frozenset(names)

    def matches(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[i:]) in entries for i in range(len(parts)))

    return matches


def _targeted(model: nn.Module, target: str | Sequence[str], layers: list[str]) -> set[str]:
    """What `target` names among the layers, embeddings and convolutions by name only; never empty."""
    linear = linear_layers(model).keys()
    if target == "all-linear":
        chosen = linear - output_heads(model)
    elif isinstance(target, str) and target in PARTS:
        words, leaves = PARTS[target]
        chosen = {n for n in linear if n.rpartition(".")[2] in leaves or any(word in n.lower() for word in words)}
    else:
        return listed(model, "target", target, layers)
    if not chosen:
        raise InputError(
            f"target={target!r} finds no such layer in this model; name them in a list.{nearest(str(target), layers)}"
            f"{_own_forwards(model)}"
        )
    return chosen


def listed(model: nn.Module, field: str, entries: str | Sequence[str], layers: list[str]) -> set[str]:
    """The layers that a regular expression or a list of names means; each entry must match one."""
    if isinstance(entries, str):
        found = set(filter(matcher(entries), layers))
        if not found:
            hint = f" For a layer's name, pass a list: [{entries!r}]." if entries.isidentifier() else ""
            rule = "a string is a regular expression that must match a layer's whole path, and this one matches none."
            raise InputError(f"{field}={entries!r}: {rule}{hint}{nearest(entries, layers)}")
        return found
    chosen: set[str] = set()
    for entry in entries:
        found = set(filter(matcher([entry]), layers))
        if not found:
            kinds = {"skip": "linear layer", "target_parameters": "parameter but layers' weights"}.get(field, ADAPTABLE)
            raise InputError(
                f"{field} entry {entry!r} matches no {kinds}.{_other_kind(model, entry)}{nearest(entry, layers)}"
            )
        chosen |= found
    return chosen


def _other_kind(model: nn.Module, entry: str) -> str:
    """Says so if `entry` names a module of another kind, and how those inside it are meant."""
    matches, inside = matcher([entry]), rf"(.*\.)?{re.escape(entry)}\..*"
    kinds = {type(module).__name__ for name, module in base_modules(model).items() if matches(name)}
    hint = f" For all inside it, pass the string {inside!r}." if any(map(matcher(inside), linear_layers(model))) else ""
    what = f" It names a {', '.join(sorted(kinds))}, which is none.{hint}{_own_forwards(model)}"
    return what if kinds else ""


def _own_forwards(model: nn.Module) -> str:
    """Says so if some layers are linear by their class, but not by what they compute."""
    own = [layer for layer in base_modules(model).values() if isinstance(layer, nn.Linear) and not is_linear(layer)]
    kinds = ", ".join(sorted({type(layer).__name__ for layer in own}))
    return f" {kinds} has a forward of its own, so it may be no linear layer: make it an nn.Linear." if kinds else ""


def vocabulary_heads(model: nn.Module) -> set[str]:
    """Paths of the layers onto the vocabulary: what a model says, `lm_head`, or a weight tied to an embedding."""
    heads = [ask() for module in model.modules() if callable(ask := getattr(module, "get_output_embeddings", None))]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, layer in linear_layers(model).items()
        if any(layer is head for head in heads) or name.endswith("lm_head") or id(layer.weight) in embeddings
    }


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the layers that give the answer: onto the vocabulary, and the heads of other tasks, which start fresh.

    A model of transformers has its head beside its body (`base_model_prefix`); elsewhere a head is what the outermost
    module calls classifier, score or qa_outputs, one layer or several."""
    heads, layers = vocabulary_heads(model), linear_layers(model)
    for path, module in base_modules(model).items():
        inside, children = f"{path}." if path else "", module._modules
        if children.get(prefix := getattr(module, "base_model_prefix", None) or "") is not None:
            bodies = [name for name, child in children.items() if name == prefix or hasattr(child, "base_model_prefix")]
            beside = tuple(f"{inside}{name}." for name in children.keys() - bodies)
            heads |= {name for name in layers if f"{name}.".startswith(beside)}
    return heads | {name for name in layers if name.partition(".")[0] in CLASSIFIERS}
