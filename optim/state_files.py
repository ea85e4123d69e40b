"""Reading optimizer state that was saved: our own and torch.optim.AdamW's.

Everything is checked before anything is changed. State moves between devices, between float dtypes and from torch, but
never between 32 and 8 bits by itself: that would change a run without a word.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .state import fields, local
from .update import Group, Rule

TORCHS = ("foreach", "fused", "amsgrad", "maximize", "capturable", "differentiable")  # torch.optim.AdamW's own settings
_PEERS_SETTINGS = {*TORCHS, "decoupled_weight_decay"}  # which have no meaning here


def refuse_torchs(settings: Mapping[str, Any]) -> None:
    """ValueError for a setting of torch.optim.AdamW that asks for something which is not done here."""
    for name in TORCHS:
        if (value := settings.get(name)) and name not in ("foreach", "fused"):
            raise ValueError(f"{name}={value!r} is not done here: leave it out, or use torch.optim.AdamW for it")


def read_groups(saved: list[Group], groups: list[Group]) -> list[Group]:
    """The saved groups' settings with our parameters. ValueError if their numbers differ."""
    sizes, ours = ([len(group["params"]) for group in some] for some in (saved, groups))
    if sizes != ours:
        raise ValueError(f"the saved optimizer has groups of {sizes} parameters, this one of {ours}")
    absent = [name for name in ("lr", "betas", "weight_decay") if any(name not in group for group in saved)]
    if absent:
        raise ValueError(f"the saved optimizer has no {' and no '.join(absent)}, so it is neither AdamW nor Lion")
    for name in ("amsgrad", "maximize"):
        if any(group.get(name) for group in saved):
            raise ValueError(f"the saved optimizer has {name}=True, which the optimizers here do not do")
    if any(group.get("decoupled_weight_decay") is False and group.get("weight_decay") for group in saved):
        raise ValueError("the saved optimizer is Adam, which adds weight decay into the gradient; here it is decoupled")
    kept = [{k: v for k, v in deepcopy(group).items() if k not in _PEERS_SETTINGS} for group in saved]
    return [{**now, **before, "params": now["params"]} for now, before in zip(groups, kept, strict=True)]


def read_states(
    saved: dict[str, Any], parameters: list[nn.Parameter], bits: Callable[[Tensor], int], rule: Rule
) -> dict[int, dict[str, Any]]:
    """Number of a parameter -> its "step" (a float) and moments, named as ours and checked."""
    place = {key: i for i, key in enumerate(key for group in saved["param_groups"] for key in group["params"])}
    unknown = [key for key in saved["state"] if key not in place]
    if unknown:
        raise ValueError(f"the saved state of parameters {unknown} belongs to no saved group")
    states = {place[key]: entry for key, entry in saved["state"].items() if entry}
    return {i: _entry(i, entry, parameters[i], bits(parameters[i]), rule) for i, entry in states.items()}


def _entry(number: int, entry: dict[str, Any], parameter: nn.Parameter, wanted: int, rule: Rule) -> dict[str, Any]:
    what = f"the saved state of parameter {number}, {tuple(parameter.shape)},"
    first = entry.get(rule.moments[0].name)
    kept = fields(rule.moments, wanted, parameter.dtype)
    if isinstance(first, Tensor) and (first.dtype == torch.uint8) != (wanted == 8):
        raise ValueError(
            f"{what} has {8 if wanted == 32 else 32} bits, but this optimizer keeps {wanted} for it; make one with the "
            "`bits` and `min_8bit_size` that it was saved with"
        )
    if set(entry) != {"step", *kept}:
        raise ValueError(f"{what} has {sorted(entry)}, but {rule.name} keeps {sorted(['step', *kept])}")
    for name, field in kept.items():
        value, codes = entry[name], field.dtype == torch.uint8
        if not isinstance(value, Tensor) or not (value.dtype == torch.uint8 if codes else value.is_floating_point()):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{what} has a {name} of {got}, not a tensor of {'uint8' if codes else 'floats'}")
        if (held := local(value).shape) != (shape := field.shape(parameter)):
            raise ValueError(f"{what} has a {name} of shape {tuple(held)}, not {tuple(shape)}")
    return {**entry, "step": float(entry["step"])}
