"""Several linears of one input: q, k and v, or gate and up. Those that can share their passes over it do."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .linear import LoRALinear, joint_forward
from .linear4bit import NF4Linear


def project(x: Tensor, modules: Sequence[nn.Module], *, keep: bool = False) -> tuple[Tensor, ...]:
    """The output of every module on x [..., in], as if each were called.

    LoRALinears over 4-bit bases of one format and dropout rate run as one op (`kernels.lora.lora_linears4bit`): x is
    read once for all of them, forward and backward, and kept once. They also share dropout's mask: each update sees the
    same elements dropped, where separate calls would draw for each. All other modules are called, and so are those with
    hooks. `keep`: what the op decodes is kept for backward, for use under activation checkpointing.
    """
    together: dict[Any, list[int]] = {}
    for i, module in enumerate(modules):
        together.setdefault(_format(module, x) or i, []).append(i)
    outputs: dict[int, Tensor] = {}
    for places in together.values():
        group = [modules[i] for i in places]
        if _format(group[0], x) is None:
            made = [module(x) for module in group]
        else:
            made = joint_forward(x, [module for module in group if isinstance(module, LoRALinear)], keep)
        outputs.update(zip(places, made, strict=True))
    return tuple(outputs[i] for i in range(len(modules)))


def _format(module: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """What modules must have in common to share one op; None for those that are called."""
    if type(module) is not LoRALinear or not module.joint or not x.is_floating_point():
        return None
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    base = module.base
    return (base.quant_type, base.blocksize, base.double_quant, module.drop) if isinstance(base, NF4Linear) else None
