"""Parameter groups: what decays, what learns faster or slower than the rest, and what a group may say."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import DTYPES
from .state_files import refuse_torchs
from .update import Group


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    lora_plus: float = 1.0,
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict[str, object]]:
    """Groups for an optimizer, by weight decay and learning rate, in the order of their first parameter.

    Matrices decay; vectors (norms, biases) and DoRA's magnitudes do not. `lora_plus` is the ratio of lora_B's learning
    rate to lora_A's (LoRA+, Hayou et al., arXiv 2402.12354, who suggest 16). `lr_scale` maps patterns of names, with
    * and ?, to factors on the learning rate; a parameter's factor is the product over all patterns that match its whole
    name, and 0 leaves it out, as is one that needs no gradient. Besides "lr" each group has "lr_scale", its factor on
    `lr`, for loops that set the rate of every step themselves.
    Raises ValueError for a factor that is negative or not finite, and for a pattern or a `lora_plus` of nothing."""
    scales = dict(sorted((lr_scale or {}).items()))  # sorted: else a product's last bit may depend on who wrote them
    for what, value in {"lora_plus": lora_plus, **{f"lr_scale {key}": scale for key, scale in scales.items()}}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{what}: a factor on the learning rate must be 0 or more and finite, got {value}")
    named_parameters = list(named_parameters)
    for pattern in scales:
        if not any(fnmatchcase(name, pattern) for name, _ in named_parameters):
            such_as = f"; a name is such as {named_parameters[0][0]!r}" if named_parameters else ""
            raise ValueError(f"lr_scale: the learning-rate pattern {pattern!r} matches no parameter{such_as}")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    is_b = {name: bool({"lora_B", "lora_embedding_B"} & set(name.split("."))) for name, _ in named_parameters}
    if lora_plus != 1 and not any(is_b.values()):
        raise ValueError("lora_plus is for lora_B's rate, and nothing here is that: leave it out")
    for name, parameter in named_parameters:
        scale = math.prod(value for pattern, value in scales.items() if fnmatchcase(name, pattern))
        if is_b[name]:
            scale *= lora_plus
        if not parameter.requires_grad or scale == 0:
            continue
        # DoRA's magnitude: `magnitude`, or PEFT's `lora_magnitude_vector.default.weight`, of any shape
        is_magnitude = any(part == "magnitude" or part.startswith("lora_magnitude") for part in name.split("."))
        decay = weight_decay if parameter.ndim >= 2 and not is_magnitude else 0.0
        empty = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((decay, scale), empty)["params"].append(parameter)
    return list(groups.values())


def check_group(group: Group, optimizer: object, settings: Iterable[str]) -> None:
    """ValueError for a group that no step could work with, and for one with a setting of its own of these, which are
    the whole optimizer's."""
    refuse_torchs(group)
    for name in settings:
        if name in group and group[name] != getattr(optimizer, name):
            kind = type(optimizer).__name__
            raise ValueError(f"{name} is of the whole optimizer: give {kind} {name}={group[name]!r}, not a group of it")
    lr, betas = group["lr"], group["betas"]
    refuse("lr", lr, is_number(lr) and float(lr) >= 0, "a number >= 0")
    pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(map(is_number, betas))
    refuse("betas", betas, pair and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        value = group.get(name, 0.0)
        refuse(name, value, is_number(value) and value >= 0, "a number >= 0")
    for p in group["params"]:
        if p.dtype not in DTYPES or p.layout != torch.strided:
            raise ValueError(f"parameters must be dense fp32, bf16, fp16 or fp64, got {p.dtype} ({p.layout})")


def is_number(value: object) -> bool:
    """Whether it is a real number, or a tensor of one, as torch takes rates."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def refuse(name: str, value: object, holds: bool, rule: str) -> None:
    """ValueError for a setting whose rule does not hold."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
